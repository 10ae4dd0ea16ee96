"""A sequence is one request as an engine sees it: token ids in, how to sample, and how far it has come.

Pure values: no runtime, no clock. Times are seconds and come in from outside; lengths are tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import Request

__all__ = ["Sampling", "SamplingDefaults", "Sequence", "State"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What the model's own generation config says, for whatever a request leaves open.

    ``sample`` False means greedy decoding.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose a sequence's next token. ``temperature`` 0 is greedy; a limit that is None does not apply."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @classmethod
    def of(cls, request: Request, defaults: SamplingDefaults | None = None) -> Sampling:
        """What ``request`` asks for, filled up with the model's ``defaults``.

        ``temperature=0`` is greedy. Without a temperature the model's own generation config decides whether to sample,
        and how; a request that sets top_p, top_k or min_p asks for sampling by that, at temperature 1 where the model
        names none. Raises InvalidRequestError for a value outside of its range.
        """
        defaults = defaults or SamplingDefaults()
        _check(request)
        restricted = request.top_p is not None or request.top_k is not None or request.min_p is not None
        temperature = request.temperature
        if temperature is None:
            temperature = defaults.temperature if defaults.sample or restricted else 0.0
        # The model's limits belong to its own way of sampling: a model that is greedy by default has none.
        fallback = defaults if defaults.sample else SamplingDefaults()
        top_k = fallback.top_k if request.top_k is None else request.top_k
        top_p = fallback.top_p if request.top_p is None else request.top_p
        min_p = fallback.min_p if request.min_p is None else request.min_p
        return cls(
            temperature=float(temperature),
            top_k=top_k or None,
            top_p=None if top_p is None or top_p >= 1.0 else float(top_p),
            min_p=float(min_p) if min_p else None,
            seed=request.seed,
            frequency_penalty=float(request.frequency_penalty or 0.0),
            presence_penalty=float(request.presence_penalty or 0.0),
            logprobs=request.logprobs,
        )


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("top_k", 0, math.inf),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("logprobs", 0, 20),
    ("max_tokens", 1, math.inf),
)


def _check(request: Request) -> None:
    for name, low, high in _RANGES:
        value = getattr(request, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InvalidRequestError(f"{name} must be a number {limits}, not {value!r}.")
        if isinstance(low, int) and not isinstance(value, int):
            raise InvalidRequestError(f"{name} must be a whole number, not {value!r}.")
    if request.top_p == 0.0:
        raise InvalidRequestError("top_p must be above 0: a nucleus of no probability holds no token.")


class State(Enum):
    """Where a sequence is. RUNNING becomes QUEUED again where memory runs out, or for a pause; FINISHED can follow any
    state."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request with the engine. Sequences are told apart by identity."""

    id: str
    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    """0 where nothing is generated."""
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Any = field(default=None, repr=False)
    """What the runner's ``compile_grammar`` made of the request's grammar; None where anything may be said."""
    images: Any = field(default=None, repr=False)
    """What the runner's own ``images`` made of the request's; the prompt has numbers below 0 where they are."""
    scored: tuple[int, ...] = field(default=(), repr=False)
    """The tokens whose log-probabilities are asked for: those that the prompt ends with, and one more behind it. Empty
    where an answer is asked for."""
    ignore_eos: bool = False
    """Whether the answer goes on after a token that would end it."""
    cache_salt: str | None = None
    """Sequences share cached prefixes with those of the same salt alone."""
    agent: str | None = None
    weight: float = 1.0
    """How much of the engine its agent may have, beside an agent of weight 1."""
    priority: int = 0
    pausable: bool = True
    """Whether it may be taken out of the batch for a while: not where somebody reads along."""
    queued_at: float = 0.0
    deadline: float | None = None
    """When nobody waits for it any more."""
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    requeued: int = 0
    """How often it was taken out of the batch because memory ran out."""
    state: State = State.QUEUED
    output: list[int] = field(default_factory=list, repr=False)
    cached: int | None = None
    """How many tokens of the prompt the runner found in its prefix cache; None where it has none."""

    @property
    def reserved(self) -> int:
        """How many tokens of KV memory the sequence may come to need."""
        return len(self.prompt) + self.max_tokens

    @property
    def text(self) -> tuple[int, ...]:
        """All tokens so far: where a sequence that was queued again goes on."""
        return (*self.prompt, *self.output) if self.output else self.prompt

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt) + len(self.output)
