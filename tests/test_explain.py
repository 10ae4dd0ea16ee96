"""What a model says of itself: its chain in words, one of its links, and the request that it would send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest

import asyncmodels
from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Policy, compose
from asyncmodels.errors import ConfigurationError, InvalidRequestError, ServerError
from asyncmodels.explanation import Explanation, explain
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.fallback import Fallback
from asyncmodels.policies.retry import Retry, RetryBudget
from asyncmodels.policies.route import Route
from asyncmodels.several import FallbackModel, RouteModel
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Delta, ImagePart, Message, Regex, Request, Response, Tool
from tests.server.handle import Server


class Shouting(Policy):
    """Makes answers louder, by ``volume``. Nobody asked for it.

    The key opens nothing.
    """

    def __init__(
        self, backend: Backend, volume: int = 11, *, api_key: str = "sk-secret", home: str = "", **more: object
    ) -> None:
        super().__init__(backend)

    async def generate(self, request: Request, /) -> Response:
        return await self.backend.generate(request)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self.backend.stream(request)


class Silent(Shouting):
    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)


def backend(name: str = "m") -> ScriptedBackend:
    return ScriptedBackend("Hello.", repeat=True, model=name)


# -- explain ----------------------------------------------------------------------------------------------------------


def test_a_chain_is_a_line_a_link() -> None:
    """From the outermost to the backend, each with its settings, the default ones too, and what it does."""
    model = Model(
        backend(),
        partial(Cache, ttl=60.0, namespace="n"),
        partial(Concurrency, limit=4),
        model_id="mine",
        defaults={"temperature": 0.5, "stop_sequences": ["x"], "grammar": Regex("a+")},
    )

    assert str(explain(model)).splitlines() == [
        "Model('mine', temperature=0.5, stop_sequences=['x'], grammar=Regex(pattern='a+'))",
        "→ Cache(ttl=60, sampled=False, namespace='n', keep=['stop', 'tool_calls', 'length']): Gives an answer again "
        "where everything that decides it is the same: the request, the model, the endpoint",
        "→ Concurrency(limit=4, start=8, minimum=1, maximum=1000): Lets at most limit calls at once through to backend",
        f"→ Attempt: {explain(Attempt(backend())).does}",
        "→ ScriptedBackend(model='m')",
    ]


def test_a_choice_is_drawn_as_a_tree() -> None:
    """Each branch of a Fallback or Route is a whole chain, under its name, as deep as it goes."""
    inner = RouteModel(backend("a"), backend("b"), by="least_in_flight", names=["eu", "us"])
    model = FallbackModel(inner, Model(backend("c"), model_id="c"), also=ServerError, cooldown=5.0)
    attempt = f"Attempt: {explain(Attempt(backend())).does}"

    lines = str(model.explain()).splitlines()

    assert lines[0] == "FallbackModel('eu | us → c')"
    assert lines[1].startswith(
        "→ Fallback(also=ServerError, cooldown=5, cooldown_after=3, closes=True): Asks one model"
    )
    assert lines[2] == "├─ eu | us: RouteModel('eu | us')"
    assert lines[3].startswith("│  → Route(by='least_in_flight', spill=1.25, tries=2")
    assert lines[4:] == [
        f"│  ├─ eu: {attempt}",
        "│  │  → ScriptedBackend(model='a')",
        f"│  └─ us: {attempt}",
        "│     → ScriptedBackend(model='b')",
        "└─ c: Model('c')",
        f"   → {attempt}",
        "   → ScriptedBackend(model='c')",
    ]


def test_a_setting_that_was_changed_shows_both_values() -> None:
    """What was given, and what holds now."""
    model = Model(backend(), partial(Concurrency, limit="auto"))
    assert "Concurrency(limit='auto' (now 8)," in str(model.explain())
    model.link(Concurrency).limit = 3
    assert "Concurrency(limit='auto' (now 3)," in str(model.explain())


def test_no_secret_is_shown() -> None:
    """Texts that are called like a secret, passwords in addresses, and what defaults hold in extras stay hidden."""
    shouting = partial(Shouting, home="redis://me:hunter2@host:6379/0?token=hunter3", password="hunter4")
    model = Model(backend(), shouting, defaults={"extra": {"key": "hunter5"}, "metadata": {"note": "hunter6"}})

    shown = str(model.explain())

    assert "Shouting(volume=11, api_key=***, home='redis://host:6379/0'): Makes answers louder, by volume" in shown
    assert shown.startswith("Model(extra={key}, metadata={note})\n")
    assert "hunter" not in shown
    assert "sk-secret" not in shown


@pytest.mark.parametrize(
    ("home", "shown"),
    [
        ("http://[::1/path", "'...'"),
        ("http://host:99999/", "'...'"),
        ("x" * 100, f"'{'x' * 56}..."),
        ("~/cache", "'~/cache'"),
    ],
)
def test_texts_are_shown_as_far_as_they_are_safe_and_short(home: str, shown: str) -> None:
    """An address that cannot be read may hold anything; a long text is cut."""
    assert f"home={shown})" in str(explain(Shouting(backend(), home=home)))


def test_a_remote_model_says_where_it_asks(server: Server) -> None:
    """The backend of a remote model shows its endpoint, and not its key."""
    from asyncmodels.remote.openai import OpenAIModel

    model = OpenAIModel("m", api_base=f"{server.url}/v1", api_key="sk-secret", max_tokens=5)
    lines = str(model.explain()).splitlines()

    assert lines[0] == "OpenAIModel('m', max_tokens=5)"
    assert any(line.startswith("→ Retry(") and "reserve=" in line for line in lines)
    assert lines[-1].startswith(f"→ OpenAIBackend(model='m', endpoint='{server.url}/v1")
    assert "sk-secret" not in str(model.explain())


def test_objects_among_the_settings_are_shown_by_what_is_ours() -> None:
    """Our own values by their repr, functions and classes by their names, other objects by their class."""
    budget = RetryBudget(ratio=0.5)
    assert f"budget={budget!r}" in str(explain(Retry(backend(), budget=budget)))
    assert "on=ServerError" in str(explain(Retry(backend(), on=ServerError)))
    assert "on=test_objects_among_the_settings_are_shown_by_what_is_ours" in str(
        explain(Fallback(backend(), to=[backend()], on=test_objects_among_the_settings_are_shown_by_what_is_ours))  # type: ignore[arg-type]  # never called
    )
    assert "volume=object" in str(explain(Shouting(backend(), object())))  # type: ignore[arg-type]  # anybody's own


def test_it_can_be_read_by_a_program() -> None:
    """Each link is a value with its name, settings and what it does, and what comes next; its repr is the drawing."""
    explained = explain(compose(backend(), Silent, Shouting))

    assert isinstance(explained, Explanation)
    assert (explained.name, explained.settings, explained.does) == ("Silent", "", "")
    assert [link.name for link in explained.next] == ["Shouting"]
    assert explained.next[0].does == "Makes answers louder, by volume"
    assert explained.next[0].next[0].next == ()
    assert repr(explained) == str(explained)


def test_the_function_keeps_its_name() -> None:
    """``asyncmodels.explain`` is the function, whatever was imported before."""
    model = Model(backend())
    assert str(asyncmodels.explain(model)) == str(model.explain())
    with pytest.raises(ConfigurationError, match="takes a Model or another Backend, not str"):
        explain("model")  # type: ignore[arg-type]  # what the test is about


# -- link -------------------------------------------------------------------------------------------------------------


async def test_a_link_can_be_reached_and_used() -> None:
    """The outermost link of a class, also inside of a Model inside; a Cache can say what it would do with a request."""
    inner = Model(backend(), partial(Concurrency, limit=4), defaults={"temperature": 0})
    model = Model(inner, Cache, partial(Concurrency, limit=2), model_id="outer")

    assert model.link(Concurrency).limit == 2
    assert inner.link(Concurrency).limit == 4
    assert isinstance(model.link(ScriptedBackend), ScriptedBackend)
    assert model.link(Model) is inner
    cache = model.link(Cache)
    assert (await cache.explain(model.request("Hi", seed=1))).reason == "the cache is empty"
    await model.generate("Hi", seed=1)
    assert (await cache.explain(model.request("Hi", seed=1))).status == "hit"
    assert (await cache.explain(model.request("Hi", seed=2))).differs == ("seed (2, in the cache 1)",)


def test_a_link_that_is_not_there_is_a_clear_error() -> None:
    """The error says which model has what; links behind a branch belong to the models there."""
    model = FallbackModel(Model(backend(), Retry, model_id="a"), backend(), names=["a", "b"])
    with pytest.raises(ConfigurationError, match="<FallbackModel 'a → b': Fallback> has no Retry among its links"):
        model.link(Retry)
    assert isinstance(model.link(Fallback), Fallback)
    with pytest.raises(ConfigurationError, match="has no Route"):
        model.link(Route)


# -- request ----------------------------------------------------------------------------------------------------------


async def test_the_request_is_what_generate_sends() -> None:
    """With the defaults of the model, and the call's own parameters before them."""
    scripted = backend()
    model = Model(scripted, defaults={"temperature": 0.5, "max_tokens": 9})

    request = model.request([{"role": "user", "content": "Hi"}], temperature=0, tools=[Tool("look")])
    await model.generate([{"role": "user", "content": "Hi"}], temperature=0, tools=[Tool("look")])

    assert request == scripted.requests[0]
    assert (request.temperature, request.max_tokens) == (0, 9)


def test_a_request_that_cannot_be_is_refused() -> None:
    """As generate refuses it."""
    with pytest.raises(InvalidRequestError, match="temperature"):
        Model(backend()).request("Hi", temperature=-1)


def test_images_of_a_request_are_not_read() -> None:
    """That is done off the loop, when it is sent."""
    image = ImagePart(source="no-such-file.png")
    request = Model(backend()).request(Message("user", (image,)))
    assert request.messages[0].content == (image,)
