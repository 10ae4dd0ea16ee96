"""Measures a model: so many requests at once, each watched from its beginning to its last token."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from asyncmodels.errors import AsyncModelsError
from asyncmodels.model import Model
from asyncmodels.types import Response

__all__ = ["Asking", "Level", "measured", "quantile"]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request, in seconds from when it was sent."""

    first: float
    last: float
    latency: float
    tokens: int
    input_tokens: int
    told: bool
    """Whether the provider said how many tokens there were; else they are pieces of the stream."""


@dataclass(slots=True)
class Level:
    """What was measured at one concurrency; times are seconds."""

    concurrency: int
    seconds: float = 0.0
    answers: list[Answered] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """What one error of each name said."""

    @property
    def first_tokens(self) -> list[float]:
        return [answer.first for answer in self.answers]

    @property
    def per_token(self) -> list[float]:
        """For each answer that came in more than one piece, the mean time of the tokens after the first."""
        return [
            (answer.last - answer.first) / (answer.tokens - 1)
            for answer in self.answers
            if answer.tokens > 1 and answer.last > answer.first
        ]

    @property
    def latencies(self) -> list[float]:
        return [answer.latency for answer in self.answers]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_told(self) -> bool:
        return all(answer.told for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def requests_per_second(self) -> float:
        return len(self.answers) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "concurrency": self.concurrency,
            "requests": len(self.answers) + self.errors.total(),
            "errors": dict(self.errors),
            "seconds": self.seconds,
            "requests_per_second": self.requests_per_second,
            "tokens_per_second": self.tokens_per_second,
            "output_tokens": self.tokens,
            "input_tokens": sum(answer.input_tokens for answer in self.answers),
            "tokens_told": self.tokens_told,
            "first_token": _quantiles(self.first_tokens),
            "per_token": _quantiles(self.per_token),
            "latency": _quantiles(self.latencies),
        }


class Asking:
    """Asks ``prompt``, each time another one unless ``same``."""

    def __init__(self, prompt: str, params: Mapping[str, Any], *, same: bool) -> None:
        self._prompt = prompt
        self._params = dict(params)
        self._same = same
        self._numbers = count(1)

    async def once(self, model: Model) -> Answered:
        prompt = self._prompt if self._same else f"{next(self._numbers)}. {self._prompt}"
        started = time.perf_counter()
        if not model.capabilities.stream:
            response = await model.generate(prompt, **self._params)
            ended = time.perf_counter() - started
            return _answered(response, ended, ended, ended, 1)
        first = last = None
        pieces = 0
        async with model.stream(prompt, **self._params) as stream:
            async for delta in stream:
                if delta.content or delta.reasoning or delta.tool_calls:
                    last = time.perf_counter() - started
                    first = last if first is None else first
                    pieces += 1
            ended = time.perf_counter() - started
            response = await stream.response()
        return _answered(response, ended if first is None else first, ended if last is None else last, ended, pieces)


async def measured(model: Model, asking: Asking, concurrency: int, requests: int) -> Level:
    """``requests`` of them, ``concurrency`` at once. Errors of the model are counted."""
    level = Level(concurrency)
    left = iter(range(requests))
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, requests)):
                group.create_task(_work(model, asking, left, level))
    finally:
        level.seconds = time.perf_counter() - started
    return level


async def _work(model: Model, asking: Asking, left: Iterator[int], level: Level) -> None:
    for _ in left:
        try:
            level.answers.append(await asking.once(model))
        except AsyncModelsError as error:
            name = type(error).__name__
            level.errors[name] += 1
            level.examples.setdefault(name, str(error))


def _answered(response: Response, first: float, last: float, ended: float, pieces: int) -> Answered:
    usage = response.usage
    if usage is None:
        return Answered(first, last, ended, pieces, 0, False)
    return Answered(first, last, ended, usage.output_tokens, usage.input_tokens, True)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The nearest of ``values`` below which ``share`` of them lie; None where there are none."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    mean = sum(values) / len(values) if values else None
    return {"mean": mean, "p50": quantile(values, 0.5), "p95": quantile(values, 0.95), "p99": quantile(values, 0.99)}
