"""The next token of every row of a batch, each row by its own rules.

A row's randomness comes from ``noise``, so a seeded request draws the same numbers at any batch size. Tokens are chosen
by the Gumbel trick: the largest of ``log p + noise`` is a sample of ``p``.

Sampled rows look at a few hundred candidates instead of sorting the vocabulary. That is exact: a row whose limits let
in more than the candidates, or whose draw falls on a token outside of them, is done again over the whole vocabulary.

Order, as in Transformers: penalties, what a grammar bans, temperature, top_k, top_p, min_p. Penalties count generated
tokens, not the prompt's. Log-probabilities are those of the model, before any of this: under a grammar, too, they say
how likely the model itself found what it was made to say.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from asyncmodels.local.noise import gumbel, key_halves, uniform
from asyncmodels.local.runner import Sampled
from asyncmodels.local.sequence import Sequence

__all__ = ["Sampler"]

_CANDIDATES = 256
_TAIL = 0x7FFFFFFF
"""The "token id" whose number decides whether a draw falls outside of the candidates."""


@dataclass(slots=True)
class _State:
    """What the sampler remembers of a sequence."""

    seed: int
    counts: torch.Tensor | None = None


class Sampler:
    """Samples for one runner. ``forget`` a sequence when it leaves."""

    def __init__(self, *, candidates: int = _CANDIDATES) -> None:
        self._candidates = candidates
        self._states: dict[Sequence, _State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def forget(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)

    def clear(self) -> None:
        self._states.clear()

    def sample(self, logits: torch.Tensor, rows: Rows[Sequence], banned: torch.Tensor | None = None) -> list[Sampled]:
        """One token for each row of ``logits`` [rows, vocabulary], with one copy from the device.

        ``banned``, of the same shape, is true where a token must not be chosen; each row must have another one.
        """
        if all(row.sampling.greedy and not row.sampling.penalised and row.sampling.logprobs is None for row in rows):
            allowed = logits if banned is None else _without(logits, banned)
            return list(map(Sampled, rows, allowed.argmax(dim=-1).tolist()))
        scores = logits.float()
        raw = scores
        if any(row.sampling.penalised for row in rows):
            scores = self._penalise(scores, rows)
        if banned is not None:
            scores = _without(scores, banned)
        sampled = [index for index, row in enumerate(rows) if not row.sampling.greedy]
        if len(sampled) == len(rows):
            tokens, redo = self._draw(scores, rows)
        else:
            tokens = scores.argmax(dim=-1)
            redo = torch.zeros_like(tokens, dtype=torch.bool)
            if sampled:
                index = torch.tensor(sampled, device=scores.device)
                tokens[index], redo[index] = self._draw(scores[index], [rows[i] for i in sampled])
        outputs = self._collect(raw, tokens, redo, scores, rows)
        for output in outputs:
            state = self._states.get(output.sequence)
            if state is not None and state.counts is not None:
                state.counts[output.token] += 1
        return outputs

    # -- penalties ----------------------------------------------------------------------------------------------------

    def _penalise(self, scores: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
        scores = scores.clone()
        for row, sequence in enumerate(rows):
            sampling = sequence.sampling
            if not sampling.penalised:
                continue
            counts = self._counts(sequence, scores)
            scores[row].sub_(counts, alpha=sampling.frequency_penalty)
            scores[row].sub_(counts.clamp(max=1.0), alpha=sampling.presence_penalty)
        return scores

    def _counts(self, sequence: Sequence, scores: torch.Tensor) -> torch.Tensor:
        state = self._state(sequence)
        if state.counts is None:
            state.counts = torch.zeros(scores.shape[-1], device=scores.device)
            for token in sequence.output:
                state.counts[token] += 1
        return state.counts

    def _state(self, sequence: Sequence) -> _State:
        state = self._states.get(sequence)
        if state is None:
            seed = sequence.sampling.seed
            state = self._states[sequence] = _State(secrets.randbits(64) if seed is None else seed)
        return state

    # -- sampling -----------------------------------------------------------------------------------------------------

    def _draw(self, scores: torch.Tensor, rows: Rows[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row, and whether the row must be done again over the whole vocabulary."""
        vocabulary = scores.shape[-1]
        limits = _Limits.of(rows, vocabulary, scores.device)
        widest = max((row.sampling.top_k or 0 for row in rows), default=0)
        width = min(vocabulary, max(self._candidates, widest + 1))
        if any(row.sampling.temperature != 1.0 for row in rows):
            scores = scores / limits.temperature
        best, ids = scores.topk(width, dim=-1)
        # Not less logsumexp, which takes several times as long on CPUs where much is banned.
        logp = scores.log_softmax(dim=-1).gather(-1, ids)
        keep = limits.keep(best, logp)
        limited = ~limits.unlimited
        # Beyond what is banned there is nothing to look for.
        more = best > -torch.inf
        again = keep[:, -1] & more[:, -1] & limited if width < vocabulary else torch.zeros_like(limited)
        keys = self._keys(rows, scores.device)
        if vocabulary > self._candidates:
            # Without limits the first number decides between the candidates and the tail, the others inside of either.
            keep &= limited.unsqueeze(-1) | (best > best[:, self._candidates - 1, None])
            inside = logp.exp().masked_fill(~keep, 0.0).sum(dim=-1)
            place = uniform(keys, torch.tensor([[_TAIL]], device=ids.device)).squeeze(-1)
            again |= ~limited & (place >= inside) & more[:, self._candidates - 1]
        scored = logp.add(gumbel(keys, ids)).masked_fill(~keep, -torch.inf)
        return ids.gather(-1, scored.argmax(dim=-1, keepdim=True)).squeeze(-1), again

    def _draw_whole(self, scores: torch.Tensor, sequence: Sequence) -> int:
        """The slow way for one row [vocabulary]: the tail without limits, else all that they let in, however much."""
        limits = _Limits.of([sequence], scores.shape[-1], scores.device)
        scores = scores / limits.temperature
        keys = self._keys([sequence], scores.device)
        if bool(limits.unlimited):
            last = scores.topk(self._candidates, dim=-1).values[:, -1:]
            noise = gumbel(keys, torch.arange(scores.shape[-1], device=scores.device)[None])
            return int(scores.add(noise).masked_fill(scores > last, -torch.inf).argmax())
        best, ids = scores.sort(dim=-1, descending=True)
        logp = best.log_softmax(dim=-1)
        noise = gumbel(keys, ids)
        return int(ids[0, logp.add(noise).masked_fill(~limits.keep(best, logp), -torch.inf).argmax()])

    def _keys(self, rows: Rows[Sequence], device: torch.device) -> torch.Tensor:
        """Two 32-bit numbers for each row, [2, rows, 1]: its seed and its place in its text, well mixed."""
        halves = [key_halves(self._state(row).seed, len(row.output)) for row in rows]
        return torch.tensor(halves, dtype=torch.int64, device=device).T.unsqueeze(-1)

    # -- results ------------------------------------------------------------------------------------------------------

    def _collect(
        self,
        raw: torch.Tensor,
        tokens: torch.Tensor,
        redo: torch.Tensor,
        scores: torch.Tensor,
        rows: Rows[Sequence],
    ) -> list[Sampled]:
        flags, chosen = torch.stack((redo.to(tokens.dtype), tokens)).tolist()
        for row, again in enumerate(flags):
            if again:
                chosen[row] = self._draw_whole(scores[row], rows[row])
        reported = [row for row, sequence in enumerate(rows) if sequence.sampling.logprobs is not None]
        outputs = list(map(Sampled, rows, chosen))
        if reported:
            index = torch.tensor(reported, device=raw.device)
            logp = raw[index].log_softmax(dim=-1)
            most = max(rows[row].sampling.logprobs or 0 for row in reported)
            picked = torch.tensor([[chosen[row]] for row in reported], device=raw.device)
            values, ids = logp.topk(most, dim=-1)
            # Token ids are far below 2**24, so float32 carries them exactly: one copy for everything.
            report = torch.cat((logp.gather(-1, picked), values, ids.to(values.dtype)), dim=-1).tolist()
            for row, (own, *rest) in zip(reported, report, strict=True):
                wanted = rows[row].sampling.logprobs or 0
                top = tuple((int(id), value) for value, id in zip(rest[:wanted], rest[most:], strict=False))
                outputs[row] = Sampled(rows[row], chosen[row], own, top)
        return outputs


