"""Functions, dicts and objects become tools whose schema says exactly what the tool takes."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pydantic
import pytest

from asyncmodels.errors import InvalidRequestError
from asyncmodels.tools import as_tool, as_tool_choice, as_tools
from asyncmodels.types import Tool

EMPTY = {"type": "object", "properties": {}}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(pydantic.BaseModel):
    street: str


@dataclasses.dataclass
class Point:
    x: int
    y: float = 1.0


def everything(
    city: str,
    json: Annotated[int, pydantic.Field(description="from Field", ge=0)],
    colour: Colour,
    point: Point,
    addresses: list[Address],
    unit: Literal["c", "f"] = "c",
    _days: Optional[int] = None,  # noqa: UP045  # the older spelling must work too
    model_id: dict[str, int] = {},  # noqa: B006  # never written to
    anything: Any = object(),  # noqa: B008  # a default that JSON cannot hold
    limit: int = pydantic.Field(default=3, description="from default", le=9),
) -> str:
    """Look it up.

    In the second paragraph more is said.

    Args:
        city: Which
            city it is.
        json: Not this one, since the hint says it.
        point: Where.

    Returns:
        What was found.
    """
    return city


def numpy_style(a: int, b: str = "x") -> None:
    """Do it.

    Parameters
    ----------
    a : int
        The first.
    b : str, optional
        The second.
    """


def sphinx_style(a: int, b: str = "x") -> None:
    """Do it.

    :param a: The first.
    :param b: The second.
    :returns: Nothing.
    """


def google_style(a: int, b: str = "x") -> None:
    """Do it.

    Args:
        a (int): The first.
        b: The second.
    """


async def asynchronous(a: int, b: str = "x") -> None:
    """Do it.

    Args:
        a: The first.
        b: The second.
    """


class Service:
    def method(self, a: int) -> None:
        """Bound."""

    @classmethod
    def of_class(cls, a: int) -> None:
        """Of the class."""

    @staticmethod
    def static(a: int) -> None:
        """Static."""


AB = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "description": "The first."},
        "b": {"type": "string", "default": "x", "description": "The second."},
    },
    "required": ["a"],
}


def refused(value: object) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        as_tool(value)
    return str(caught.value)


# -- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [google_style, numpy_style, sphinx_style, asynchronous])
def test_every_docstring_style_gives_the_same_tool(function: Callable[..., Any]) -> None:
    """Google's, NumPy's and Sphinx's style, sync or async, give name, description, types, defaults and descriptions."""
    tool = as_tool(function)
    assert tool == Tool(function.__name__, "Do it.", AB)
    assert tool.function is function


