"""The headers about rate limits, of every provider that was looked at, as one value."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import RateLimitError
from asyncmodels.remote.limit_headers import rate_limits_in, rate_limits_of
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.types import Allowance, RateLimits
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Server
from tests.server.script import Answer

NOW = "Sun, 22 Nov 2026 13:00:00 GMT"
OPENAI = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-limit-tokens": "150000",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-remaining-tokens": "149984",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-reset-tokens": "6m0s",
}
OF_OPENAI = RateLimits(
    requests=Allowance(limit=60, remaining=59, reset=1.0),
    tokens=Allowance(limit=150_000, remaining=149_984, reset=360.0),
)


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        pytest.param(OPENAI, OF_OPENAI, id="openai"),
        pytest.param(
            {
                "x-ratelimit-limit-requests": "250",
                "x-ratelimit-remaining-requests": "249",
                "x-ratelimit-renewalperiod-requests": "10",
                "x-ratelimit-limit-tokens": "250000",
                "x-ratelimit-remaining-tokens": "249000",
                "x-ratelimit-renewalperiod-tokens": "60",
                "x-ratelimit-reset-requests": "4",
            },
            RateLimits(
                requests=Allowance(limit=250, remaining=249, reset=4.0, window=10.0),
                tokens=Allowance(limit=250_000, remaining=249_000, window=60.0),
            ),
            id="azure and github models",
        ),
        pytest.param(
            {
                "date": NOW,
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2026-11-22T13:00:01Z",
                "anthropic-ratelimit-tokens-limit": "48000",
                "anthropic-ratelimit-tokens-remaining": "48000",
                "anthropic-ratelimit-tokens-reset": "2026-11-22T12:59:59Z",
                "anthropic-ratelimit-input-tokens-limit": "40000",
                "anthropic-ratelimit-input-tokens-remaining": "39000",
                "anthropic-ratelimit-input-tokens-reset": "2026-11-22T14:00:02.5+01:00",
                "anthropic-ratelimit-output-tokens-limit": "8000",
                "anthropic-ratelimit-output-tokens-remaining": "0",
            },
            RateLimits(
                requests=Allowance(limit=50, remaining=49, reset=1.0, window=60.0),
                tokens=Allowance(limit=48_000, remaining=48_000, reset=0.0, window=60.0),
                input_tokens=Allowance(limit=40_000, remaining=39_000, reset=2.5, window=60.0),
                output_tokens=Allowance(limit=8_000, remaining=0, window=60.0),
            ),
            id="anthropic",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-requests-day": "14400",
                "x-ratelimit-remaining-requests-day": "14000",
                "x-ratelimit-reset-requests-day": "33011.382867097855",
                "x-ratelimit-limit-tokens-minute": "60000",
                "x-ratelimit-remaining-tokens-minute": "59000",
                "x-ratelimit-reset-tokens-minute": "11.5",
            },
            RateLimits(
                requests=Allowance(limit=14_400, remaining=14_000, reset=33011.382867097855, window=86400.0),
                tokens=Allowance(limit=60_000, remaining=59_000, reset=11.5, window=60.0),
            ),
            id="cerebras",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-req-minute": "60",
                "x-ratelimit-remaining-req-minute": "12",
                "x-ratelimit-limit-requests-day": "1000",
                "x-ratelimit-remaining-requests-day": "900",
            },
            RateLimits(requests=Allowance(limit=60, remaining=12, window=60.0)),
            id="of two windows the shorter one",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-req-minute": "60",
                "x-ratelimit-remaining-req-minute": "12",
                "x-ratelimit-limit-requests-day": "1000",
                "x-ratelimit-remaining-requests-day": "0",
            },
            RateLimits(requests=Allowance(limit=1000, remaining=0, window=86400.0)),
            id="of two windows the one that is used up",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-tokens-prompt": "60000",
                "x-ratelimit-remaining-tokens-prompt": "50000",
                "x-ratelimit-limit-tokens-generated": "6000",
            },
            RateLimits(input_tokens=Allowance(limit=60_000, remaining=50_000), output_tokens=Allowance(limit=6_000)),
            id="fireworks",
        ),
        pytest.param(
            {"date": NOW, "X-RateLimit-Limit": "60", "X-RateLimit-Remaining": "7", "X-RateLimit-Reset": "1795352430"},
            RateLimits(requests=Allowance(limit=60, remaining=7, reset=30.0)),
            id="github",
        ),
        pytest.param(
            {
                "date": NOW,
                "X-RateLimit-Limit": "20",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": "1795352430500",
            },
            RateLimits(requests=Allowance(limit=20, remaining=0, reset=30.5)),
            id="openrouter",
        ),
        pytest.param(
            {"ratelimit": '"default";r=50;t=30', "ratelimit-policy": '"default";q=100;w=60'},
            RateLimits(requests=Allowance(limit=100, remaining=50, reset=30.0, window=60.0)),
            id="ietf",
        ),
        pytest.param(
            {
                "ratelimit": '"minute";r=5;t=3, "tokens";r=900',
                "ratelimit-policy": '"minute";q=10;w=60,"day";q=1000;w=86400, "tokens";q=1000;w=60, "x";q=9;qu="bytes"',
            },
            RateLimits(
                requests=Allowance(limit=10, remaining=5, reset=3.0, window=60.0),
                tokens=Allowance(limit=1000, remaining=900, window=60.0),
            ),
            id="ietf, several",
        ),
        pytest.param(
            {"ratelimit": "limit=100, remaining=50, reset=5"},
            RateLimits(requests=Allowance(limit=100, remaining=50, reset=5.0)),
            id="ietf, draft 7",
        ),
        pytest.param(
            {
                "ratelimit-limit": "100, 100;w=60",
                "ratelimit-policy": "100;w=60",
                "ratelimit-remaining": "3",
                "ratelimit-reset": "7",
            },
            RateLimits(requests=Allowance(limit=100, remaining=3, reset=7.0, window=60.0)),
            id="ietf, draft 6",
        ),
    ],
)
def test_what_each_provider_says(headers: Mapping[str, str], limits: RateLimits) -> None:
    """The headers of each, in any case of letters, are understood."""
    assert rate_limits_in(headers) == limits
    assert rate_limits_in({name.upper(): value for name, value in headers.items()}) == limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120ms", 0.12),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1m6.5s", 66.5),
        ("2h3m4s", 7384.0),
        ("1d2h", 93600.0),
        ("59.7", 59.7),
        ("0", 0.0),
        ("8.64s", 8.64),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("1s junk", None),
        ("2026-11-22T13:00:00", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    """A reset is a duration, a number of seconds or a date with a zone; whatever else it is, it is left out."""
    found = rate_limits_in({"x-ratelimit-limit-tokens": "5", "x-ratelimit-reset-tokens": text})
    assert found is not None
    assert found.tokens is not None
    assert (found.tokens.limit, found.tokens.reset) == (5, seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json", "x-request-id": "1"},
        {"retry-after": "3", "x-ratelimit": "5", "x-ratelimit-bucket": "a"},
    ],
)
def test_other_headers_say_nothing(headers: Mapping[str, str]) -> None:
    """An answer without such headers has no rate limits at all."""
    assert rate_limits_in(headers) is None


@pytest.mark.parametrize("value", ["", "many", "-1", "9" * 400, "1e9", "\xff", ";;;", '"', "12junk"])
def test_nonsense_says_nothing(value: str) -> None:
    """A number that is none is left out, and raises nothing."""
    found = rate_limits_in(
        {"x-ratelimit-limit-tokens": value, "ratelimit": value, "anthropic-ratelimit-tokens-reset": value}
    )
    assert found == RateLimits()


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_header_breaks_it(one: str, other: str) -> None:
    """Whatever a server sends, reading it raises nothing."""
    names = ("ratelimit", "ratelimit-policy", "x-ratelimit-reset-tokens", "anthropic-ratelimit-tokens-reset", "date")
    found = rate_limits_in([(name, value) for name in names for value in (one, other)])
    assert found is not None
    assert isinstance(found.tokens, Allowance | None)


def test_what_was_not_read_yet_is_an_ordinary_value() -> None:
    """Headers are read when somebody asks; nobody can tell."""
    unread = [rate_limits_in(OPENAI) for _ in range(7)]
    assert unread[0] == OF_OPENAI
    assert OF_OPENAI == unread[1]  # noqa: SIM300  # this way round the value that was read already is asked
    assert hash(unread[2]) == hash(OF_OPENAI)
    assert repr(unread[3]) == repr(OF_OPENAI)
    assert pickle.loads(pickle.dumps(unread[4])) == OF_OPENAI  # noqa: S301  # our own bytes
    assert copy.deepcopy(unread[5]) == OF_OPENAI
    assert unread[6] is not None
    assert unread[6].tokens == OF_OPENAI.tokens
    assert type(unread[6]) is RateLimits
    with pytest.raises(AttributeError):
        _ = unread[6].nothing  # type: ignore[attr-defined]  # that is the point
    with pytest.raises(AttributeError):
        _ = rate_limits_in(OPENAI)._nothing  # type: ignore[union-attr]  # that is the point


def test_headers_of_a_response() -> None:
    """It reads those of any httpx2 response."""
    assert rate_limits_of(httpx2.Response(200, headers=OPENAI)) == OF_OPENAI
    assert rate_limits_of(httpx2.Response(200)) is None


# -- on their way up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
async def test_answers_carry_them(server: Server, api: Any, transport: Any) -> None:
    """A response has what the headers said, a stream has it on its first delta, and both are the same."""
    place = server.script(Answer(headers=list(OPENAI.items())))
    async with OpenAIModel(
        "m",
        api_base=f"{place.url}/v1",
        api_key="k",
        api=api,
        transport=transport,
    ) as model:
        assert (await model.generate("Hi")).rate_limits == OF_OPENAI
        async with model.stream("Hi") as stream:
            deltas = [delta async for delta in stream]
        assert deltas[0].rate_limits == OF_OPENAI
        assert [delta.rate_limits for delta in deltas[1:]] == [None] * (len(deltas) - 1)
        assert (await stream.response()).rate_limits == OF_OPENAI


async def test_refusals_carry_them(server: Server) -> None:
    """An error for a bad status has them, too, streamed or not."""
    place = server.script(Answer(status=429, headers=list(OPENAI.items()), body="{}"))
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k", retry=False) as model:
        with pytest.raises(RateLimitError) as refused:
            await model.generate("Hi")
        assert refused.value.rate_limits == OF_OPENAI
        with pytest.raises(RateLimitError) as refused:
            async with model.stream("Hi") as stream:
                await anext(aiter(stream))
        assert refused.value.rate_limits == OF_OPENAI


async def test_answers_without_them_have_none(server: Server) -> None:
    """Where the server says nothing, nothing is there."""
    place = server.script(Answer())
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k") as model:
        assert (await model.generate("Hi")).rate_limits is None


@pytest.mark.parametrize("noise", [pytest.param(None, marks=NOISE)])
async def test_litellm_hands_them_on(server: Server, noise: None) -> None:
    """Under names of its own litellm has them, too, of a whole answer and of a stream."""
    pytest.importorskip("litellm")
    from asyncmodels.remote.litellm import LiteLLMModel

    place = server.script(Answer(headers=list(OPENAI.items())))
    async with LiteLLMModel("openai/m", api_base=f"{place.url}/v1", api_key="k") as model:
        assert (await model.generate("Hi")).rate_limits == OF_OPENAI
        async with model.stream("Hi") as stream:
            async for _ in stream:
                pass
        assert (await stream.response()).rate_limits == OF_OPENAI
