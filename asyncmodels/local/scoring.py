"""Scoring with the Transformers runner: what log-probabilities a model gives to tokens that are there already.

Rows that are about as long are worked off together, left-padded, and left again: nothing of them decodes. Those that
begin alike wait for the first of them, and begin where it went another way; those that read the very same tokens are
one row. Logits are made for no more columns than are asked for, and looked at in float32 a few places at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from asyncmodels.errors import EngineError
from asyncmodels.local.kv import BatchCache, Segment
from asyncmodels.local.prefix_cache import Found
from asyncmodels.local.prefixes import Prefixes
from asyncmodels.local.runner import Failed, Output, Scores
from asyncmodels.local.sequence import Sequence

__all__ = ["Scorer"]

_WORTH_WAITING = 16
"""How many tokens a row must save to wait for another one that begins the same way: as many as are kept at least."""
_LOGITS = 2**26
"""How many logits there may be at once: a quarter of a gigabyte in float32."""
_TOGETHER = 2**23
"""How many of them are looked at together in float32."""
_ALIKE = 1.5
"""How many times as long as the shortest row of a batch its longest may be: what is between them is padding."""
_SLACK = 8
"""By how many tokens it may be longer in any case: a batch of few tokens costs what one of a few more does."""

_Place: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]
_NOTHING: Found[Segment] = Found()


@dataclass(slots=True, eq=False)
class _Row:
    """What is read once, for those who are scored by it."""

    tokens: tuple[int, ...]
    sequences: list[Sequence]
    done: int = 0
    cache: BatchCache | None = None
    places: list[_Place] = field(default_factory=list)
    """Of a row that is read in pieces, those that are known."""

    @property
    def scored(self) -> int:
        """How many of the last columns have logits that somebody asks for."""
        return max(len(sequence.scored) for sequence in self.sequences)

    @property
    def begin(self) -> int:
        """The first of these columns."""
        return len(self.tokens) - self.scored

    @property
    def top(self) -> int:
        return max(sequence.sampling.logprobs or 1 for sequence in self.sequences)

    @property
    def salt(self) -> str | None:
        return self.sequences[0].cache_salt

    def wanted(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """For the logits of columns from ``start`` to ``end``: the column, and the token whose probability is asked.

        The last column is asked once for each sequence, for their last tokens differ.
        """
        for column in range(max(start, self.begin), min(end, len(self.tokens) - 1)):
            yield column, self.tokens[column + 1]
        if end == len(self.tokens):
            for sequence in self.sequences:
                yield end - 1, sequence.scored[-1]

    def outputs(self) -> list[Output]:
        shared = self.places[: self.scored - 1]
        last = self.places[self.scored - 1 :]
        outputs: list[Output] = []
        for sequence, end in zip(self.sequences, last, strict=True):
            own = [*shared[len(shared) - len(sequence.scored) + 1 :], end]
            top = sequence.sampling.logprobs or 1
            if any(logprob != logprob for logprob, _ in own):
                outputs.append(Failed(sequence, EngineError("The model's log-probabilities are not numbers (NaN).")))
            else:
                outputs.append(Scores(sequence, tuple((logprob, best[:top]) for logprob, best in own)))
        return outputs


class _Ready(NamedTuple):
    """A row that can be worked off now, and what is known of its beginning."""

    row: _Row
    found: Found[Segment]

    @property
    def rest(self) -> int:
        return len(self.row.tokens) - (self.row.done or self.found.length)


class Scorer:
    """Scores on one model, on the thread that owns it. ``vocabulary`` is how wide its logits are."""

    def __init__(
        self,
        model: Any,
        *,
        windows: Rows[int | None],
        accepts: frozenset[str],
        device: torch.device,
        vocabulary: int,
        prefixes: Prefixes | None,
    ) -> None:
        self._model = model
        self._windows = windows
        self._accepts = accepts
        self._device = device
        self._vocabulary = vocabulary
        self._prefixes = prefixes
        self._rows: dict[tuple[str | None, tuple[int, ...]], _Row] = {}
        self.computed = 0
        """How many tokens were read, without what a prefix cache knew."""

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    def insert(self, sequence: Sequence) -> None:
        row = self._rows.setdefault((sequence.cache_salt, sequence.prompt), _Row(sequence.prompt, []))
        # Who comes while a row is read in pieces may ask for columns that it has left behind, or for more of each.
        if row.done and (len(sequence.scored) > row.scored or (sequence.sampling.logprobs or 1) > row.top):
            row.done, row.cache, row.places = 0, None, []
        row.sequences.append(sequence)

    def remove(self, leaving: set[Sequence]) -> None:
        for key, row in list(self._rows.items()):
            staying = [sequence for sequence in row.sequences if sequence not in leaving]
            if len(staying) == len(row.sequences):
                continue
            if not staying:
                del self._rows[key]
            elif row.done:
                # What is known was counted from the first column that somebody asked for, who may have left.
                before = row.begin
                row.sequences = staying
                row.places = row.places[row.begin - before :]
            else:
                row.sequences = staying

    def clear(self) -> None:
        self._rows.clear()

    def step(self, budget: int) -> list[Output]:
        """Works off about ``budget`` tokens, padding included."""
        outputs: list[Output] = []
        ready = self._ready()
        long = next((each for each in ready if each.row.done or not self._fits([each], budget)), None)
        short = [each for each in ready if not each.row.done and self._fits([each], budget)]
        left = budget if long is None or not short else max(1, budget // 2)
        for batch in self._batches(short, left):
            cost = len(batch) * max(each.rest for each in batch)
            if outputs and cost > left:
                break
            left -= cost
            outputs += self._together(batch)
        if long is not None:
            outputs += self._piece(long, budget if not short else max(1, budget // 2))
        over = {output.sequence for output in outputs}
        for key in [key for key, row in self._rows.items() if row.sequences[0] in over]:
            del self._rows[key]
        return outputs

    # -- what comes next ----------------------------------------------------------------------------------------------

    def _ready(self) -> list[_Ready]:
        """In the order in which they came. Who begins like one before him waits until he can begin where that ends."""
        if self._prefixes is None:
            return [_Ready(row, _NOTHING) for row in self._rows.values()]
        ready: list[_Ready] = []
        first: set[tuple[str | None, tuple[int, ...]]] = set()
        for row in self._rows.values():
            found = _NOTHING if row.done else self._prefixes.find(row.salt, row.tokens[: row.begin + 1])
            goal = found.length + _WORTH_WAITING
            if row.begin >= goal and goal <= self._prefixes.capacity:
                beginning = (row.salt, row.tokens[:goal])
                if beginning in first and not row.done:
                    continue
                first.add(beginning)
            ready.append(_Ready(row, found))
        return ready

    def _batches(self, ready: list[_Ready], budget: int) -> list[list[_Ready]]:
        """Batches of rows that are alike, the one with the row that came first before the others."""
        order = {id(each.row): place for place, each in enumerate(ready)}
        batches: list[list[_Ready]] = []
        for each in sorted(ready, key=lambda each: -each.rest):
            batch = batches[-1] if batches else None
            if (
                batch is not None
                and batch[0].rest <= max(each.rest * _ALIKE, each.rest + _SLACK)
                and self._fits([*batch, each], budget)
            ):
                batch.append(each)
            else:
                batches.append([each])
        return sorted(batches, key=lambda batch: min(order[id(each.row)] for each in batch))

    def _fits(self, batch: list[_Ready], budget: int) -> bool:
        columns = max(each.rest for each in batch)
        if len(batch) * columns > budget:
            return False
        kept = max(each.row.scored for each in batch) if "logits_to_keep" in self._accepts else columns
        return len(batch) * kept * self._vocabulary <= _LOGITS

    # -- reading ------------------------------------------------------------------------------------------------------

    def _together(self, batch: list[_Ready]) -> list[Output]:
        """Whole rows. When they fail together, each is tried alone, so that only the one at fault fails.

        All are worked off over the same last columns, so who has less left to do does some of what is known again.
        """
        rows = [each.row for each in batch]
        count = max(each.rest for each in batch)
        known = [max(0, len(row.tokens) - count) for row in rows]
        width = max(known) + count
        pads = [width - len(row.tokens) for row in rows]
        kept = max(row.scored for row in rows)
        try:
            ids = torch.tensor([((0,) * pad + row.tokens)[-count:] for pad, row in zip(pads, rows, strict=True)])
            positions = (torch.arange(width - count, width)[None] - torch.tensor(pads)[:, None]).clamp(min=0)
            cache = self._begun([each.found for each in batch], known)
            logits = self._forward(ids, cache, positions, pads, kept)
            wanted = [
                (index, column + pad + kept - width, token)
                for index, (row, pad) in enumerate(zip(rows, pads, strict=True))
                for column, token in row.wanted(0, len(row.tokens))
            ]
            places = iter(_places(logits, wanted, max(row.top for row in rows)))
        except Exception as error:
            if len(batch) == 1:
                return [Failed(sequence, error) for sequence in rows[0].sequences]
            return [output for each in batch for output in self._together([each])]
        outputs: list[Output] = []
        for index, row in enumerate(rows):
            row.places = [next(places) for _ in range(row.scored - 1 + len(row.sequences))]
            self._remember(row, cache, index, known[index])
            outputs += row.outputs()
        return outputs

    def _piece(self, ready: _Ready, budget: int) -> list[Output]:
        """The next piece of a row that is too long to be read in one step, or has too many places."""
        row, found = ready
        start = row.done or found.length
        end = min(len(row.tokens), start + budget)
        if "logits_to_keep" not in self._accepts:
            end = min(end, start + max(1, _LOGITS // self._vocabulary))
        end = min(end, max(start, row.begin) + max(1, _LOGITS // self._vocabulary))
        kept = max(1, end - max(start, row.begin))
        try:
            if row.cache is None:
                row.cache = self._begun([found], [found.length])
                self._note(row, found.length)
            ids, positions = torch.tensor([row.tokens[start:end]]), torch.arange(start, end)[None]
            logits = self._forward(ids, row.cache, positions, [0], kept)
            wanted = [(0, column - (end - kept), token) for column, token in row.wanted(start, end)]
            row.places += _places(logits, wanted, row.top)
        except Exception as error:
            return [Failed(sequence, error) for sequence in row.sequences]
        self.computed += end - start
        row.done = end
        if self._prefixes is not None and start < row.begin:
            self._prefixes.remember(row.sequences[0], row.tokens[:end], row.cache, 0, min(end, row.begin))
        return row.outputs() if end == len(row.tokens) else []

    def _remember(self, row: _Row, cache: BatchCache, index: int, known: int) -> None:
        """Keeps what comes before the places that are asked for: that is what others may have in common with it."""
        self.computed += len(row.tokens) - known
        self._note(row, known)
        if self._prefixes is not None and known < row.begin:
            self._prefixes.remember(row.sequences[0], row.tokens, cache, index, row.begin)

    def _note(self, row: _Row, known: int) -> None:
        if self._prefixes is not None:
            self._prefixes.used(row.sequences[0], known)
            for sequence in row.sequences[1:]:
                self._prefixes.used(sequence, len(row.tokens))

    def _begun(self, found: list[Found[Segment]], counts: list[int]) -> BatchCache:
        if self._prefixes is None or not any(counts):
            return BatchCache(self._windows)
        return self._prefixes.begin(found, counts)

    def _forward(
        self, ids: torch.Tensor, cache: BatchCache, positions: torch.Tensor, pads: list[int], kept: int
    ) -> torch.Tensor:
        """The logits of the last ``kept`` columns, [rows, kept, vocabulary]."""
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if any(pads):
            width = cache.width + ids.shape[1]
            own = torch.arange(width)[None] >= torch.tensor(pads)[:, None]
            kwargs["attention_mask"] = own.long().to(self._device)
        if "position_ids" in self._accepts:
            kwargs["position_ids"] = positions.to(self._device)
        if "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = kept
        logits: torch.Tensor = self._model(ids.to(self._device), **kwargs).logits
        return logits[:, -kept:]


def _places(logits: torch.Tensor, wanted: list[tuple[int, int, int]], top: int) -> list[_Place]:
    """The log-probability of each wanted token, given by its row, its column and itself, and the ``top`` best there."""
    if not wanted:
        return []
    rows, columns, tokens = torch.tensor(wanted, device=logits.device).unbind(1)
    count = max(1, _TOGETHER // logits.shape[-1])
    top = min(top, logits.shape[-1])
    figures: list[torch.Tensor] = []
    for start in range(0, len(wanted), count):
        part = slice(start, start + count)
        each = logits[rows[part], columns[part]].float()
        total = each.logsumexp(dim=-1, keepdim=True)
        best, ids = each.max(dim=-1, keepdim=True) if top == 1 else each.topk(top)
        own = each.gather(1, tokens[part, None])
        # Ids are whole numbers below 2 ** 53, which a double holds exactly.
        figures.append(torch.cat([(own - total).double(), (best - total).double(), ids.double()], dim=1))
    return [
        (own, tuple((int(token), logprob) for logprob, token in zip(rest[:top], rest[top:], strict=True)))
        for own, *rest in torch.cat(figures).tolist()
    ]