def test_the_schema_says_what_the_hints_say() -> None:
    """Types of every kind, constraints, defaults and descriptions are in the schema under the parameters' own names."""
    tool = as_tool(everything)
    assert tool.description == "Look it up.\n\nIn the second paragraph more is said."
    schema = tool.parameters
    assert schema["required"] == ["city", "json", "colour", "point", "addresses"]
    properties = schema["properties"]
    assert properties["city"] == {"type": "string", "description": "Which city it is."}
    assert properties["json"] == {"type": "integer", "minimum": 0, "description": "from Field"}
    assert properties["colour"] == {"$ref": "#/$defs/Colour"}
    assert properties["point"] == {"$ref": "#/$defs/Point", "description": "Where."}
    assert properties["addresses"] == {"type": "array", "items": {"$ref": "#/$defs/Address"}}
    assert properties["unit"] == {"type": "string", "enum": ["c", "f"], "default": "c"}
    assert properties["_days"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert properties["model_id"]["additionalProperties"] == {"type": "integer"}
    assert properties["anything"] == {}
    assert properties["limit"] == {"type": "integer", "maximum": 9, "default": 3, "description": "from default"}


def test_the_schema_admits_good_arguments_and_no_others() -> None:
    """A validator of JSON schema agrees with the signature."""
    validator = jsonschema.Draft202012Validator(as_tool(everything).parameters)
    good = {"city": "x", "json": 1, "colour": "red", "point": {"x": 1}, "addresses": [{"street": "a"}]}
    assert validator.is_valid(good)
    wrongs: tuple[dict[str, Any], ...] = (
        {"json": -1},
        {"colour": "green"},
        {"point": {}},
        {"addresses": [{}]},
        {"unit": "k"},
        {"limit": 10},
    )
    for wrong in wrongs:
        assert not validator.is_valid({**good, **wrong})
    assert not validator.is_valid({"city": "x"})


def test_methods_are_tools_without_their_self() -> None:
    """Bound, class, static and unbound methods take only what a model has to write."""
    service = Service()
    for method in (service.method, Service.method, Service.of_class, Service.static):
        tool = as_tool(method)
        assert tool.parameters == {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
        }
        assert tool.function == method


def test_what_a_partial_has_fixed_is_not_asked_for() -> None:
    """Arguments that functools.partial gives already, by place or by name, are not in the schema."""
    by_name = as_tool(functools.partial(google_style, b="y"))
    by_place = as_tool(functools.partial(functools.partial(google_style, 1)))
    assert (by_name.name, list(by_name.parameters["properties"])) == ("google_style", ["a"])
    assert (by_place.name, list(by_place.parameters["properties"])) == ("google_style", ["b"])
    assert by_place.description == "Do it."


def test_a_decorated_function_shows_its_own_signature() -> None:
    """functools.wraps hands through what the function behind it takes."""

    @functools.wraps(google_style)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        google_style(*args, **kwargs)

    assert as_tool(wrapper).parameters == AB


def test_a_function_without_parameters_or_docstring() -> None:
    """A function that takes nothing and says nothing is a tool with an empty schema."""

    def ping() -> None: ...

    assert as_tool(ping) == Tool("ping", "", EMPTY)


def test_a_function_is_read_once_and_not_kept_alive() -> None:
    """The second reading gives the same schema object, and a function that nobody else holds goes away."""

    def short_lived(a: int) -> None: ...

    assert as_tool(short_lived).parameters is as_tool(short_lived).parameters
    assert as_tool(Service().method).parameters is as_tool(Service().method).parameters
    dies = weakref.ref(short_lived)
    del short_lived
    gc.collect()
    assert dies() is None


def variadic(*rest: int) -> None: ...
def keywords(**rest: int) -> None: ...
def positional(a: int, /) -> None: ...
def unhinted(a: int, b) -> None: ...  # type: ignore[no-untyped-def]  # what the test is about
def unknown(a: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # what the test is about
def uncallable(a: int, call: Callable[[int], int]) -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (variadic, "'*rest' of the tool 'variadic'"),
        (keywords, "'**rest' of the tool 'keywords'"),
        (positional, "'a' of the tool 'positional' is positional-only"),
        (unhinted, "'b' of the tool 'unhinted' has no type hint"),
        (unknown, "name 'NoSuchType' is not defined"),
        (uncallable, "'call' of the tool 'uncallable' has a type without a JSON schema"),
        (lambda: None, "'<lambda>'"),
        (len, "'obj' of the tool 'len'"),
        (Service, "not Service"),
        (5, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_by_name(function: object, says: str) -> None:
    """The refusal names the tool and the parameter that stands in the way."""
    assert says in refused(function)


# -- dicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dict_", [{"type": "function", "function": {"name": "f"}}, {"name": "f"}])
def test_what_is_cached_with_a_tool_is_kept(dict_: dict[str, Any]) -> None:
    """A mark for the provider's prompt cache stands beside the function, and stays there."""
    cache = {"type": "ephemeral"}
    (tool,) = as_tools([{**dict_, "cache_control": cache}])
    assert (tool.name, tool.extra) == ("f", {"cache_control": cache})


def test_openais_dicts_become_tools() -> None:
    """The nested dict, Responses' flat one and a bare function are the same tool."""
    function = {"name": "f", "description": "d", "parameters": AB, "strict": True}
    expected = Tool("f", "d", AB, strict=True)
    assert as_tool({"type": "function", "function": function}) == expected
    assert as_tool({"type": "function", **function}) == expected
    assert as_tool(function) == expected
    assert as_tool({"name": "f"}) == Tool("f", "", EMPTY)
    assert as_tool({"name": "f", "parameters": {}}).parameters == {"type": "object"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "The tool name 'None'"),
        ({"name": "two words"}, "'two words'"),
        ({"name": "x" * 65}, "1 to 64"),
        ({"name": "f", "parameters": []}, "must be a JSON schema, not list"),
        ({"name": "f", "parameters": {"type": "string"}}, "of type 'object', not 'string'"),
        ({"name": "f", "description": 3}, "must be a string"),
        ({"name": "f", "strict": "yes"}, "'strict'"),
        ({"name": "f", "input_schema": {}}, "unknown keys: input_schema"),
        ({"type": "function", "function": {"name": "f"}, "cache": 1}, "unknown keys: cache"),
        ({"type": "function", "function": "f"}, "must be a dict, not str"),
        ({"type": "web_search"}, "not 'web_search'"),
        (Tool("a b"), "'a b'"),
    ],
)
def test_bad_dicts_are_refused(value: object, says: str) -> None:
    """Nothing in a dict is silently dropped: an unknown key is an error as much as a missing name."""
    assert says in refused(value)


# -- smolagents -------------------------------------------------------------------------------------------------------


class Smol:
    """What smolagents asks of a tool: a name, a description, inputs."""

    name = "smol"
    description = "Small."

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def __call__(self) -> None: ...


def test_nullable_inputs_are_not_required_and_may_be_null() -> None:
    """Nullable by word, by type or by anyOf is the same: it may be left out, and None is a valid value."""
    inputs = {
        "must": {"type": "string", "description": "Needed."},
        "word": {"type": "integer", "description": "", "nullable": True},
        "types": {"type": ["integer", "null"], "description": ""},
        "branch": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": ""},
        "open": {"anyOf": [{"type": "string"}], "nullable": True},
        "enum": {"type": "string", "enum": ["a"], "nullable": True},
        "default": {"type": "string", "default": "x"},
    }
    tool = as_tool(Smol(inputs))
    assert (tool.name, tool.description) == ("smol", "Small.")
    assert tool.parameters["required"] == ["must"]
    validator = jsonschema.Draft202012Validator(tool.parameters)
    assert validator.is_valid({"must": "x"})
    for name in ("word", "types", "branch", "open", "enum"):
        assert validator.is_valid({"must": "x", name: None})
        assert not validator.is_valid({"must": "x", name: [1]})
    assert not validator.is_valid({"must": None})
    assert "nullable" not in str(tool.parameters)


def test_any_constrains_nothing_at_every_depth() -> None:
    """smolagents' type "any" is no word of JSON schema and must not leak, however deep it stands."""
    inputs = {
        "a": {"type": "any", "description": "d"},
        "b": {"type": "array", "items": {"type": "any"}},
        "c": {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "any"}}}},
        "d": {"type": ["string", "any"]},
        "e": {"type": "object", "additionalProperties": {"type": "any"}},
        "f": {"anyOf": [{"type": "array", "items": {"type": "any"}}, {"type": "string"}]},
    }
    parameters = as_tool(Smol(inputs)).parameters
    assert "any'" not in str(parameters)
    assert parameters["properties"]["a"] == {"description": "d"}
    jsonschema.Draft202012Validator.check_schema(parameters)
    validator = jsonschema.Draft202012Validator(parameters)
    assert validator.is_valid({"a": 1, "b": [1, "x", None], "c": {"x": [{}]}, "d": 3, "e": {"k": 1}, "f": [1]})


