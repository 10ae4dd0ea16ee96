"""What a runtime offers the engine: load, insert, step, remove, reset, close.

Everything here is called on the engine's owner thread and on no other. A runner decides for itself how it prefills and
batches; the engine decides who is in the batch, when a sequence ends, and whom to tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from asyncmodels.local.answer_parser import AnswerParser
from asyncmodels.local.sequence import SamplingDefaults, Sequence
from asyncmodels.types import FinishReason, Grammar, Message

__all__ = [
    "Detokenizes",
    "Ended",
    "Failed",
    "MakesDetokenizers",
    "NativeAnswers",
    "NativeCalls",
    "Output",
    "ReadsImages",
    "Runner",
    "RunnerFactory",
    "RunnerInfo",
    "RunnerLostError",
    "Sampled",
    "Scores",
]


class Detokenizes(Protocol):
    """Turns the tokens of one sequence into text."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, never half a character."""
        ...

    def finish(self) -> str:
        """What is left of the text when no more tokens come."""
        ...


class MakesDetokenizers(Protocol):
    def __call__(self, *, special_tokens: bool = False) -> Detokenizes:
        """``special_tokens`` have a text, too, where they are asked for."""
        ...


@dataclass(frozen=True, slots=True)
class NativeCalls:
    """The parser that a runtime has for the tool calls of its model, and the marks between which they stand.

    ``read`` takes the text between the marks and the tools, in OpenAI's shape, and returns an object with ``name`` and
    ``arguments``, or a list of such; whatever it raises says that the text is no call.
    """

    start: str
    end: str
    read: Callable[[str, list[dict[str, Any]]], Any]


class NativeAnswers(Protocol):
    """The parsers that a runtime has for whole answers of its model."""

    @property
    def calls(self) -> bool:
        """Whether they read tool calls."""
        ...

    @property
    def reasons(self) -> bool:
        """Whether they tell reasoning from content."""
        ...

    @property
    def chosen(self) -> bool:
        """Whether somebody has asked for them by name: then they come before what the tokenizer declares."""
        ...

    def parser(
        self,
        tools: list[dict[str, Any]],
        /,
        *,
        prompt: Rows[int],
        template_kwargs: Mapping[str, Any],
        streaming: bool,
    ) -> AnswerParser:
        """A reader of the answer to ``prompt``, for which the template was told ``template_kwargs``.

        Unless it is ``streaming`` nobody looks at anything before the answer has ended.
        """
        ...


class ReadsImages(Protocol):
    """How the images of a request come into its prompt. Copied for each thread that prepares requests."""

    @property
    def mark(self) -> str:
        """What the chat template writes where an image is."""
        ...

    async def fetched(self, messages: tuple[Message, ...], /) -> tuple[Message, ...]:
        """``messages`` with all images as data. Raises InvalidRequestError."""
        ...

    def written(self, images: list[tuple[str, bytes]], /) -> tuple[list[str], list[Any]]:
        """What stands for each image in the prompt, and what ``pictured`` wants to know of them all.

        The images come with their places in the request. Raises InvalidRequestError for one that cannot be read.
        """
        ...

    def pictured(self, ids: Rows[int], pieces: list[Any], /) -> tuple[tuple[int, ...], Any]:
        """The prompt ``ids`` with the images in it, and what ``Sequence.images`` holds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What the engine must know of a loaded model. Lengths are tokens."""

    tokenizer: Any = field(repr=False)
    """The tokenizer, in the shape of Hugging Face's; the engine copies it before use."""
    detokenizer: MakesDetokenizers = field(repr=False)
    """Makes the detokenizer of one sequence; called and used on the owner thread."""
    context_length: int
    """How long prompt and answer may be together."""
    eos_token_ids: frozenset[int] = frozenset()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    max_tokens: int | None = None
    """How many tokens of KV memory there are for the whole batch; None where the runtime sees to that itself."""
    padded: bool = True
    """Whether every row takes as much KV memory as the longest."""
    max_rows: int | None = None
    """How many sequences the runtime can take at once, where that may be fewer than it is asked to."""
    keeps_tokens: int = 0
    """How many tokens' worth of what was computed for sequences is still there a little later, when they were taken out
    and are put in again."""
    compile_grammar: Callable[[Grammar], Any] | None = field(default=None, repr=False)
    """Turns a grammar into what ``Sequence.constraint`` holds: called on a thread of the front, before the request is
    queued, for each request anew. Raises InvalidRequestError for a grammar that is wrong or too large. None where the
    runtime cannot constrain what it generates."""
    scored_room: int = 0
    """How many tokens more than its prompt a sequence takes that is scored."""
    native_calls: NativeCalls | None = field(default=None, repr=False)
    """How the runtime itself reads the model's tool calls, where the tokenizer does not declare it."""
    native_answers: NativeAnswers | None = field(default=None, repr=False)
    """The same for a runtime that reads whole answers."""
    native_thought: tuple[str, str] | None = None
    """The marks between which the model's reasoning stands, as far as the runtime knows."""
    images: ReadsImages | None = field(default=None, repr=False)
    """How the model is shown images; None where it cannot be."""
    blind: str = "This model does not support images."
    """Why it cannot be."""
    weight_bytes: int = 0
    """How much memory the weights take; 0 where the runtime does not say."""
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


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that the runtime has ended by itself. It follows the last token, which often said as much already."""

    sequence: Sequence
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Scores:
    """What came of a sequence that is scored, which ends with it.

    For each of its ``scored`` tokens there are the natural logarithm of its probability and, as many as were asked for,
    the most likely tokens at its place with theirs, the best first.
    """

    sequence: Sequence
    places: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


Output: TypeAlias = Sampled | Failed | Ended | Scores


class RunnerLostError(Exception):
    """Raised by ``step`` when the runtime cannot be used any more: the engine ends, and loads a new one when asked."""


class Runner(ABC):
    """A runtime with one model."""

    waits: ClassVar[bool] = False
    """Whether the runtime runs by itself, and ``step`` waits for what it has to say. ``step`` is then called with
    nothing in the batch as well, so that the runtime can notice its own end at any time."""
    resumes: ClassVar[bool] = False
    """Whether ``insert`` takes sequences that have some ``output`` already, and goes on behind it."""
    kv_memory: int | None = None
    """How many bytes keys and values may take, those that are kept for later included; set before ``load``. None leaves
    it to the runtime."""

    @abstractmethod
    def load(self) -> RunnerInfo:
        """Loads the model. Raises ModelLoadError, MissingExtraError or UnsupportedError."""

    @abstractmethod
    def insert(self, sequences: Iterable[Sequence], /) -> None:
        """Takes sequences into the batch. Their prompts are worked off by the following steps."""

    @abstractmethod
    def step(self) -> list[Output]:
        """Goes one step forward: the next token of every sequence that decodes, and a bounded piece of prefill.

        A runtime that runs by itself may wait here until there is something to hand out, as long as ``wake`` ends the
        wait, and then hands out all that there is, several tokens of a sequence included. An exception means that the
        whole batch is lost; a RunnerLostError that the runner is, too.
        """

    def wake(self) -> None:  # noqa: B027  # a runtime that runs only when it is stepped never waits
        """Ends a wait inside of ``step``, the present or the next one, because the engine has something to say.

        Called on any thread, at any time from before ``load`` until after ``close``; never blocks.
        """

    def statistics(self) -> Mapping[str, float]:
        """What the runtime counts by itself, under its own names. Called on any thread once the model is loaded."""
        return {}

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
