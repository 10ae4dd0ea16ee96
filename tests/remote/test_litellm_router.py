"""LiteLLMRouterModel: litellm's real router over deployments on a server that misbehaves, and our chain around it."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest

from asyncmodels import (
    AuthenticationError,
    Concurrency,
    ConfigurationError,
    InvalidResponseError,
    LiteLLMRouterModel,
    Model,
    RateLimitError,
    Response,
    Retry,
    ServerError,
    TruncatedResponseError,
    UnsupportedError,
    Usage,
)
from asyncmodels.remote.litellm_session import litellm
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Place, Server
from tests.server.script import Answer

pytestmark = NOISE
KEY = "sk-test-0123456789abcdef"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def deployment(place: Place, name: str = "g", **params: Any) -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {"model": "openai/m", "api_base": f"{place.url}/v1", "api_key": KEY, **params},
    }


def router_over(*places: Place, **options: Any) -> LiteLLMRouterModel:
    return LiteLLMRouterModel("g", [deployment(place) for place in places], **{"policies": SWIFT, **options})


async def test_whole_and_streamed(server: Server) -> None:
    """As without the router: content, usage, finish reason, stops."""
    place = server.script(Answer(content="one two three", usage={"prompt_tokens": 9, "completion_tokens": 3}))
    async with router_over(place) as model:
        whole = await model.generate("count", max_tokens=5)
        streamed = await model.stream("count").response()
        cut = await model.stream("count", stop_sequences=["two"]).response()
    assert (whole.content, whole.usage, whole.finish_reason) == ("one two three", Usage(9, 3), "stop")
    assert (streamed.content, streamed.usage, streamed.finish_reason) == ("one two three", Usage(9, 3), "stop")
    assert cut.content == "one "
    assert (place.seen().requests[0].json()["max_tokens"], place.seen().requests[0].json()["model"]) == (5, "m")


async def test_calls_are_spread_over_the_deployments(server: Server) -> None:
    """And share the session of the loop."""
    places = [server.script(Answer(echo=True)) for _ in range(2)]
    async with router_over(*places) as model:
        answers = await asyncio.gather(*(model.generate(f"question {index}") for index in range(30)))
        connections = model.statistics().links["LiteLLMBackend"].connections
    assert [str(answer) for answer in answers] == [f"question {index}" for index in range(30)]
    counts = [len(place.seen().requests) for place in places]
    assert sum(counts) == 30
    assert min(counts) > 0
    assert connections == sum(place.seen().connections for place in places)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_only_our_chain_retries(server: Server, status: int) -> None:
    """Not the router, not the openai package, and not a deployment that asks for it; a refusal is one request."""
    place = server.script(Answer(status=status, headers=[("retry-after-ms", "1")]))
    eager = deployment(place, num_retries=3, max_retries=3)
    async with LiteLLMRouterModel("g", [eager], policies=[]) as model:
        with pytest.raises((RateLimitError, ServerError)) as caught:
            await model.generate("x")
        assert (caught.value.status, len(place.seen().requests)) == (status, 1)
        with pytest.raises((RateLimitError, ServerError)):
            await model.stream("x").response()
        assert len(place.seen().requests) == 2
    place = server.script(Answer(status=status), Answer(content="ok"))
    async with router_over(place) as model:
        assert (await model.generate("x")).attempts == 2
    assert len(place.seen().requests) == 2


async def test_no_default_asks_for_retries(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the router's deployments, and not litellm's own for the whole process."""
    monkeypatch.setattr(litellm, "num_retries", 2)
    place = server.script(Answer(status=500))
    defaults = {"default_litellm_params": {"max_retries": 2, "num_retries": 2, "timeout": 30}}
    for count, options in enumerate((defaults, {}), start=1):
        async with router_over(place, policies=[], client_kwargs=options) as model:
            with pytest.raises(ServerError):
                await model.generate("x")
            with pytest.raises(ServerError):
                await model.stream("x").response()
        assert len(place.seen().requests) == 2 * count
    assert defaults["default_litellm_params"]["max_retries"] == 2