@dataclass(slots=True)
class _Limits:
    """The limits of some rows as tensors, each [rows, 1]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    unlimited: torch.Tensor

    @classmethod
    def of(cls, rows: Rows[Sequence], vocabulary: int, device: torch.device) -> _Limits:
        values = [
            [row.sampling.temperature for row in rows],
            [float(row.sampling.top_k or vocabulary) for row in rows],
            [row.sampling.top_p or 2.0 for row in rows],
            [row.sampling.min_p or 0.0 for row in rows],
        ]
        temperature, top_k, top_p, min_p = torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)
        unlimited = ((top_k >= vocabulary) & (top_p > 1) & (min_p == 0)).squeeze(-1)
        return cls(temperature, top_k.clamp(max=vocabulary).long(), top_p, min_p, unlimited)

    def keep(self, best: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
        """Which candidates, sorted from the best on, may be chosen. Equals of the last one that top_k lets in stay."""
        width = best.shape[-1]
        threshold = best.gather(-1, (self.top_k.clamp(max=width) - 1))
        keep = (best >= threshold) | (self.top_k > width)
        p = logp.exp().masked_fill(~keep, 0.0)
        # top_p is a share of what top_k left; without top_k, of everything, whether it is a candidate or not.
        whole = torch.where(self.top_k > width, torch.ones_like(self.top_p), p.sum(dim=-1, keepdim=True))
        keep &= (p.cumsum(dim=-1) - p) < self.top_p * whole
        keep &= logp.exp() >= self.min_p * logp[:, :1].exp()
        keep[:, 0] = True
        return keep


def _without(scores: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    # Not masked_fill, which takes half as long again on CPUs.
    return torch.where(banned, -torch.inf, scores)
