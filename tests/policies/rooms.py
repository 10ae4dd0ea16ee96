"""A backend that is told, call by call, when to answer; and short ways to ask it through a policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.types import Delta, Message, Request, Response


def ask(text: str = "Hi", priority: int = 0, agent: str | None = None) -> Request:
    return Request(messages=(Message("user", text),), priority=priority, agent=agent)


class Rooms(Backend):
    """A backend in which each call stays until it is told, by its text, to leave."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.inside: dict[str, asyncio.Future[Response]] = {}
        self.entered: list[str] = []

    async def generate(self, request: Request, /) -> Response:
        text = request.messages[0].text
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.inside[text] = future
        self.entered.append(text)
        try:
            return await future
        finally:
            del self.inside[text]

    def leave(self, text: str) -> None:
        self.inside[text].set_result(Response(content=text, finish_reason="stop"))

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        raise NotImplementedError

    async def aclose(self) -> None: ...


def start(policy: Concurrency, text: str, priority: int = 0, agent: str | None = None) -> asyncio.Task[Response]:
    return asyncio.create_task(policy.generate(ask(text, priority, agent)))


def state(policy: Concurrency) -> tuple[int, int, int]:
    now = policy.statistics()
    return now.running, now.waiting, now.completed
