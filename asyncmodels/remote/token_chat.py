"""Chat completions with tokens that end, or that a server stops accepting."""

from __future__ import annotations

import dataclasses

import httpx2

from asyncmodels.backend import Capabilities
from asyncmodels.errors import AsyncModelsError, AuthenticationError
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.endpoint import Endpoint, Pass
from asyncmodels.remote.pool import HTTPPool
from asyncmodels.remote.tokens import TokenCache
from asyncmodels.remote.wire import Dialect

__all__ = ["TokenChatBackend"]


class TokenChatBackend(ChatBackend):
    """A ChatBackend that shows a token out of ``tokens`` where there are any, and tells them when one is refused."""

    def __init__(
        self,
        model_id: str,
        endpoint: Endpoint,
        *,
        pool: HTTPPool,
        dialect: Dialect,
        tokens: TokenCache | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        super().__init__(model_id, endpoint, pool=pool, dialect=dialect, capabilities=capabilities)
        self._tokens = tokens
        self._remembered: Pass | None = None

    async def _authorized(self) -> Pass:
        if self._tokens is None:
            return await super()._authorized()
        token, reused = await self._tokens.get()
        way = self._remembered
        if way is None or way.secret != token:
            headers = self._endpoint.headers.copy()
            headers["authorization"] = f"Bearer {token}"
            way = self._remembered = Pass(headers, token, reused=True)
        return way if reused else dataclasses.replace(way, reused=False)

    def _refused(self, answer: httpx2.Response, content: bytes, way: Pass) -> AsyncModelsError:
        error = super()._refused(answer, content, way)
        if self._tokens is not None and isinstance(error, AuthenticationError):
            self._tokens.forget(way.secret)
            # A token that was good may have been revoked; one that was issued just now would be refused again.
            error.retryable = way.reused
        return error
