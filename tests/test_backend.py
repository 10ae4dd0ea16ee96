"""The seam: how chains are put together and taken apart, and how capabilities refuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import (
    ALL_GRAMMARS,
    ALL_SAMPLING,
    Backend,
    Capabilities,
    Policy,
    Statistical,
    compose,
    links,
)
from asyncmodels.errors import ConfigurationError, UnsupportedError
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.testing import EVERYTHING, ScriptedBackend
from asyncmodels.types import (
    EBNF,
    Choice,
    ImagePart,
    JSONSchema,
    Message,
    ProviderPart,
    Regex,
    Request,
    ResponseFormat,
    TextPart,
    Tool,
)


def ask(*messages: Message, **fields: Any) -> Request:
    return Request(messages=messages or (Message("user", "Hi"),), **fields)


# -- chains -----------------------------------------------------------------------------------------------------------


def test_the_first_policy_is_the_outermost() -> None:
    """compose puts the policies around the backend in the order in which they are read."""
    backend = ScriptedBackend()

    chain = compose(backend, Retry, partial(Concurrency, limit=3))

    assert [type(link) for link in links(chain)] == [Retry, Concurrency, ScriptedBackend]
    assert list(links(chain))[-1] is backend


def test_without_policies_a_chain_is_the_backend() -> None:
    """compose of nothing adds nothing."""
    backend = ScriptedBackend()

    assert compose(backend) is backend
    assert list(links(backend)) == [backend]


def test_links_ends_at_what_is_no_backend() -> None:
    """A backend that happens to have an attribute `backend` of its own is the end of the chain."""

    class Odd(ScriptedBackend):
        backend = "cuda"

    odd = Odd()

    assert list(links(Retry(odd)))[1:] == [odd]


URL: Any = "redis://:hunter2@localhost/0"
UNCHECKED: Any = Retry


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        (partial(UNCHECKED, nothing=URL), "The policy partial(Retry, nothing=...) cannot be put around a backend: "),
        (
            partial(partial(UNCHECKED, URL), URL, clock=URL),
            "The policy partial(Retry, ..., ..., clock=...) cannot be put",
        ),
        (partial(lambda url, _: url, URL), "<lambda>, ...) returned str, not a Backend."),
        (URL, "A policy is a class or function that takes a backend, not a value of type str."),
    ],
    ids=["unknown", "positional", "no backend", "no function"],
)
def test_what_is_no_policy_is_refused_without_its_secrets(policy: Any, shown: str) -> None:
    """Errors name the policy and its settings, and show no value: there may be a password in it."""
    with pytest.raises(ConfigurationError) as failure:
        compose(ScriptedBackend(), policy)
    assert shown in str(failure.value)
    assert "hunter2" not in str(failure.value)


def test_a_policy_in_place_of_the_list_is_shown_without_its_secrets() -> None:
    """So does the default chain of remote models."""
    one: Any = partial(UNCHECKED, nothing=URL)
    with pytest.raises(ConfigurationError, match=r"policies is a list .* not partial\(Retry, nothing=\.\.\.\)\.$"):
        OpenAIModel("m", api_key="k", api_base="http://127.0.0.1:1", policies=one)


@pytest.mark.parametrize("policy", [Retry, partial(Concurrency, limit=1)])
async def test_a_policy_shows_and_closes_what_it_wraps(policy: Any) -> None:
    """A policy has the capabilities of the backend inside, and closing it closes that."""
    backend = ScriptedBackend(capabilities=Capabilities(tools=True))
    wrapped: Backend = policy(backend)

    assert isinstance(wrapped, Policy)
    assert wrapped.capabilities is backend.capabilities
    await wrapped.aclose()
    assert backend.closed


def test_who_counts_is_statistical() -> None:
    """A link with statistics is recognised, one without is not."""
    assert isinstance(Retry(ScriptedBackend()), Statistical)
    assert not isinstance(object(), Statistical)


def test_an_unfinished_backend_cannot_be_made() -> None:
    """A Backend that leaves out one of the three methods is refused by Python itself."""

    class Half(Backend):
        async def aclose(self) -> None: ...

    with pytest.raises(TypeError, match="generate"):
        Half()  # type: ignore[abstract]  # wrong on purpose


# -- capabilities -----------------------------------------------------------------------------------------------------

IMAGE = Message("user", (TextPart("What is this?"), ImagePart(url="https://example.org/a.png")))
FILE = ProviderPart({"type": "file", "file": {"file_id": "f1"}})
NOTHING = Capabilities(sampling=frozenset(), stop=False, tool_choice=frozenset(), stream=False)

PARAMETERS: list[tuple[str, Request]] = [
    *((name, ask(**{name: 1})) for name in sorted(ALL_SAMPLING)),
    *((name, ask(**{name: 0})) for name in sorted(ALL_SAMPLING)),
    ("stop_sequences", ask(stop_sequences=("x",))),
    ("tools", ask(tools=(Tool("look"),))),
    ("tool_choice='auto'", ask(tool_choice="auto")),
    ("tool_choice='look'", ask(tool_choice="look")),
    ("logprobs", ask(logprobs=0)),
    ("response_format", ask(response_format=ResponseFormat())),
    ("Regex grammars", ask(grammar=Regex("a"))),
    ("EBNF grammars", ask(grammar=EBNF("a"))),
    ("Choice grammars", ask(grammar=Choice(("a",)))),
    ("JSONSchema grammars", ask(grammar=JSONSchema({}))),
    ("extra parameters: top_a", ask(extra={"top_a": 1})),
    ("images", ask(Message("system", "Look."), IMAGE)),
    ("parts of type 'file'", ask(Message("user", (TextPart("Read."), FILE)))),
]


@pytest.mark.parametrize(("named", "request_"), PARAMETERS, ids=[name for name, _ in PARAMETERS])
def test_a_parameter_is_refused_by_its_name(named: str, request_: Request) -> None:
    """What a backend cannot do is an UnsupportedError that names it; a backend that can do everything takes it."""
    with pytest.raises(UnsupportedError, match=named.replace("(", r"\(")):
        NOTHING.check(request_)

    EVERYTHING.check(request_, streaming=True)


def test_streaming_is_refused_only_to_streams() -> None:
    """A backend that cannot stream still answers as a whole."""
    NOTHING.check(ask())
    with pytest.raises(UnsupportedError, match="streaming"):
        NOTHING.check(ask(), streaming=True)


def test_what_is_not_set_is_not_refused() -> None:
    """A request that asks for nothing passes the narrowest capabilities, as do limits, priority and notes."""
    NOTHING.check(ask(timeout=1, attempt_timeout=1, idle_timeout=1, priority=3, agent="a", metadata={"note": 1}))


@pytest.mark.parametrize(
    ("choice", "kind"), [("auto", "auto"), ("none", "none"), ("required", "required"), ("look", "named")]
)
def test_each_kind_of_tool_choice_is_told_apart(choice: str, kind: str) -> None:
    """Any name that is not one of the three words is the choice of a named tool."""
    every = frozenset({"auto", "none", "required", "named"})

    Capabilities(tools=True, tool_choice=frozenset({kind})).check(ask(tools=(Tool("look"),), tool_choice=choice))
    with pytest.raises(UnsupportedError, match="tool_choice"):
        Capabilities(tools=True, tool_choice=every - {kind}).check(ask(tools=(Tool("look"),), tool_choice=choice))


def test_each_grammar_is_told_apart() -> None:
    """A backend that takes one kind of grammar does not thereby take another."""
    Capabilities(grammars=frozenset({Regex})).check(ask(grammar=Regex("a")))
    with pytest.raises(UnsupportedError, match="EBNF"):
        Capabilities(grammars=frozenset({Regex})).check(ask(grammar=EBNF("a")))


def test_text_in_parts_is_no_image() -> None:
    """A message of text parts alone needs no capability."""
    NOTHING.check(ask(Message("user", (TextPart("a"), TextPart("b"))), Message("assistant", None)))


def test_the_names_of_all_are_all() -> None:
    """The sets for "everything" hold exactly the fields of Request and the grammars there are."""
    assert {name for name in Request.__dataclass_fields__ if name in ALL_SAMPLING} == ALL_SAMPLING
    assert {Regex, EBNF, Choice, JSONSchema} == ALL_GRAMMARS
