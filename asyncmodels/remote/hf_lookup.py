"""What a provider calls a model: asked of the Hub at the first call, once for all that wait, and then remembered."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import quote
from weakref import WeakKeyDictionary

import httpx2
import orjson
from anyio import to_thread
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import InferenceProviderMapping, ModelInfo
from huggingface_hub.inference._providers._common import TaskProviderHelper

from asyncmodels import __version__
from asyncmodels.errors import (
    AsyncModelsError,
    InvalidResponseError,
    NotFoundError,
    TransportError,
    UnsupportedError,
)
from asyncmodels.remote.answer import without
from asyncmodels.remote.hf_routing import OwnHeaders, Route, helpers_route
from asyncmodels.remote.pool import HTTPPool
from asyncmodels.remote.status import error_from_response
from asyncmodels.remote.tokens import TokenCache

__all__ = ["HubToken", "Lookup", "ask_helper"]

HubToken: TypeAlias = str | TokenCache | None

logger = logging.getLogger(__name__)

_KNOWN: dict[tuple[str, str, str], InferenceProviderMapping] = {}
"""By Hub, model and provider, for the life of the process, as huggingface_hub does it; no failure is kept."""


class Lookup:
    """What ``provider`` calls ``model_id``.

    ``token`` is a Hugging Face token, a cache of the one that was found, or None; a provider's own key is nothing to
    show to the Hub. The request goes through ``pool``: it can be cancelled, ends by the pool's time limits, and fails
    with errors of ours.
    """

    def __init__(self, model_id: str, provider: str, *, token: HubToken, pool: HTTPPool) -> None:
        self._model_id = model_id
        self._provider = provider
        self._token = token
        self._pool = pool
        self._key = (constants.ENDPOINT, model_id, provider)
        self._flights: WeakKeyDictionary[asyncio.AbstractEventLoop, _Flight] = WeakKeyDictionary()

    @property
    def known(self) -> InferenceProviderMapping | None:
        """The answer where the Hub has given it before."""
        return _KNOWN.get(self._key)

    async def mapping(self) -> InferenceProviderMapping:
        """The answer. Raises NotFoundError for a model that does not exist or is not served by this provider."""
        if self.known is not None:
            return self.known
        loop = asyncio.get_running_loop()
        flight = self._flights.get(loop)
        if flight is None or flight.task.done():
            flight = self._flights[loop] = _Flight(loop.create_task(self._ask()))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except AsyncModelsError as error:
            # Each of those who waited writes into the error that it gets.
            raise copy.copy(error) from error.__cause__
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                flight.task.cancel()
                if self._flights.get(loop) is flight:
                    del self._flights[loop]

    async def _ask(self) -> InferenceProviderMapping:
        async with _shown(self._token) as token:
            return await self._ask_with(token)

    async def _ask_with(self, token: str | None) -> InferenceProviderMapping:
        base, model_id, provider = self._key
        url = httpx2.URL(f"{base}/api/models/{quote(model_id)}?expand=inferenceProviderMapping")
        headers = httpx2.Headers({"user-agent": f"asyncmodels/{__version__}", "accept": "application/json"})
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        answer = await self._pool.request("GET", url, headers=headers)
        if not answer.is_success:
            error = error_from_response(answer.status_code, answer.headers, answer.content)
            raise self._told(without(token, error))
        mapping = self._chosen(_mappings(answer.content))
        if mapping.status in ("staging", "error"):
            logger.warning("%s says that %r at %s has status %r.", base, model_id, provider, mapping.status)
        _KNOWN[self._key] = mapping
        return mapping

    def _told(self, error: AsyncModelsError) -> AsyncModelsError:
        error.message = f"The Hub was asked where {self._model_id!r} is served. {error.message}"
        error.args = (error.message,)
        return error

    def _chosen(self, mappings: list[InferenceProviderMapping]) -> InferenceProviderMapping:
        for mapping in mappings:
            if mapping.provider == self._provider:
                if mapping.task == "conversational":
                    return mapping
                raise UnsupportedError(
                    f"{self._model_id!r} is no chat model at {self._provider}: it is there for {mapping.task}."
                )
        others = ", ".join(mapping.provider for mapping in mappings if mapping.task == "conversational")
        raise NotFoundError(f"{self._model_id!r} is not served by {self._provider}, but by {others or 'no provider'}.")


@asynccontextmanager
async def _shown(token: HubToken) -> AsyncIterator[str | None]:
    """What to show to the Hub in the block, whose AuthenticationError makes a found token be looked for again."""
    if isinstance(token, TokenCache):
        async with token.shown() as found:
            yield found
    else:
        yield token


class _Flight:
    """One question under way, and how many wait for the answer."""

    def __init__(self, task: asyncio.Task[InferenceProviderMapping]) -> None:
        self.task = task
        self.waiting = 0


async def ask_helper(
    helper: TaskProviderHelper, model_id: str, token: str, own: OwnHeaders, tokens: TokenCache | None
) -> Route:
    """The route of a helper that does its own asking, over its own HTTP, in a worker thread, with ``token`` or, where
    that was found and not given, with one out of ``tokens``.

    Cancelling stops the waiting; the thread ends when its HTTP does.
    """
    if tokens is None:
        return await _ask_helper(helper, model_id, token, own)
    async with tokens.shown() as found:
        return await _ask_helper(helper, model_id, found, own)


async def _ask_helper(helper: TaskProviderHelper, model_id: str, token: str, own: OwnHeaders) -> Route:
    try:
        return await to_thread.run_sync(helpers_route, helper, model_id, token, own, abandon_on_cancel=True)
    except HfHubHTTPError as error:
        answer = error.response
        raise without(token, error_from_response(answer.status_code, answer.headers, answer.content)) from error
    except ValueError as error:
        raise NotFoundError(f"{model_id!r} cannot be asked for at {helper.provider}: {error}") from error
    except Exception as error:  # of whichever HTTP client this version of huggingface_hub stands on
        raise TransportError(f"huggingface_hub could not ask about {model_id!r}: {type(error).__name__}.") from error


def _mappings(content: bytes) -> list[InferenceProviderMapping]:
    try:
        data = orjson.loads(content)
        untyped: Any = ModelInfo
        info: ModelInfo = untyped(id=data["id"], inferenceProviderMapping=data.get("inferenceProviderMapping"))
        return info.inference_provider_mapping or []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidResponseError("What the Hub says about the model is not what it should be.") from error