async def test_bad_answers(server: Server) -> None:
    """Broken off, or an error with a good status: typed as without the router, asked once, in the provider's words."""
    error = '{"error": {"message": "boom", "code": "odd"}}'
    for answer, kind in (
        (Answer(body=error), ServerError),
        (Answer(fault="short"), TruncatedResponseError),
        (Answer(content="a b c", fault="cut", after=2), TruncatedResponseError),
    ):
        place = server.script(answer)
        async with router_over(place, policies=[]) as model:
            for count, call in enumerate((model.generate("x"), model.stream("x").response()), start=1):
                with pytest.raises(kind) as caught:
                    await call
                assert caught.value.retryable
                assert "Model Group" not in str(caught.value)
                assert len(place.seen().requests) == count
    async with router_over(server.script(Answer(body="null")), policies=[]) as model:
        with pytest.raises(InvalidResponseError) as nonsense:
            await model.generate("x")
    assert "Model Group" not in str(nonsense.value)


async def test_what_one_deployment_cannot_do_is_refused(server: Server) -> None:
    """The router might choose it."""
    place = server.script(Answer())
    both = [deployment(place), deployment(place, model="mistral/mistral-large-latest")]
    tool = {"name": "f", "description": "", "parameters": {}}
    async with LiteLLMRouterModel("g", both, policies=[]) as model:
        with pytest.raises(UnsupportedError):
            await model.generate("x", tools=[tool], tool_choice="f")
    assert place.seen().requests == []


async def test_an_error_is_the_providers(server: Server) -> None:
    """Without the router's own words, and without the key of a deployment."""
    place = server.script(Answer(status=401, body=f'{{"error": {{"message": "Incorrect API key: {KEY}"}}}}'))
    async with router_over(place) as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.generate("x")
    assert str(caught.value) == "The provider answered 401: Incorrect API key: ***"
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r} {model!r} {model.backend!r}"


async def test_when_no_deployment_is_left(server: Server) -> None:
    """All of them rest after failures, and the error says for how long."""
    places = [server.script(Answer(status=500)) for _ in range(2)]
    rest = {"allowed_fails": 0, "cooldown_time": 30.0}
    async with router_over(*places, client_kwargs=rest, policies=[]) as model:
        failures = []
        for _ in range(12):
            with pytest.raises((ServerError, RateLimitError)) as caught:
                await model.generate("x")
            failures.append(caught.value)
    last = failures[-1]
    assert isinstance(last, RateLimitError)
    assert last.retry_after is not None
    assert 0 < last.retry_after <= 30
    assert sum(len(place.seen().requests) for place in places) < 12


async def test_fallbacks_are_the_routers(server: Server) -> None:
    """A group that fails hands over to another, within one attempt of ours."""
    bad, good = server.script(Answer(status=500)), server.script(Answer(content="ok"))
    both = [deployment(bad), deployment(good, "other")]
    fallbacks = {"fallbacks": [{"g": ["other"]}]}
    async with LiteLLMRouterModel("g", both, client_kwargs=fallbacks, policies=[]) as model:
        assert str(await model.generate("x")) == "ok"
        assert str(await model.stream("x").response()) == "ok"
    assert (len(bad.seen().requests), len(good.seen().requests)) == (2, 2)


async def test_a_stream_that_breaks_off(server: Server) -> None:
    """The router's own stream hides how it ended; it is seen all the same, and nothing is made up."""
    head = '{"id": "c", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}'
    end = '{"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}'
    place = server.script(Answer(events=[head]), Answer(events=[head, end, "[DONE]"]))
    async with router_over(place, policies=[]) as model:
        with pytest.raises(TruncatedResponseError):
            await model.stream("x").response()
        whole = await model.stream("x").response()
    assert (whole.content, whole.usage) == ("a", None)


