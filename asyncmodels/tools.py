"""What callers give as tools -> Tool values.

A tool is a Tool, OpenAI's dict, a Python function with type hints and a docstring, or an object with ``name``,
``description`` and ``inputs`` as smolagents has them. Whatever cannot become a tool is an InvalidRequestError.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import Tool

# pydantic and griffe are imported by the functions that read a signature and a docstring: together they cost more than
# the rest of the package, and a program whose tools are dicts, or that has none, never needs them.

__all__ = ["as_tool", "as_tool_choice", "as_tools"]

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def as_tool(value: object) -> Tool:
    """Makes a Tool of whatever describes one. What a function says is read once, and remembered while it lives.

    Raises InvalidRequestError, naming the tool and the parameter, for a missing type hint, ``*args`` or ``**kwargs``,
    a type that has no JSON schema, a bad name, or a dict or object of another shape.
    """
    if isinstance(value, Tool):
        _check(value.name, value.parameters)
        return value
    if isinstance(value, _FUNCTIONS) or inspect.isroutine(value):
        spec = _spec(value)
        return Tool(spec.name, spec.description, spec.parameters, function=value)
    if isinstance(value, Mapping):
        return _from_dict(value)
    if all(hasattr(value, name) for name in ("name", "description", "inputs")) and not isinstance(value, type):
        return _from_inputs(value)
    raise InvalidRequestError(
        f"A tool is a Tool, a dict, a function, or an object with name, description and inputs, not {_kind(value)}."
    )


def as_tools(values: object) -> tuple[Tool, ...]:
    """Makes Tools of a list of whatever describes one; None is no tools.

    Raises InvalidRequestError where ``as_tool`` does, and for a name given twice.
    """
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping | Tool) or not isinstance(values, Iterable):
        raise InvalidRequestError(f"tools must be a list of tools, not {_kind(values)}.")
    tools = tuple([as_tool(value) for value in values])
    if len(tools) > 1:
        seen: set[str] = set()
        for tool in tools:
            if tool.name in seen:
                raise InvalidRequestError(f"Two tools are called {tool.name!r}; the model could not tell them apart.")
            seen.add(tool.name)
    return tools


def as_tool_choice(value: object, tools: Sequence[Tool]) -> str | None:
    """Which tool the model must call: None, ``"auto"``, ``"none"``, ``"required"``, or the name of one of ``tools``.

    Takes these words, a name, OpenAI's dict, a Tool, or what the Tool was made of. Raises InvalidRequestError where a
    call is demanded and there is no such tool.
    """
    if value is None:
        return None
    if isinstance(value, str) and value in ("auto", "none", "required"):
        if value == "required" and not tools:
            raise InvalidRequestError("tool_choice='required' needs tools, and there are none.")
        return value
    name = _chosen(value)
    if name in ("auto", "none", "required"):
        raise InvalidRequestError(f"A tool called {name!r} cannot be chosen by its name, which means something else.")
    names = [tool.name for tool in tools]
    if name not in names:
        has = f"the tools are {', '.join(names)}" if names else "there are no tools"
        raise InvalidRequestError(f"tool_choice names the tool {name[:64]!r}, which is not among the tools: {has}.")
    return name


def _chosen(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, Mapping) else None
        if value.get("type") != "function" or not isinstance(name, str):
            raise InvalidRequestError(
                'A tool_choice dict has the shape {"type": "function", "function": {"name": ...}}.'
            )
        return name
    return as_tool(value).name


class _Spec(NamedTuple):
    name: str
    description: str
    parameters: dict[str, Any]


def _kind(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _check(name: object, parameters: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"The tool name {str(name)[:80]!r} must be 1 to 64 letters of a-z and A-Z, digits, underscores and hyphens."
        )
    if type(parameters) is not dict and not isinstance(parameters, Mapping):
        raise InvalidRequestError(
            f"The parameters of the tool {name!r} must be a JSON schema, not {_kind(parameters)}."
        )
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(
            f"The parameters of the tool {name!r} must be a schema of type 'object', not {parameters['type']!r}."
        )


# -- from OpenAI's dict -----------------------------------------------------------------------------------------------


def _from_dict(value: Mapping[str, Any]) -> Tool:
    if value.get("type", "function") != "function":
        raise InvalidRequestError(f"A tool dict has type 'function', not {str(value['type'])[:40]!r}.")
    inner = value.get("function")
    beside = {"type", "function", "cache_control"}
    if inner is None:
        inner = {key: item for key, item in value.items() if key not in beside}
    elif not isinstance(inner, Mapping):
        raise InvalidRequestError(f"The 'function' of a tool dict must be a dict, not {_kind(inner)}.")
    elif value.keys() - beside:
        raise _unknown(inner, value.keys() - beside)
    if inner.keys() - {"name", "description", "parameters", "strict"}:
        raise _unknown(inner, inner.keys() - {"name", "description", "parameters", "strict"})
    name = inner.get("name")
    parameters = inner.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    description = inner.get("description") or ""
    strict = inner.get("strict")
    _check(name, parameters)
    if not isinstance(description, str):
        raise InvalidRequestError(f"The description of the tool {name!r} must be a string, not {_kind(description)}.")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError(f"'strict' of the tool {name!r} must be true or false, not {_kind(strict)}.")
    if not parameters.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        parameters = {"type": "object", **parameters}
    cache = value.get("cache_control")
    extra = None if cache is None else {"cache_control": cache}
    return Tool(str(name), description, parameters, strict=strict, extra=extra)


def _unknown(inner: Mapping[str, Any], keys: Iterable[str]) -> InvalidRequestError:
    return InvalidRequestError(
        f"The tool dict {str(inner.get('name'))[:64]!r} has unknown keys: {', '.join(map(str, keys))}; "
        "a function has name, description, parameters and strict."
    )


# -- from smolagents' inputs ------------------------------------------------------------------------------------------


# What such an object said and what was made of it: agents pass the same objects with every call, and may change them.
_readings: weakref.WeakKeyDictionary[Any, tuple[Any, Any, Any, _Spec]] = weakref.WeakKeyDictionary()


def _from_inputs(value: Any) -> Tool:
    name, description, inputs = value.name, value.description, value.inputs
    try:
        known = _readings.get(value)
        if known is None or known[:3] != (name, description, inputs):
            known = (name, description, copy.deepcopy(inputs), _read_inputs(name, description, inputs))
            _readings[value] = known
        spec = known[3]
    except TypeError:  # an object without a hash, or that cannot be referred to weakly
        spec = _read_inputs(name, description, inputs)
    return Tool(spec.name, spec.description, spec.parameters, function=value if callable(value) else None)


def _read_inputs(name: Any, description: Any, inputs: Any) -> _Spec:
    _check(name, {})
    if not isinstance(inputs, Mapping) or not all(isinstance(item, Mapping) for item in inputs.values()):
        raise InvalidRequestError(f"The inputs of the tool {name!r} must be a dict that describes each by a dict.")
    properties = {key: _json_schema(item) for key, item in inputs.items()}
    required = [key for key, item in inputs.items() if not _nullable(item) and "default" not in item]
    return _Spec(name, str(description or ""), {"type": "object", "properties": properties, "required": required})


def _nullable(schema: Mapping[str, Any]) -> bool:
    """Whether None is allowed, which in smolagents' words means that the argument may be left out."""
    types = schema.get("type")
    if schema.get("nullable") or types == "null" or (isinstance(types, list | tuple) and "null" in types):
        return True
    return any(isinstance(branch, Mapping) and _nullable(branch) for branch in schema.get("anyOf") or ())


