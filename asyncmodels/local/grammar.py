"""Grammars: what a sequence may say, as a mask over the vocabulary for each next token, by llguidance.

A grammar is checked before its request is queued. What is wrong with it is an InvalidRequestError in the grammar's own
words, what llguidance has no means for an UnsupportedError, and what is too large to be worked off in bounded time and
memory is refused: nested too deeply (which would end the process: the compiler is recursive), too long, too ambiguous.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncmodels.errors import EngineError, InvalidRequestError, MissingExtraError, UnsupportedError
from asyncmodels.local.json_grammar import LONGEST_TEXT, BoundedLark, normalised_schema, too_large
from asyncmodels.types import EBNF, Choice, Grammar, JSONSchema, Regex

try:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark
except ImportError:  # local models can do without: whoever asks for a grammar hears of it
    _INSTALLED = False
else:
    _INSTALLED = True

__all__ = ["Constraint", "GrammarCompiler", "MaskFiller", "validate"]

_LONGEST = 500_000
"""Characters of a grammar."""
_MOST_RULES = 1000
"""Colons in an EBNF grammar: each rule has one, and a chain of rules is compiled by recursion."""
_REMEMBERED = 64
"""Grammars that stay compiled, for each model."""


def validate(grammar: Grammar) -> Grammar:
    """``grammar`` in the form that llguidance reads: schemas normalised, EBNF as Lark.

    For an engine that compiles by itself, and has no tokenizer here. Blocks for up to a second, so call it where
    the stack is deep: on ``DeepThreads``. Raises InvalidRequestError, UnsupportedError, and MissingExtraError without
    llguidance.
    """
    _require()
    normal = _normalised(grammar)
    _matcher(_bytes(), grammar, normal)
    return normal


class GrammarCompiler:
    """Compiles the grammars of one model. Made once per model; ``compile`` may be called on any thread.

    ``n_vocab`` is the width of the model's logits, which may be more than the tokenizer has. Making one takes up to a
    second in which no other thread of the process gets to run, so it belongs to the loading of the model.
    """

    def __init__(self, tokenizer: Any, n_vocab: int, eos_token_ids: Iterable[int]) -> None:
        self.n_vocab = max(n_vocab, len(tokenizer))
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._tokenizer: llguidance.LLTokenizer | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if _INSTALLED and backend is not None:
            ends = sorted(eos_token_ids) or [tokenizer.eos_token_id]
            self._tokenizer = llguidance.LLTokenizer(_plain(backend), n_vocab=self.n_vocab, eos_token=ends)

    def compile(self, grammar: Grammar) -> Constraint:
        """What one sequence needs to be held to ``grammar``. What was compiled lately is only copied.

        Raises InvalidRequestError, UnsupportedError, and MissingExtraError without llguidance.
        """
        _require()
        if self._tokenizer is None:
            raise UnsupportedError("This model's tokenizer is none of the tokenizers library, so it knows no grammars.")
        normal = _normalised(grammar)
        source = _source(normal)
        with self._lock:
            compiled = self._compiled.get(source)
            if compiled is not None:
                self._compiled.move_to_end(source)
                return Constraint(compiled.deep_copy())
        # Two threads may compile the same at once, but neither waits for what others compile.
        compiled = _matcher(self._tokenizer, grammar, normal)
        with self._lock:
            self._compiled[source] = compiled
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
            return Constraint(compiled.deep_copy())


class Constraint:
    """One sequence's way through its grammar. One thread at a time may use it."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    @property
    def over(self) -> bool:
        """Whether the sentence is whole and nothing can follow it, not even optionally."""
        return bool(self.matcher.is_stopped())

    def mask(self, n_vocab: int) -> NDArray[np.int32]:
        """Which tokens may come next: bit ``i % 32`` of word ``i // 32`` for token ``i``. For one row; see MaskFiller.

        Raises InvalidRequestError when the grammar became too complex to go on.
        """
        mask = np.zeros((1, _words(n_vocab)), dtype=np.int32)
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.check()
        words: NDArray[np.int32] = mask[0]
        return words

    def take(self, token: int) -> bool:
        """Notes that ``token`` was said. Returns ``over``. Raises EngineError when it should not have been said,
        InvalidRequestError when the grammar became too complex to go on.
        """
        if not self.matcher.consume_token(token):
            if "doesn't satisfy the grammar" in self._error():
                raise EngineError("The grammar does not allow the token that was generated.")
            self.check()
        return self.over

    def restart(self, tokens: Iterable[int]) -> None:
        """Begins anew and goes as far as ``tokens``; raises as ``take`` does."""
        self.matcher.reset()
        for token in tokens:
            self.take(token)

    def check(self) -> None:
        """Raises InvalidRequestError when the grammar broke, which it does where it is too complex to go on."""
        if self.matcher.is_error():
            raise InvalidRequestError(f"The grammar cannot be followed any further: {_line(self._error())}.")

    def _error(self) -> str:
        return str(self.matcher.get_error())


