"""How many tokens a call will take: guessed before it is made, from its size and from how those before turned out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from asyncmodels.errors import AsyncModelsError, ConfigurationError
from asyncmodels.policies.limit_bucket import Amounts
from asyncmodels.types import Message, Request, TextPart, Tool, Usage

__all__ = ["Estimate", "Estimator", "cost_of"]

Estimate: TypeAlias = Callable[[Request], tuple[int, int]]
"""A function that says how many tokens of input and of output a request will take."""

PER_MESSAGE = 4.0
PER_IMAGE = 1000.0
OUTPUT = 512.0
"""Tokens: around each message, of an image, and of an answer as long as nothing is known of the model's answers."""
ASCII, OTHER = 0.25, 0.6
"""Tokens a character: of English and of code; of text with other letters in it, from a few accents to Chinese."""

_MEMORY = 50
"""Calls over which the means run."""
_FACTOR = 0.2, 5.0
"""No more than so far off are the heuristics thought to be."""
_NOISE = 100.0
"""Tokens by which they are off whatever the size; beyond that, in proportion to it."""
_CONSTANT, _RATIO = 1e-7, 4e-3
"""How much speaks against a constant, by its square in tokens, and a ratio other than 1, by the square of the
difference: so little that a few calls outweigh it, and so that what tiny prompts have more is taken for a constant."""
_MOST_TOOLS = 64


class Estimator:
    """Guesses the input from the lengths of the texts, and the output from ``max_tokens`` and the mean of the answers.

    How far the guesses of the input are off is learned from what the provider counts, and put right from then on: by a
    number of tokens that each request has more, such as a chat template's, and a ratio. They are the line of least
    squares through the latest calls, in which a large one may be off by more than a small one.
    """

    def __init__(self, estimate: Estimate | None = None) -> None:
        self._estimate = estimate
        self._constant, self._ratio = 0.0, 1.0
        self._sums = 0.0, 0.0, 0.0, 0.0, 0.0
        self._output = OUTPUT
        self._outputs = 0
        self._tools: dict[int, tuple[tuple[Tool, ...], float]] = {}

    def cost(self, request: Request, size: float) -> Amounts:
        """What a call of this ``size`` is reserved for."""
        if self._estimate is not None:
            return _told(self._estimate, request)
        return cost_of(self._constant + size * self._ratio, self._answer(request))

    def least(self, request: Request, size: float) -> Amounts:
        """What a call of this ``size`` takes at least, as far as that is known without what was learned of others."""
        if self._estimate is not None:
            return _told(self._estimate, request)
        given = min(size, self._constant + size * self._ratio)
        return cost_of(given, 0.0 if request.max_tokens is None else self._answer(request))

    def learn(self, size: float, usage: Usage) -> None:
        """Takes what the provider counted for a call of this ``size`` into the means."""
        if self._estimate is not None:
            return
        self._outputs = min(self._outputs + 1, _MEMORY)
        self._output += (usage.output_tokens - self._output) / self._outputs
        if usage.input_tokens > 0 and size > 0:
            self._fit(size, usage.input_tokens)

    def _fit(self, size: float, tokens: float) -> None:
        kept, weight = 1 - 1 / _MEMORY, (_NOISE + size) ** -2
        n, x, y, xx, xy = self._sums
        n, x, y = n * kept + weight, x * kept + weight * size, y * kept + weight * tokens
        xx, xy = xx * kept + weight * size * size, xy * kept + weight * size * tokens
        self._sums = n, x, y, xx, xy
        # The minimum of the sum of squares, with what speaks against each of the two.
        a, b, c = n + _CONSTANT, xx + _RATIO, xy + _RATIO
        constant = (y * b - x * c) / (a * b - x * x)
        low, high = _FACTOR
        ratio = min(max((c - max(constant, 0.0) * x) / b, low), high)
        self._constant, self._ratio = max((y - ratio * x) / a, 0.0), ratio

    def _answer(self, request: Request) -> float:
        most = request.max_tokens if request.score is None else 1
        if most is None:
            return self._output
        return float(most) if not self._outputs else min(float(most), self._output)

    def size(self, request: Request) -> float:
        """The input in tokens as the heuristics have it."""
        if self._estimate is not None:
            return 0.0
        size = 0.0
        for message in request.messages:
            content = message.content
            if type(content) is str:
                size += PER_MESSAGE + len(content) * (ASCII if content.isascii() else OTHER)
            else:
                size += PER_MESSAGE + _parts(message)
            if message.tool_calls:
                size += sum(PER_MESSAGE + _text(call.name) + _text(call.arguments) for call in message.tool_calls)
        if request.tools:
            size += self._size_of_tools(request.tools)
        if request.response_format is not None and request.response_format.schema is not None:
            size += _written(request.response_format.schema)
        if request.score is not None:
            for given in (request.score.prompt, request.score.continuation):
                size += _text(given) if isinstance(given, str) else len(given or ())
        return size

    def _size_of_tools(self, tools: tuple[Tool, ...]) -> float:
        # An agent sends the same tools with each request; they are held here, so that no other gets their id.
        known = self._tools.get(id(tools))
        if known is not None:
            return known[1]
        size = sum(
            PER_MESSAGE + _text(tool.name) + _text(tool.description) + _written(tool.parameters) for tool in tools
        )
        if len(self._tools) >= _MOST_TOOLS:
            self._tools.clear()
        self._tools[id(tools)] = tools, size
        return size


def cost_of(given: float, answer: float, cached: float = 0.0) -> Amounts:
    """One request with so much input, of which the provider has ``cached`` some, and output.

    Those who limit input and output apart, Anthropic and Bedrock, do not count what they have in their cache.
    """
    return 1.0, given + answer, given - cached, answer


def _text(text: str) -> float:
    return len(text) * (ASCII if text.isascii() else OTHER)


def _parts(message: Message) -> float:
    size = 0.0
    for part in message.content or ():
        # Of a file or a video nobody can tell.
        size += _text(part.text) if isinstance(part, TextPart) else PER_IMAGE
    return size


def _written(value: Any) -> float:
    try:
        return len(json.dumps(value, default=_plain)) * ASCII
    except (TypeError, ValueError, RecursionError):
        return PER_IMAGE


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _told(estimate: Estimate, request: Request) -> Amounts:
    try:
        given, answer = map(float, estimate(request))
    except AsyncModelsError:
        raise
    except Exception as error:
        raise ConfigurationError(
            "RateLimit(estimate=...) is a function of a Request that returns two numbers, of tokens of input and of "
            f"output; it failed with a {type(error).__name__}."
        ) from error
    if not (0 <= given < 1e15 and 0 <= answer < 1e15):
        raise ConfigurationError("RateLimit(estimate=...) must return numbers of tokens that are not negative.")
    return cost_of(given, answer)