def _json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema for smolagents' dialect, whose ``any`` and ``nullable`` are no words of JSON schema."""
    result = {key: _copied(item) for key, item in schema.items() if key not in _SUBSCHEMAS and key != "nullable"}
    for key, read in _SUBSCHEMAS.items():
        if key in schema:
            result[key] = read(schema[key])
    types = schema.get("type")
    if types is not None:
        names = [_TYPES.get(name, name) for name in ([types] if isinstance(types, str) else types)]
        if "any" in names:
            del result["type"]
        else:
            if schema.get("nullable") and "null" not in names:
                names.append("null")
            result["type"] = names[0] if len(names) == 1 else names
    if schema.get("nullable"):
        if isinstance(result.get("enum"), list) and None not in result["enum"]:
            result["enum"].append(None)
        if isinstance(result.get("anyOf"), list) and not _nullable({"anyOf": result["anyOf"]}):
            result["anyOf"].append({"type": "null"})
    return result


def _copied(value: Any) -> Any:
    return value if isinstance(value, str) else copy.deepcopy(value)


def _one(value: Any) -> Any:
    return _json_schema(value) if isinstance(value, Mapping) else _copied(value)


def _each(value: Any) -> Any:
    return [_one(item) for item in value] if isinstance(value, list | tuple) else _copied(value)


def _by_name(value: Any) -> Any:
    return {key: _one(item) for key, item in value.items()} if isinstance(value, Mapping) else _copied(value)


_SUBSCHEMAS: Mapping[str, Callable[[Any], Any]] = {
    "items": _one,
    "additionalProperties": _one,
    "anyOf": _each,
    "oneOf": _each,
    "allOf": _each,
    "prefixItems": _each,
    "properties": _by_name,
    "$defs": _by_name,
}
# An agent's model cannot write a picture: it writes the name of the variable that holds one.
_TYPES: Mapping[str, str] = {"image": "string", "audio": "string"}


