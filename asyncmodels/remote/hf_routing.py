"""Where Hugging Face serves a model, and how that provider wants to be asked.

huggingface_hub is the authority: its table of providers says URL, headers and spelling of the body. Its helpers are
asked once per model for what stays the same; of a request, only the parameters pass through them, because taking the
whole conversation apart and putting it together again costs as much as sending it.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import httpx2
from huggingface_hub import constants
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import TaskProviderHelper

from asyncmodels.errors import ConfigurationError
from asyncmodels.remote.endpoint import Endpoint, headers_with

__all__ = [
    "Route",
    "endpoint_route",
    "helper_of",
    "helpers_route",
    "provider_route",
    "router_route",
    "same_name",
    "who_knows",
]

_TASK = "conversational"
_TGI = "tgi"
# Stands for a key where none may be sent: without one, the helper would look for the user's own and use that.
_NO_KEY = "none"

Fields: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[list[Any], Fields], Any]
"""A helper's ``prepare_request`` for messages and parameters; gives a RequestParameters."""
OwnHeaders: TypeAlias = Mapping[str, str | None]
"""What the user wants sent, by names in small letters; None leaves a header out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where requests for one model go, what it is called there, and how their body is spelt."""

    endpoint: Endpoint
    model: str
    spell: Callable[[Fields], Fields] = field(repr=False)
    """Takes a body of chat completions and gives the provider's; may change what it takes."""


def router_route(model_id: str, token: str, own: OwnHeaders) -> Route:
    """Through the router of Hugging Face, which chooses the provider: ``org/model``, or ``org/model:provider``."""
    if not token.startswith("hf_"):
        raise ConfigurationError(
            "The router of Hugging Face needs a Hugging Face token (hf_...); with a provider's own key, "
            "name the provider: provider='together'."
        )
    url = httpx2.URL(constants.INFERENCE_PROXY_TEMPLATE.format(provider="v1") + "/chat/completions")
    headers = headers_with({}, {"authorization": f"Bearer {token}", **own})
    return Route(endpoint=Endpoint(url=url, headers=headers, secret=token), model=model_id, spell=_without_null_content)


def endpoint_route(url: str, model_id: str | None, token: str | None, own: OwnHeaders) -> Route:
    """To an endpoint of one's own or a TGI server at ``url``; a TGI server serves one model and calls it "tgi"."""
    mapping = _mapping("hf-inference", url, url)
    route = _route(helper_of("hf-inference"), mapping, model=model_id or _TGI, token=token, own=own)
    return replace(route, spell=_for_any_server(route.spell))


def provider_route(helper: TaskProviderHelper, mapping: InferenceProviderMapping, token: str, own: OwnHeaders) -> Route:
    """To one provider, which calls the model as ``mapping`` says: through Hugging Face, or directly with its own key.

    Raises ConfigurationError when the provider does not take this kind of key.
    """
    return _route(helper, mapping, model=mapping.provider_id, token=token, own=own)


def helpers_route(helper: TaskProviderHelper, model_id: str, token: str, own: OwnHeaders) -> Route:
    """As ``helper`` alone knows it. Blocks for the HTTP of its own, which it does once per model; for a thread.

    Raises what the helper raises.
    """
    ask = _asking(helper, model_id, token)
    asked = ask([], {"model": model_id})
    return Route(endpoint=_endpoint(asked, token, own), model=model_id, spell=_in_full(ask))


# -- the table of huggingface_hub --------------------------------------------------------------------------------------


