"""Bedrock API keys, where botocore asks for them: one that is given, or a function that is asked for one."""

from __future__ import annotations

from contextvars import ContextVar

from botocore.tokens import FrozenAuthToken

from asyncmodels.remote.bedrock_secrets import Secrets
from asyncmodels.remote.tokens import TokenCache, TokenProvider

__all__ = ["GivenKey", "KeySource", "NoCredentials"]


class GivenKey:
    """botocore's provider of a token that never changes."""

    def __init__(self, token: str) -> None:
        self._token = token

    def load_token(self, **_: object) -> FrozenAuthToken:
        return FrozenAuthToken(self._token)


# The key that the current task showed last: whose, which, and whether it was remembered from before.
_SHOWN: ContextVar[tuple[KeySource, str, bool] | None] = ContextVar("_SHOWN", default=None)


class KeySource:
    """botocore's provider of a token, and the token itself, which each request asks for what it shows.

    ``provider`` is asked as a ``TokenCache`` asks it. Whatever it gives is kept out of logs and errors by ``secrets``.
    """

    def __init__(self, provider: TokenProvider, secrets: Secrets) -> None:
        self._tokens = TokenCache(provider, name="The api_key function")
        self._secrets = secrets

    def load_token(self, **_: object) -> KeySource:
        return self

    async def get_frozen_token(self) -> FrozenAuthToken:
        token, reused = await self._tokens.get()
        _SHOWN.set((self, token, reused))
        self._secrets.add(token)
        return FrozenAuthToken(token)

    def refused(self) -> bool:
        """Forgets the key that this task showed; returns whether it was an older one, so that a new one may do."""
        shown = _SHOWN.get()
        if shown is None or shown[0] is not self:
            return False
        self._tokens.forget(shown[1])
        return shown[2]


class NoCredentials:
    """Where botocore asks for credentials that nobody needs: it would ask the network for them."""

    async def load_credentials(self) -> None:
        return None
