"""One request on its way through an engine: the job on the owner thread, and the handle on the caller's event loop.

The handle, not the engine, sees to it that a request ends exactly once: what comes after its end is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from asyncmodels.errors import ConfigurationError
from asyncmodels.local.answer_parser import AnswerParser, Pieces
from asyncmodels.local.gate import Ticket
from asyncmodels.local.runner import Detokenizes, Sampled, Scores
from asyncmodels.local.sequence import Sequence
from asyncmodels.stopping import StopMatcher
from asyncmodels.types import Delta, FinishReason, TokenLogprob, ToolCallDelta

__all__ = ["Handle", "Job"]


class Handle(AsyncIterator[Delta]):
    """The caller's end: an iterator of Deltas that belongs to one event loop and one reader.

    Deltas that nobody reads are merged into one, so a slow reader costs no more than the text itself.
    """

    def __init__(self, id: str, on_cancel: Callable[[], None]) -> None:
        self.id = id
        self.loop = asyncio.get_running_loop()
        self._on_cancel = on_cancel
        self._pending: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._ended = False

    async def begun(self) -> None:
        """Waits for the first delta. Raises what ended the request before it."""
        await self._wait()
        if self._error is not None and not self._pending:
            raise self._error

    async def __anext__(self) -> Delta:
        await self._wait()
        if self._pending:
            pending, self._pending = self._pending, []
            return pending[0] if len(pending) == 1 else _merge(pending)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Gives the request up. Does nothing once it has ended; never blocks."""
        if not self._ended:
            self._ended = True
            self._on_cancel()

    # -- called on the handle's loop ----------------------------------------------------------------------------------

    def deliver(self, delta: Delta, last: bool) -> None:
        if not self._ended:
            self._pending.append(delta)
            self._ended = last
            self._wake()

    def fail(self, error: Exception) -> None:
        if not self._ended:
            self._error = error
            self._ended = True
            self._wake()

    async def _wait(self) -> None:
        if self._pending or self._ended:
            return
        if self._waiter is not None:
            raise ConfigurationError("An answer is read by one task at a time.")
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        content="".join([delta.content for delta in deltas]),
        reasoning="".join([delta.reasoning for delta in deltas]),
        tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        model=last.model,
        id=last.id,
        timing=last.timing,
    )


@dataclass(slots=True, eq=False)
class Job:
    """The engine's end of one request. Only the owner thread touches it once it was sent there."""

    sequence: Sequence
    handle: Handle
    ticket: Ticket
    stops: StopMatcher
    streaming: bool
    parser: AnswerParser | None = None
    """Tells reasoning and tool calls from content; None where all of the text is content."""
    detokenizer: Detokenizes | None = None
    reasoning_tokens: int | None = None
    """Tokens of the reasoning and its marks; None for a model that does not reason, as far as is known."""
    calls: int = 0
    """Tool calls so far."""
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _tool_calls: list[ToolCallDelta] = field(default_factory=list)
    _logprobs: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)
    """Log-probabilities that nobody has yet, each with the place where the token's text begins."""
    _decoded: int = 0
    """Characters that the tokens so far stand for."""
    _emitted: int = 0
    """Those of them that belong to the answer for certain: no stop sequence can cut them off any more."""
    _complete: bool = False
    """Whether the text has ended, and with the last of the tokens instead of at a stop sequence."""

    def take(
        self, output: Sampled, eos_token_ids: frozenset[int], token_text: Callable[[int], str]
    ) -> FinishReason | None:
        """Adds a token, already noted in the sequence, to the text. Returns why the request ends here, if it does."""
        assert self.detokenizer is not None  # noqa: S101  # the worker makes it when the sequence starts
        if output.logprob is not None:
            top = tuple((token_text(token), logprob) for token, logprob in output.top)
            entry = TokenLogprob(token_text(output.token), output.logprob, top)
            self._logprobs.append((self._decoded, entry))
        reasoned = self.parser is not None and bool(self.parser.reasoning)
        reason: FinishReason | None = None
        if output.token in eos_token_ids and not self.sequence.ignore_eos:
            reason = "stop"
        else:
            if self.parser is not None:
                self.parser.note(output.token)
            self._emit(self.detokenizer.push(output.token))
            if len(self.sequence.output) >= self.sequence.max_tokens:
                reason = "length"
        if self.parser is not None and self.parser.reasoning is not None:
            # The marks count as well: a token is of the reasoning when it begins in it or ends in it.
            self.reasoning_tokens = (self.reasoning_tokens or 0) + (reasoned or self.parser.reasoning)
        return reason if reason is None and not self.stops.matched else self.end(reason or "stop")

    def score(self, output: Scores, token_text: Callable[[int], str]) -> None:
        """Takes the log-probabilities of what was to be scored, which is all that there is to say."""
        for token, (logprob, top) in zip(self.sequence.scored, output.places, strict=True):
            best = tuple((token_text(other), value) for other, value in top)
            self._logprobs.append((0, TokenLogprob(token_text(token), logprob, best)))
        self._complete = True

    def end(self, reason: FinishReason) -> FinishReason:
        """Ends the text after the last token. Returns why it ends: at a stop sequence, if one is in it."""
        assert self.detokenizer is not None  # noqa: S101  # as above
        if not self.stops.matched:
            self._emit(self.detokenizer.finish())
            self._keep(self.stops.flush())
            self._complete = not self.stops.matched
        if self.parser is not None:
            self._sort(self.parser.finish())
        if self.stops.matched or reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return reason

    def drain(self) -> Delta | None:
        """What came since the last time, with the log-probabilities of the tokens whose text begins in it; or None.

        When the text was cut at a stop sequence, those of the tokens that were cut off as a whole never come.
        """
        logprobs: list[TokenLogprob] = []
        while self._logprobs and (self._complete or self._logprobs[0][0] < self._emitted):
            logprobs.append(self._logprobs.popleft()[1])
        if not (self._text or self._reasoning or self._tool_calls or logprobs):
            return None
        delta = Delta(
            content="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._tool_calls),
            logprobs=tuple(logprobs),
        )
        self._text, self._reasoning, self._tool_calls = [], [], []
        return delta

    def _emit(self, text: str) -> None:
        if text:
            self._decoded += len(text)
            self._keep(self.stops.push(text))

    def _keep(self, text: str) -> None:
        if text:
            self._emitted += len(text)
            if self.parser is None:
                self._text.append(text)
            else:
                self._sort(self.parser.feed(text))

    def _sort(self, pieces: Pieces) -> None:
        if pieces.content:
            self._text.append(pieces.content)
        if pieces.reasoning:
            self._reasoning.append(pieces.reasoning)
        if pieces.reasoning_tokens is not None:
            self.reasoning_tokens = pieces.reasoning_tokens
        self._tool_calls += pieces.calls
        self.calls += len(pieces.calls)