def test_pictures_travel_by_the_name_of_their_variable() -> None:
    """A model can write no picture: smolagents' image and audio inputs are strings."""
    parameters = as_tool(Smol({"i": {"type": "image"}, "a": {"type": "audio", "nullable": True}})).parameters
    assert parameters["properties"] == {"i": {"type": "string"}, "a": {"type": ["string", "null"]}}


def test_an_object_is_read_again_when_it_changes() -> None:
    """What is remembered of an object is dropped with the first change, also one inside of its inputs."""
    smol = Smol({"a": {"type": "string"}})
    first = as_tool(smol)
    assert as_tool(smol).parameters is first.parameters
    smol.inputs["a"]["type"] = "integer"
    assert as_tool(smol).parameters["properties"] == {"a": {"type": "integer"}}
    assert first.parameters["properties"] == {"a": {"type": "string"}}


def test_the_inputs_are_not_changed() -> None:
    """The object's own dict stays as it is, and the schema shares nothing with it."""
    inputs = {"a": {"type": "any", "nullable": True, "enum": ["x"]}}
    as_tool(Smol(inputs))
    assert inputs == {"a": {"type": "any", "nullable": True, "enum": ["x"]}}


@pytest.mark.parametrize("inputs", [None, ["a"], {"a": "string"}])
def test_inputs_of_another_shape_are_refused(inputs: object) -> None:
    """Inputs that are no dict of dicts are refused with the tool's name."""
    assert "'smol'" in refused(Smol(inputs))