# -- from a Python function -------------------------------------------------------------------------------------------


# Only the spec is kept, never the Tool: a Tool holds its function, and a function held by its own entry never dies.
_specs: weakref.WeakKeyDictionary[Any, dict[bool, _Spec]] = weakref.WeakKeyDictionary()


def _spec(function: Any) -> _Spec:
    """What the function says about itself, remembered; a bound method is remembered by the function behind it."""
    bound = inspect.ismethod(function)
    key = function.__func__ if bound else function
    try:
        known = _specs.setdefault(key, {})
    except TypeError:  # a builtin that cannot be referred to weakly
        known = {}
    spec = known.get(bound)
    if spec is None:
        spec = known[bound] = _read(function)
    return spec


def _read(function: Any) -> _Spec:
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", "")
    _check(name, {})
    parameters = _parameters(function, plain, name)
    hints = _hints(plain, name)
    for parameter in parameters:
        if hints.get(parameter.name, parameter.annotation) is inspect.Parameter.empty:
            raise InvalidRequestError(f"The parameter {parameter.name!r} of the tool {name!r} has no type hint.")
    schema = _signature_schema(
        name,
        {
            parameter.name: (hints.get(parameter.name, parameter.annotation), parameter.default)
            for parameter in parameters
        },
    )
    description, arguments = _docstring(inspect.getdoc(plain) or "")
    for key, item in schema["properties"].items():
        if arguments.get(key):
            item.setdefault("description", arguments[key])
    return _Spec(name, description, schema)


def _parameters(function: Any, plain: Any, name: str) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"The tool {name!r} has no signature that can be read.") from error
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        del parameters[0]
    fixed = set(function.keywords) if isinstance(function, functools.partial) else set()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidRequestError(
                f"The parameter {str(parameter).split(':')[0]!r} of the tool {name!r} stands for any number of "
                "arguments; give each a name and a type hint."
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InvalidRequestError(
                f"The parameter {parameter.name!r} of the tool {name!r} is positional-only; models pass by name."
            )
    return [parameter for parameter in parameters if parameter.name not in fixed]


def _hints(plain: Any, name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(plain), include_extras=True)
    except Exception as error:  # an annotation is any expression, so evaluating it may raise anything
        raise InvalidRequestError(f"The type hints of the tool {name!r} cannot be evaluated: {error}.") from error


def _signature_schema(name: str, parameters: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    try:
        schema = _object_schema(parameters)
    except Exception as error:  # pydantic and the types themselves raise what they like
        culprit = next((key for key, item in parameters.items() if not _has_schema(key, item)), None)
        where = f"The parameter {culprit!r}" if culprit else "A parameter"
        raise InvalidRequestError(f"{where} of the tool {name!r} has a type without a JSON schema.") from error
    schema.pop("title", None)
    schema.setdefault("properties", {})
    return schema


def _has_schema(key: str, item: tuple[Any, Any]) -> bool:
    try:
        _object_schema({key: item})
    except Exception:  # see above: whatever it is, this is the parameter that raises it
        return False
    return True


def _object_schema(parameters: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    import pydantic
    from pydantic.json_schema import GenerateJsonSchema

    class Schema(GenerateJsonSchema):
        # A default that JSON cannot hold only means "may be left out".
        ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  # pydantic's own spelling

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False  # a title made of the name says nothing that the name does not say

    fields: dict[str, Any] = {}
    for index, (key, (hint, default)) in enumerate(parameters.items()):
        # The model's own field names are made up: an argument may be called `json`, `_x` or `model_id`.
        field = ... if default is inspect.Parameter.empty else default
        fields[f"field{index}"] = (typing.Annotated[hint, pydantic.Field(alias=key)], field)
    model = pydantic.create_model("Arguments", **fields)
    schema: dict[str, Any] = model.model_json_schema(by_alias=True, schema_generator=Schema)
    return schema


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description and what is said about each argument, in Google's, NumPy's or Sphinx's style."""
    if not text:
        return "", {}
    import griffe

    docstring = griffe.Docstring(text)
    style, _ = griffe.infer_docstring_style(docstring, default=griffe.Parser.google)
    options: dict[str, Any] = {"warnings": False}  # griffe misses annotations that it was never shown
    sections = griffe.parse(docstring, style, **options)
    description: list[str] = []
    arguments: dict[str, str] = {}
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.text:
            description.append(section.value.strip())
        elif section.kind in (
            griffe.DocstringSectionKind.parameters,
            griffe.DocstringSectionKind.other_parameters,
        ):
            for argument in section.value:
                arguments[argument.name.lstrip("*")] = " ".join(argument.description.split())
    return "\n\n".join(part for part in description if part), arguments
