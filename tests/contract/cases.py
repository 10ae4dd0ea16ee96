"""Who must keep the contract of ``Backend``: one line in CASES each, for a backend, a policy or a whole model.

To join, add a ``Case`` to CASES:

- ``id`` names it in the test report.
- ``open`` takes pytest's ``getfixturevalue`` (so that a case can ask for a server by name) and gives an async context
  manager with the Backend: a Model, or ``contextlib.aclosing(backend)``. One test enters it in one event loop and
  leaves it in the next, so it must not keep anything that belongs to a loop (an ``@asynccontextmanager`` does).
- ``ask`` makes the request that provokes a ``Behaviour``. As it stands it puts the behaviour's word in front of the
  text (``"hang: ..."``), which a scripted backend, a function or a server can read; another case may set
  ``Request.extra`` or a model id instead. It must leave every other field unset, and greedy sampling to the case.
- ``can`` are the behaviours that the case can be made to show. A real engine can only answer: without ``HANG`` and
  ``STALL`` the tests of cancellation cancel a call that is busy answering, without ``FAIL`` they are skipped.
- ``holds`` says that its answers really obey grammars, response formats and demanded tool calls, as far as its
  capabilities have them; a server that answers by a script says what the script says.
- ``marks`` are pytest's, such as ``pytest.mark.model`` for a case that loads weights.

What the tests demand of ``ANSWER``: some words that depend on nothing but the request, so that asking again, or
through a stream, or among fifty others, gives the same. No test knows the words.

For example, a backend against a server that a fixture named ``server`` starts, and one that loads a tiny model::

    Case("openai", lambda fixture: OpenAIModel("m", api_base=fixture("server").url, api_key="k")),
    Case("transformers", open_tiny_llama, ask=greedy, can={Behaviour.ANSWER}, marks=(pytest.mark.model,)),
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import pytest

from asyncmodels.backend import Backend, Capabilities, compose
from asyncmodels.callable import CallableModel
from asyncmodels.errors import ServerError
from asyncmodels.model import Model
from asyncmodels.policies.breaker import Breaker
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.fallback import Fallback
from asyncmodels.policies.hedge import Hedge
from asyncmodels.policies.prices import Price
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.route import Route
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.policies.spending import Spending
from asyncmodels.policies.telemetry import Telemetry
from asyncmodels.testing import Delay, Reply, ScriptedBackend
from asyncmodels.types import Delta, Message, Request
from tests.local.on_vllm.marks import VLLM
from tests.remote.litellm_noise import NOISE as LITELLM_NOISE
from tests.server.script import Answer

__all__ = ["CASES", "Behaviour", "Case"]


class Behaviour(Enum):
    """What a backend is to do with a request."""

    ANSWER = "answer"
    HANG = "hang"
    """Take the request and never begin to answer."""
    STALL = "stall"
    """Stream at least one delta, then neither go on nor end; ``generate`` never returns."""
    FAIL = "fail"
    """Fail each time in a way that is not the request's fault, a 500 for example."""


def ask_in_words(behaviour: Behaviour, text: str) -> Request:
    return Request(messages=(Message("user", f"{behaviour.value}: {text}"),))


GetFixture: TypeAlias = Callable[[str], Any]
Open: TypeAlias = Callable[[GetFixture], AbstractAsyncContextManager[Backend]]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    ask: Callable[[Behaviour, str], Request] = ask_in_words
    can: Collection[Behaviour] = frozenset(Behaviour)
    holds: bool = False
    marks: Collection[pytest.MarkDecorator] = ()


@dataclass(frozen=True)
class Case(_Settings):
    """One backend that must keep the contract; the module says what the fields mean."""

    id: str
    open: Open


# -- the cases of this package ---------------------------------------------------


def say(text: str) -> str:
    """Words that depend on the text alone, with some that come up twice."""
    return f"You said: {text}, and then one two three, one two three, and nothing more."


def scripted(request: Request) -> Reply:
    behaviour, _, text = request.messages[-1].text.partition(": ")
    replies: Mapping[str, Reply] = {
        "answer": say(text),
        "hang": (Delay(math.inf),),
        "stall": (Delta(content="You "), Delay(math.inf)),
        "fail": ServerError("The script says 500.", status=500),
    }
    return replies[behaviour]