async def test_cancelling_and_leaving_give_the_connection_back(server: Server) -> None:
    """Before the head, and in the middle of a stream."""
    hanging = server.script(Answer(fault="hang"))
    streaming = server.script(Answer(content="a " * 1000, interval=0.02))
    async with router_over(hanging) as model:
        task = asyncio.create_task(model.generate("x"))
        await hanging.until(in_progress=1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await hanging.until(in_progress=0, closed_early=1)
    async with router_over(streaming) as model:
        async with model.stream("x") as stream:
            async for delta in stream:
                if delta.content:
                    break
        await streaming.until(in_progress=0, closed_early=1)
        assert model.statistics().links["LiteLLMBackend"].in_flight == 0


def test_two_loops_in_a_row_and_the_sync_face(server: Server) -> None:
    """A router outlives the event loop that it was first used on."""
    model = router_over(server.script(Answer(content="hi")))

    async def ask(model: Model) -> Response:
        return await model.generate("x")

    assert [str(asyncio.run(ask(model))), str(asyncio.run(ask(model))), str(model.sync.generate("x"))] == ["hi"] * 3
    model.sync.close()
    gc.collect()


async def test_closing_takes_the_routers_callbacks_away(server: Server) -> None:
    """litellm keeps them in global lists, where those of every router ever made would be called."""

    def callbacks() -> int:
        return sum(
            len(found)
            for found in (
                litellm.callbacks,
                litellm.success_callback,
                litellm.failure_callback,
                litellm._async_success_callback,
                litellm._async_failure_callback,
            )
        )

    before = callbacks()
    async with router_over(server.script(Answer())) as model:
        await model.generate("x")
        assert callbacks() > before
    assert callbacks() == before


GOOD = {"model_name": "g", "litellm_params": {"model": "openai/m", "api_key": KEY}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_id": "", "model_list": [GOOD]}, "needs a model_id"),
        ({"model_list": []}, "list of deployments"),
        ({"model_list": "g"}, "list of deployments"),
        ({"model_list": [3]}, "Each deployment"),
        ({"model_list": [{"model_name": "g"}]}, "Each deployment"),
        ({"model_list": [{**GOOD, "model_name": 5}]}, "Each deployment"),
        ({"model_list": [{"model_name": "g", "litellm_params": {"model": 5}}]}, "Each deployment"),
        ({"model_list": [GOOD], "flatten_messages_as_text": "yes"}, "flatten_messages_as_text must be"),
        ({"model_list": [GOOD], "client_kwargs": {"default_litellm_params": 3}}, "must be a dict"),
        (
            {"model_list": [{"model_name": "other", "litellm_params": GOOD["litellm_params"]}]},
            "no deployment named 'g'",
        ),
        ({"model_list": [GOOD], "client_kwargs": 3}, "must be a dict"),
        ({"model_list": [GOOD], "client_kwargs": {"num_retries": -1}}, "whole number"),
        ({"model_list": [GOOD], "client_kwargs": {"retry_policy": {}}}, "own retries"),
        ({"model_list": [GOOD], "client_kwargs": {"routing_strategy": "no-such"}}, r"litellm\.Router does not take"),
        ({"model_list": [GOOD], "client_kwargs": {"no_such": KEY}}, r"litellm\.Router does not take"),
    ],
)
def test_what_is_wrong_from_the_start(arguments: dict[str, Any], words: str) -> None:
    """One clear sentence when the model is made, without a key in it."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        LiteLLMRouterModel(**{"model_id": "g", **arguments})
    assert KEY not in str(caught.value)


async def test_the_users_number_of_retries_is_ours(server: Server) -> None:
    """``num_retries`` means what it says, in the one place that retries; and the user's list stays as it was."""
    place = server.script(Answer(status=500, headers=[("retry-after-ms", "1")]))
    deployments = [deployment(place, max_retries=4)]
    async with LiteLLMRouterModel("g", deployments, client_kwargs={"num_retries": 1}) as model:
        with pytest.raises(ServerError):
            await model.generate("x")
    assert len(place.seen().requests) == 2
    assert deployments[0]["litellm_params"]["max_retries"] == 4
    async with LiteLLMRouterModel("g", deployments, client_kwargs={"num_retries": 0}) as model:
        with pytest.raises(ServerError):
            await model.generate("x")
    assert len(place.seen().requests) == 3