def helper_of(provider: str) -> TaskProviderHelper:
    """huggingface_hub's own knowledge of ``provider``; raises ConfigurationError for one that has no chat."""
    table = {str(name): tasks for name, tasks in PROVIDERS.items()}
    tasks = table.get(provider)
    if tasks is not None and _TASK in tasks:
        return tasks[_TASK]
    chatting = sorted(name for name, tasks in table.items() if _TASK in tasks)
    if tasks is not None:
        raise ConfigurationError(f"The provider {provider!r} has no chat models; those that have: {_listed(chatting)}.")
    close = difflib.get_close_matches(provider, chatting, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are 'auto', {_listed(chatting)}."
    raise ConfigurationError(f"Unknown provider {provider!r}: {hint}")


def who_knows(helper: TaskProviderHelper) -> Literal["hub", "everyone", "helper"]:
    """Who knows what the provider calls a model: the Hub, as for most of them; everyone, where the name is its own; or
    nobody but the helper, where a version of huggingface_hub does what none did when this was written.
    """
    step = getattr(type(helper), "_prepare_mapping_info", None)
    if step is not None and step is getattr(TaskProviderHelper, "_prepare_mapping_info", None):
        return "hub"
    return "everyone" if step is not None and helper.provider in ("hf-inference", "openai") else "helper"


def same_name(provider: str, model_id: str) -> InferenceProviderMapping:
    """For a provider that calls a model by the name which it has anyway."""
    return _mapping(provider, model_id, model_id)


def _mapping(provider: str, model_id: str, name: str) -> InferenceProviderMapping:
    untyped: Any = InferenceProviderMapping
    mapping: InferenceProviderMapping = untyped(
        provider=provider, hf_model_id=model_id, providerId=name, status="live", task=_TASK
    )
    return mapping


def _route(
    helper: TaskProviderHelper, mapping: InferenceProviderMapping, *, model: str, token: str | None, own: OwnHeaders
) -> Route:
    # A copy whose step of finding the model is done already; as it is, that step is blocking HTTP.
    settled: Any = copy.copy(helper)
    settled._prepare_mapping_info = lambda _model: mapping
    ask = _asking(settled, mapping.hf_model_id, token)
    try:
        asked = ask([], {"model": model})
    except ValueError as error:
        raise ConfigurationError(f"The provider {helper.provider!r} cannot be asked: {error}") from error
    return Route(endpoint=_endpoint(asked, token, own), model=model, spell=_speller(settled, mapping, ask))


def _asking(helper: Any, model_id: str, token: str | None) -> Ask:
    def ask(messages: list[Any], parameters: Fields) -> Any:
        return helper.prepare_request(
            inputs=messages, parameters=parameters, headers={}, model=model_id, api_key=token or _NO_KEY
        )

    return ask


def _endpoint(asked: Any, token: str | None, own: OwnHeaders) -> Endpoint:
    provided = {name.lower(): value for name, value in asked.headers.items()}
    authorization = {"authorization": provided["authorization"]} if token and "authorization" in provided else {}
    headers = headers_with(provided, {**authorization, **own})
    return Endpoint(url=httpx2.URL(asked.url), headers=headers, secret=token)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


# -- the spelling of a body --------------------------------------------------------------------------------------------


def _in_full(ask: Ask) -> Callable[[Fields], Fields]:
    """A body that goes through the helper with all that it holds."""

    def spell(body: Fields) -> Fields:
        messages = body.pop("messages")
        spelt: Fields = ask(messages, body).json
        return spelt

    return spell


def _speller(settled: Any, mapping: InferenceProviderMapping, ask: Ask) -> Callable[[Fields], Fields]:
    """A body of which only the parameters go through the helper, where that can be told to make no difference."""
    step = getattr(settled, "_prepare_payload_as_dict", None)
    if step is None or not _leaves_the_rest(step, mapping, ask):
        return _in_full(ask)

    def spell(body: Fields) -> Fields:
        messages, tools = _without_null_content(body).pop("messages"), body.pop("tools", None)
        _keep_schema(body)
        spelt: Fields = step([], body, mapping)
        spelt["messages"] = messages
        if tools is not None:
            spelt["tools"] = tools
        return spelt

    return spell


def _for_any_server(step: Callable[[Fields], Fields]) -> Callable[[Fields], Fields]:
    """A body whose schema is where TGI looks for it, and where vLLM, SGLang, llama.cpp and whoever copies OpenAI do.

    Each ignores the other's field. huggingface_hub writes ``json_object`` for it, which all but TGI take for JSON of
    any shape.
    """

    def spell(body: Fields) -> Fields:
        form = body.pop("response_format", None)
        spelt = step(body)
        if form is not None:
            schema = form.get("json_schema") if isinstance(form, dict) else None
            spelt["response_format"] = form if schema is None else {"value": schema, **form}
        return spelt

    return spell


def _leaves_the_rest(step: Callable[..., Any], mapping: InferenceProviderMapping, ask: Ask) -> bool:
    """Whether ``step`` is the whole of what the helper does to a body, and lets messages and tools be."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    parameters = {
        "model": "m",
        "temperature": 0.0,
        "tools": tools,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    try:
        spelt = step(copy.deepcopy(messages), copy.deepcopy(parameters), mapping)
        return (
            bool(spelt == ask(copy.deepcopy(messages), copy.deepcopy(parameters)).json)
            and spelt["messages"] == messages
            and spelt["tools"] == tools
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _without_null_content(body: Fields) -> Fields:
    """Leaves the content of a turn that only calls tools out: not every provider takes a null for it."""
    for message in body["messages"]:
        if message["content"] is None:
            del message["content"]
    return body


def _keep_schema(body: Fields) -> None:
    """Keeps the helper out of a JSON schema, where it would drop every null (``"const": null``)."""
    form = body.get("response_format")
    inner = form.get("json_schema") if isinstance(form, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
        inner["schema"] = MappingProxyType(inner["schema"])
