"""What a runtime offers the engine: load, insert, step, remove, reset, close.

Everything here is called on the engine's owner thread and on no other. A runner decides for itself how it prefills and
batches; the engine decides who is in the batch, when a sequence ends, and whom to tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from asyncmodels.local.sequence import SamplingDefaults, Sequence

__all__ = ["Detokenizes", "Failed", "Output", "Runner", "RunnerFactory", "RunnerInfo", "Sampled"]


class Detokenizes(Protocol):
    """Turns the tokens of one sequence into text."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, never half a character."""
        ...

    def finish(self) -> str:
        """What is left of the text when no more tokens come."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What the engine must know of a loaded model. Lengths are tokens."""

    tokenizer: Any = field(repr=False)
    """The tokenizer, in the shape of Hugging Face's; the engine copies it before use."""
    detokenizer: Callable[[], Detokenizes] = field(repr=False)
    """Makes the detokenizer of one sequence; called and used on the owner thread."""
    context_length: int
    """How long prompt and answer may be together."""
    eos_token_ids: frozenset[int] = frozenset()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    max_tokens: int | None = None
    """How many tokens of KV memory there are for the whole batch; None where the runtime sees to that itself."""
    padded: bool = True
    """Whether every row takes as much KV memory as the longest."""
    device: str = "cpu"
    dtype: str = ""
    """Where the model runs and in which precision, for ``statistics()``."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a sequence; with the natural logarithm of its probability where that was asked for."""

    sequence: Sequence
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that cannot go on, alone; the others do."""

    sequence: Sequence
    error: Exception


Output: TypeAlias = Sampled | Failed


class Runner(ABC):
    """A runtime with one model."""

    @abstractmethod
    def load(self) -> RunnerInfo:
        """Loads the model. Raises ModelLoadError, MissingExtraError or UnsupportedError."""

    @abstractmethod
    def insert(self, sequences: Iterable[Sequence], /) -> None:
        """Takes sequences into the batch. Their prompts are worked off by the following steps."""

    @abstractmethod
    def step(self) -> list[Output]:
        """Goes one step forward: at most one token for every sequence that decodes, and a bounded piece of prefill.

        An exception means that the whole batch is lost.
        """

    @abstractmethod
    def remove(self, sequences: Iterable[Sequence], /) -> None:
        """Takes sequences out of the batch, in whatever state they are; unknown ones are ignored."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets every sequence after a step has raised; the weights stay."""

    @abstractmethod
    def close(self) -> None:
        """Releases everything, the weights included. Closing twice is allowed."""


RunnerFactory: TypeAlias = Callable[[], Runner]