def chain(*policies: Callable[[Backend], Backend]) -> Open:
    """A scripted backend with the default, narrow capabilities, and ``policies`` around it."""

    def opened(_: GetFixture) -> AbstractAsyncContextManager[Backend]:
        return aclosing(compose(ScriptedBackend(scripted, repeat=True, capabilities=Capabilities()), *policies))

    return opened


def among_two(choice: Callable[..., Backend]) -> Open:
    """Two such backends, and something that chooses among them."""

    def opened(_: GetFixture) -> AbstractAsyncContextManager[Backend]:
        first, second = (ScriptedBackend(scripted, repeat=True, capabilities=Capabilities()) for _ in range(2))
        return aclosing(choice(first, to=[second]))

    return opened


def face(_: GetFixture) -> AbstractAsyncContextManager[Backend]:
    return Model(ScriptedBackend(scripted, repeat=True, capabilities=Capabilities()), retry, gate)


def function(_: GetFixture) -> AbstractAsyncContextManager[Backend]:
    async def respond(messages: Sequence[Mapping[str, Any]]) -> AsyncIterator[str]:
        behaviour, _, text = messages[-1]["content"].partition(": ")
        if behaviour == "fail":
            raise ServerError("The function says 500.", status=500)
        if behaviour == "hang":
            await asyncio.Event().wait()
        for word in say(text).split(" "):
            yield word + " "
            if behaviour == "stall":
                await asyncio.Event().wait()

    return CallableModel(respond)


def ask_by_script(behaviour: Behaviour, text: str) -> Request:
    """Tells the test server in the request itself what to do with it."""
    answers = {
        Behaviour.ANSWER: Answer(content=say(text), obey=True),
        Behaviour.HANG: Answer(fault="hang"),
        Behaviour.STALL: Answer(content=say(text), fault="hang_in_body", after=6),
        Behaviour.FAIL: Answer(status=500),
    }
    return Request(messages=(Message("user", text),), extra={"x_script": answers[behaviour].to_json()})


def responses_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.openai import OpenAIModel

    url = f"{fixture('server').script().url}/v1"
    return OpenAIModel("m", api_base=url, api_key="k", api="responses", policies=(retry, gate))


def openai_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    # Imported here, as everywhere below, so that the cases can be listed where the extra of one is not installed.
    from asyncmodels.remote.openai import OpenAIModel

    url = f"{fixture('server').script().url}/v1"
    return OpenAIModel("m", api_base=url, api_key="k", policies=(retry, gate))


def azure_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.azure import AzureOpenAIModel

    url = fixture("server").script().url
    return AzureOpenAIModel("m", url, "k", "2024-10-21", policies=(retry, gate))


def huggingface_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.huggingface import InferenceClientModel

    return InferenceClientModel("m", base_url=fixture("server").script().url, token="hf_k", policies=(retry, gate))


def bedrock_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.bedrock import BedrockModel

    kwargs = {"endpoint_url": fixture("server").script().url, "region_name": "us-east-1"}
    return BedrockModel("m", client_kwargs=kwargs, api_key="k", policies=(retry, gate))


def ask_bedrock_by_script(behaviour: Behaviour, text: str) -> Request:
    """The same for a provider whose package refuses a field that it does not know, except in this one."""
    request = ask_by_script(behaviour, text)
    return replace(request, extra={"additionalModelRequestFields": request.extra})


def tiny_llama(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.local.transformers import TransformersModel

    # Every test has an engine of its own; only the weights, which the fixture holds, are read once for all of them.
    spec = fixture("tiny_weights")
    return TransformersModel(
        spec.model_id, device_map=spec.device_map, torch_dtype=spec.torch_dtype, share_weights=True
    )


def tiny_llama_paged(fixture: GetFixture, device: str = "cpu") -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.local.transformers import TransformersModel

    spec = fixture("tiny_weights")
    return TransformersModel(spec.model_id, device_map=device, torch_dtype=spec.torch_dtype, backend="paged")


def tiny_llama_on_cuda(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.local.transformers import TransformersModel

    spec = fixture("tiny_weights")
    return TransformersModel(spec.model_id, device_map="cuda", torch_dtype=spec.torch_dtype, share_weights=True)


CUDA = (
    pytest.mark.gpu,
    # As text, which is looked at when such a test is about to run: torch takes seconds to import.
    pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="there is no CUDA device"),
)


MLX_ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(
        "not __import__('mlx.core', fromlist=['core']).cuda.is_available()", reason="MLX has no CUDA device"
    ),
)