def test_an_object_without_a_hash_is_a_tool_too() -> None:
    """Objects that cannot be remembered are read each time."""

    @dataclasses.dataclass
    class Data:
        name: str
        description: str
        inputs: dict[str, Any]

    assert as_tool(Data("d", "", {})) == Tool("d", "", {"type": "object", "properties": {}, "required": []})


# -- lists and choices ------------------------------------------------------------------------------------------------


def test_lists_of_tools() -> None:
    """A list may mix every kind of tool; None is no tools."""
    tools = as_tools([google_style, {"name": "f"}, Tool("g"), Smol({})])
    assert [tool.name for tool in tools] == ["google_style", "f", "g", "smol"]
    assert as_tools(None) == ()
    assert as_tools(()) == ()
    assert as_tools(iter([Tool("g")])) == (Tool("g"),)


@pytest.mark.parametrize("value", ["f", {"name": "f"}, google_style, Tool("f"), 5])
def test_a_single_tool_is_no_list(value: object) -> None:
    """One tool in place of a list of tools is refused, and the sentence says so."""
    with pytest.raises(InvalidRequestError, match="must be a list of tools"):
        as_tools(value)


def test_a_name_given_twice_is_refused() -> None:
    """Two tools of one name could not be told apart in the answer."""
    with pytest.raises(InvalidRequestError, match="'google_style'"):
        as_tools([google_style, {"name": "google_style"}])


def test_every_way_to_choose() -> None:
    """The three words, a name, OpenAI's dict, the Tool and what it was made of all say which tool must be called."""
    tools = as_tools([google_style, {"name": "f"}])
    assert as_tool_choice(None, tools) is None
    for word in ("auto", "none", "required"):
        assert as_tool_choice(word, tools) == word
    for choice in ("f", {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}, tools[1]):
        assert as_tool_choice(choice, tools) == "f"
    assert as_tool_choice(google_style, tools) == "google_style"


def test_without_tools_nothing_can_be_demanded() -> None:
    """ "auto" and "none" mean the same without tools; "required" and a name cannot be met."""
    assert as_tool_choice("auto", ()) == "auto"
    assert as_tool_choice("none", ()) == "none"
    for demand in ("required", "f", Tool("f")):
        with pytest.raises(InvalidRequestError, match="there are no"):
            as_tool_choice(demand, ())


@pytest.mark.parametrize("choice", ["g", 5, {"type": "function"}, {"type": "auto"}, Tool("g"), Tool("none")])
def test_unknown_choices_are_refused(choice: object) -> None:
    """A tool that is not among the tools, and a shape that says nothing, are refused before anything is sent."""
    with pytest.raises(InvalidRequestError):
        as_tool_choice(choice, (Tool("f"), Tool("none")))


def test_importing_tools_imports_no_third_party_package() -> None:
    """pydantic and griffe are loaded by the first function that is read, and not by the import."""
    code = (
        "import sys, asyncmodels.tools, asyncmodels.formats, asyncmodels.messages, asyncmodels.stopping;"
        "print({'pydantic', 'griffe', 'jsonschema', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
