"""OpenAI and every server that speaks its chat-completions API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import httpx2

from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.remote.chain import PolicyLike, remote_chain
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.endpoint import APIKey
from asyncmodels.remote.openai_client import configure
from asyncmodels.remote.options import checked_conversions, checked_options, make_pool, require_model_id, retry_of
from asyncmodels.remote.pool import TransportChoice
from asyncmodels.remote.wire import Dialect
from asyncmodels.request import Parameters

__all__ = ["OpenAIBackend", "OpenAIModel", "OpenAIServerModel"]


class OpenAIModel(Model):
    """A model behind OpenAI's chat-completions API, at OpenAI or at any server that speaks it::

        model = OpenAIModel("gpt-5")                                              # key from OPENAI_API_KEY
        model = OpenAIModel("my-model", api_base="http://localhost:8000/v1", api_key="none")

    ``api_key`` is a string, or a function (sync or async) that is asked before every attempt. ``client_kwargs`` are
    those of ``openai.AsyncOpenAI``; of them ``default_headers``, ``default_query``, ``timeout`` (seconds without a
    byte), ``max_retries`` and ``http_client`` have a meaning here. ``custom_role_conversions`` renames roles on the
    way out, ``flatten_messages_as_text`` sends text parts as one string. ``max_concurrency`` limits the calls in
    flight, ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain, and
    ``defaults`` are parameters of every call.

    Raises MissingKeyError when there is no key, ConfigurationError for anything else that is wrong from the start.
    """

    def __init__(
        self,
        model_id: str,
        api_base: str | None = None,
        api_key: APIKey | None = None,
        organization: str | None = None,
        project: str | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool = False,
        *,
        max_concurrency: int | None = None,
        retry: bool | int | PolicyLike = True,
        policies: Sequence[PolicyLike] | None = None,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        http2: bool = False,
        max_tokens_field: str | None = None,
        **defaults: Unpack[Parameters],
    ) -> None:
        require_model_id("OpenAIModel", model_id, "gpt-5")
        options = checked_options(client_kwargs)
        retry = retry_of(options, retry=retry, policies=policies)
        if not isinstance(max_tokens_field, str | None):
            raise ConfigurationError(f"max_tokens_field must be the name of a field, not {max_tokens_field!r}.")
        pool = make_pool(options, http_client=http_client, transport=transport, http2=http2)
        endpoint = configure(
            api_base=api_base, api_key=api_key, organization=organization, project=project, options=options
        )
        # OpenAI's newer models refuse max_tokens; the servers that copy its API mostly know nothing else.
        official = endpoint.url.host == "api.openai.com"
        dialect = Dialect(
            max_tokens_field=max_tokens_field or ("max_completion_tokens" if official else "max_tokens"),
            role_conversions=checked_conversions(custom_role_conversions),
            flatten_messages=flatten_messages_as_text,
        )
        super().__init__(
            OpenAIBackend(model_id, endpoint, pool=pool, dialect=dialect),
            *remote_chain(max_concurrency=max_concurrency, retry=retry, policies=policies),
            defaults=defaults,
            model_id=model_id,
        )


OpenAIServerModel = OpenAIModel


class OpenAIBackend(ChatBackend):
    """The Backend of ``OpenAIModel``."""
