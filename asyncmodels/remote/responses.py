"""The Responses API over the pool, at OpenAI or at any server that speaks it."""

from __future__ import annotations

from typing import Any

from asyncmodels.remote.answer import Read
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.responses_read import EventReader, response_from_responses
from asyncmodels.remote.responses_wire import responses_body
from asyncmodels.types import Request

__all__ = ["RESPONSES_SAMPLING", "ResponsesBackend"]

RESPONSES_SAMPLING = frozenset({"temperature", "top_p", "max_tokens"})
"""What the API has fields for."""


class ResponsesBackend(ChatBackend):
    """One endpoint that speaks the Responses API, one model, no policy.

    It has no stop sequences: they are cut from the answer here, and a stream ends where the first is found.
    """

    capabilities = capabilities_of(Quirks(), sampling=RESPONSES_SAMPLING)
    _read: Read = staticmethod(response_from_responses)
    _reader = EventReader

    def _fields(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return responses_body(request, self.model_id, self._dialect, stream=stream)