class MaskFiller:
    """Fills the masks of a batch on threads of its own, while the model runs. Belongs to one engine; ``close`` it."""

    def __init__(self, n_vocab: int) -> None:
        self._words = _words(n_vocab)
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: tuple[Future[Any], NDArray[np.int32]] | None = None

    def begin(self, constraints: Sequence[Constraint | None]) -> Callable[[], NDArray[np.int32]] | None:
        """Begins to fill a mask for each row; one without a constraint may say anything. None when no row has any.

        What is returned waits for the masks, int32 [rows, words]. Nothing may happen to the constraints before; who
        does not need the masks any more calls ``settle``. The mask of a constraint that broke, which
        ``Constraint.check`` tells, means nothing.
        """
        rows = [(constraint.matcher, row) for row, constraint in enumerate(constraints) if constraint is not None]
        if not rows:
            return None
        self.settle()
        masks = np.full((len(constraints), self._words), -1, dtype=np.int32)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="asyncmodels-masks")
        filling = self._thread.submit(
            _executor().unsafe_compute_mask_ptr, rows, masks.ctypes.data, self._words * 4, len(constraints)
        )

        # Only an address was handed over: the masks must stay until they are filled, whoever forgets them.
        self._under_way = filling, masks

        def filled() -> NDArray[np.int32]:
            filling.result()
            return masks

        return filled

    def settle(self) -> None:
        """Waits until no constraint is in use any more."""
        if self._under_way is not None:
            wait([self._under_way[0]])
            self._under_way = None

    def close(self) -> None:
        """Ends the thread. Closing twice is allowed."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None


@cache
def _executor() -> llguidance.LLExecutor:
    # One for the process: its threads are as many as there are cores, and never end.
    return llguidance.LLExecutor()


def _words(n_vocab: int) -> int:
    return (n_vocab + 31) // 32


def _require() -> None:
    if not _INSTALLED:
        raise MissingExtraError(
            "Grammars and response formats of local models, and tool calls that are demanded, need llguidance, which "
            'is not installed: pip install "asyncmodels[transformers]"'
        )


def _matcher(tokenizer: llguidance.LLTokenizer, grammar: Grammar, normal: Grammar) -> llguidance.LLMatcher:
    """One at its beginning, for ``grammar`` in its normal form.

    Raises for what is wrong with it, as far as that shows before there is a choice of what to say.
    """
    matcher = llguidance.LLMatcher(tokenizer, _source(normal), log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first is the slowest: its work stays in the copies
    ahead = matcher.deep_copy()
    if not ahead.is_error():
        ahead.consume_tokens(ahead.compute_ff_tokens())
    if not (ahead.is_error() or ahead.is_stopped()):
        ahead.compute_bitmask()
    if ahead.is_error():
        raise _refusal(grammar, ahead.get_error())
    return matcher


@cache
def _bytes() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def _limits() -> llguidance.LLParserLimits:
    # A mask may take some ten milliseconds at most, and a state of the lexer is up to two kilobytes.
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _plain(backend: Any) -> str:
    """The tokenizer as JSON, without the padding and the cutting that it may have been saved with."""
    text: str = backend.to_str()
    if backend.padding is None and backend.truncation is None:
        return text
    return json.dumps({**json.loads(text), "padding": None, "truncation": None})


# -- grammars in llguidance's words -----------------------------------------------------------------------------------


def _normalised(grammar: Grammar) -> Grammar:
    if isinstance(grammar, JSONSchema):
        return JSONSchema(normalised_schema(grammar.schema))
    if isinstance(grammar, EBNF) and not isinstance(grammar, BoundedLark):
        return EBNF(_as_lark(grammar.grammar))
    if isinstance(grammar, Choice):
        length, longest = sum(map(len, grammar.options)), max(map(len, grammar.options), default=0)
    elif isinstance(grammar, Regex):
        length = longest = len(grammar.pattern)
    else:
        length, longest = len(grammar.grammar), 0
    if length > _LONGEST:
        raise too_large(f"it has {length} characters")
    if longest > LONGEST_TEXT:
        raise too_large(f"it has a text of {longest} characters")
    return grammar


def _source(normal: Grammar) -> str:
    """What llguidance compiles, for a grammar that is normalised."""
    matcher = llguidance.LLMatcher
    if isinstance(normal, JSONSchema):
        return str(matcher.grammar_from_json_schema(_text(normal.schema)))
    if isinstance(normal, Regex):
        return str(matcher.grammar_from_regex(normal.pattern))
    if isinstance(normal, EBNF):
        return str(matcher.grammar_from_lark(normal.grammar))
    return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, normal.options))))


def _text(schema: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"The JSON schema holds something that JSON cannot: {_line(str(error))}.") from error
    if len(text) > _LONGEST:
        raise too_large(f"it has {len(text)} characters")
    return text


def _as_lark(text: str) -> str:
    if len(text) > _LONGEST:
        raise too_large(f"it has {len(text)} characters")
    if text.count(":") > _MOST_RULES:
        raise too_large(f"it has more than {_MOST_RULES} rules")
    longest = max(map(len, text.splitlines()), default=0)
    if longest > LONGEST_TEXT:
        raise too_large(f"it has a line of {longest} characters")
    try:
        return str(any_to_lark(text))
    except RecursionError as error:
        raise too_large("it is nested too deeply") from error
    except Exception as error:  # the converter raises bare exceptions
        raise InvalidRequestError(f"The EBNF grammar is not valid: {_line(str(error))}.") from error


_UNSUPPORTED = ("Unimplemented keys", "Unknown format", "not supported", "not implemented")
_NAMES: dict[type, str] = {
    JSONSchema: "JSON schema",
    Regex: "Regex grammar",
    EBNF: "EBNF grammar",
    BoundedLark: "schema of a tool",
    Choice: "Choice grammar",
}


def _refusal(grammar: Grammar, message: str) -> InvalidRequestError:
    name = _NAMES[type(grammar)]
    if any(word in message for word in _UNSUPPORTED):
        return UnsupportedError(f"Local models cannot be held to this {name}: {_line(message)}.")
    return InvalidRequestError(f"The {name} cannot be compiled: {_line(message)}.")


def _line(message: str) -> str:
    """What is wrong, in one line of at most 300 characters, without a full stop and without the text around it."""
    reason = re.search(r"^error: (.+)$", message, re.MULTILINE)
    line = reason[1] if reason else message.strip().partition("\n")[0]
    line = " ".join(line.split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:297]}..."