def tiny_mlx(_: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.local.mlx import MLXModel
    from tests.local.on_mlx.tiny_mlx import tiny_mlx_folder

    # Bytes are its tokens, so that the description of a tool is longer than its own context.
    return MLXModel(str(tiny_mlx_folder()), load_kwargs={"model_config": {"max_position_embeddings": 2048}})


def tiny_vllm(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from tests.local.on_vllm.kept import kept_model

    # Every test has a model, an engine and an owner thread of its own; vLLM's processes, half a minute to start, last.
    fixture("kept_vllm")
    return kept_model()


def litellm_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.litellm import LiteLLMModel

    url = f"{fixture('server').script().url}/v1"
    return LiteLLMModel("openai/m", api_base=url, api_key="k", policies=(retry, gate))


def litellm_router_at(fixture: GetFixture) -> AbstractAsyncContextManager[Backend]:
    from asyncmodels.remote.litellm import LiteLLMRouterModel

    url = f"{fixture('server').script().url}/v1"
    deployment = {"model": "openai/m", "api_base": url, "api_key": "k"}
    return LiteLLMRouterModel("g", [{"model_name": "g", "litellm_params": deployment}], policies=(retry, gate))


def ask_greedily(_: Behaviour, text: str) -> Request:
    """A random model never ends by itself; its greedy words are its own."""
    return Request(messages=(Message("user", text),), temperature=0.0, max_tokens=24)


retry = partial(Retry, attempts=2, wait_initial=0, wait_max=0)
gate = partial(Concurrency, limit=4)
budget = partial(
    Budget, spending=Spending(1e6, 10**9), prices=Price(input=1, output=1), max_output_tokens=1000, when_tight="raise"
)
breaker = partial(Breaker, failures=1000)
hedge = partial(Hedge, after=0.0, max_extra=1.0)

CASES = [
    Case("scripted", chain()),
    Case("retry", chain(retry)),
    Case("concurrency", chain(gate)),
    Case("retry-concurrency", chain(retry, gate)),
    Case("breaker", chain(breaker)),
    Case("hedge", chain(hedge)),
    Case("hedge-retry-breaker", chain(hedge, retry, breaker)),
    Case("single-flight", chain(partial(SingleFlight, sampled=True))),
    Case("rate-limit", chain(partial(RateLimit, requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000))),
    Case("cache", chain(partial(Cache, sampled=True))),
    Case("fallback", among_two(Fallback)),
    Case("route", among_two(partial(Route, by="latency", sticky="agent"))),
    Case("budget", chain(budget)),
    Case("telemetry", chain(partial(Telemetry, on_event=id))),
    Case("model", face),
    Case("callable", function),
    Case("openai", openai_at, ask=ask_by_script),
    Case("openai-responses", responses_at, ask=ask_by_script),
    Case("azure", azure_at, ask=ask_by_script),
    Case("huggingface", huggingface_at, ask=ask_by_script),
    Case("bedrock", bedrock_at, ask=ask_bedrock_by_script),
    Case("litellm", litellm_at, ask=ask_by_script, marks=LITELLM_NOISE),
    Case("litellm-router", litellm_router_at, ask=ask_by_script, marks=LITELLM_NOISE),
    Case("transformers", tiny_llama, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=(pytest.mark.model,)),
    Case("transformers-cuda", tiny_llama_on_cuda, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=CUDA),
    Case("paged", tiny_llama_paged, ask=ask_greedily, can={Behaviour.ANSWER}, marks=(pytest.mark.model,)),
    Case("paged-cuda", partial(tiny_llama_paged, device="cuda"), ask=ask_greedily, can={Behaviour.ANSWER}, marks=CUDA),
    Case("mlx", tiny_mlx, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=(pytest.mark.model,)),
    Case("mlx-cuda", tiny_mlx, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=MLX_ON_CUDA),
    Case("vllm", tiny_vllm, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=VLLM),
    # vLLM runs on the GPU where its build has one; then "-m gpu" must not leave it out.
    Case("vllm-cuda", tiny_vllm, ask=ask_greedily, can={Behaviour.ANSWER}, holds=True, marks=(*VLLM, *CUDA)),
]
