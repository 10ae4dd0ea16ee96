"""Small things that act like large ones: a tokenizer built in code, and a runner that follows a script."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.engine import Engine
from asyncmodels.local.runner import Output, Runner, RunnerInfo, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.types import Message, Request
from tests.local.tiny import CONTEXT, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@dataclass
class ScriptedRunner(Runner):
    """Answers with the bytes of ``text``, over and over. Steps wait for ``go``; ``before_step`` may raise."""

    text: str = "abcdefghijklmnopqrstuvwxyz"
    context_length: int = CONTEXT
    go: threading.Event = field(default_factory=threading.Event)
    stepping: threading.Event = field(default_factory=threading.Event)
    before_load: Callable[[], None] = lambda: None
    before_step: Callable[[list[Sequence]], None] = lambda _: None
    output: Callable[[Sequence, int], Output] | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        self.go.set()
        self.rows: list[Sequence] = []
        self.seen: list[list[Sequence]] = []
        self.threads: set[str] = set()
        self.resets = 0
        self.closed = 0

    def load(self) -> RunnerInfo:
        self.before_load()
        tokenizer = build_tokenizer()
        self.tokens = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        return RunnerInfo(
            tokenizer=tokenizer,
            detokenizer=make_detokenizer(tokenizer),
            context_length=self.context_length,
            eos_token_ids=frozenset([1]),
            max_tokens=self.kv_tokens,
        )

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        self.rows.extend(sequences)

    def step(self) -> list[Output]:
        self.threads.add(threading.current_thread().name)
        self.stepping.set()
        self.go.wait()
        self.before_step(self.rows)
        self.seen.append(list(self.rows))
        make = self.output or (lambda sequence, token: Sampled(sequence, token))
        return [make(row, self.tokens[len(row.output) % len(self.tokens)]) for row in self.rows]

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        gone = set(sequences)
        self.rows = [row for row in self.rows if row not in gone]

    def reset(self) -> None:
        self.resets += 1
        self.rows.clear()

    def close(self) -> None:
        self.closed += 1
        self.rows.clear()


@pytest.fixture
def runner() -> ScriptedRunner:
    return ScriptedRunner()


@pytest.fixture
def scripted() -> type[ScriptedRunner]:
    return ScriptedRunner


@pytest.fixture
def ask() -> Callable[..., Request]:
    """Makes a Request out of a prompt and fields."""

    def make(prompt: str = "hello", **fields: Any) -> Request:
        return Request(messages=(Message("user", prompt),), **fields)

    return make


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Engine]]:
    """Makes engines over given runners, one after the other, and closes them in the end."""
    engines: list[tuple[Engine, tuple[ScriptedRunner, ...]]] = []

    def make(*runners: ScriptedRunner, **settings: Any) -> Engine:
        lives = iter(runners)
        engine = Engine(lambda: next(lives), model_id="scripted", **settings)
        engines.append((engine, runners))
        return engine

    yield make
    for engine, runners in engines:
        for runner in runners:
            runner.go.set()
        await engine.aclose()
