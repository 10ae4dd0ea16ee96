"""What an answer must look like: ``response_format`` and ``grammar`` as callers write them, and the parsing of answers.

A type (pydantic model, dataclass, TypedDict, ``list[int]``) becomes a schema that servers can guarantee and a ``parse``
that returns an instance; a JSON schema becomes a ``parse`` that validates. Both are made once and remembered.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from types import GenericAlias
from typing import Any, NoReturn

from asyncmodels.errors import InvalidRequestError, ResponseFormatError
from asyncmodels.plain_schema import doubtful_place
from asyncmodels.strict import is_strict, resolve, strictened
from asyncmodels.types import EBNF, Choice, Grammar, JSONSchema, Regex, Request, Response, ResponseFormat, evolve

# pydantic and jsonschema are imported where they are first needed: they cost far more than the rest of the package, and
# most programs never ask for a format.

__all__ = ["as_grammar", "as_response_format", "parse_response"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_LONGEST_DOUBTFUL = 20_000
"""Characters of a schema that is checked by the schema of schemas, which takes some ten microseconds for each."""
_SCHEMA_WORDS = frozenset(
    {"type", "properties", "items", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$defs", "$schema", "required"}
)


def as_response_format(value: object) -> ResponseFormat | None:
    """What the content must be: ``"json"``, a type, a JSON schema, OpenAI's dict, a ResponseFormat; None for any text.

    A type whose schema is no object (``list[int]``) is asked for as ``{"value": ...}`` and parsed back to the value,
    because servers want an object on top. Raises InvalidRequestError for a bad schema and a type that has none.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if isinstance(value, str):
        if value in ("json", "json_object"):
            return _JSON
        if value == "text":
            return None
        raise InvalidRequestError(f"Unknown response_format {value[:40]!r}; the only words are 'json' and 'text'.")
    if isinstance(value, Mapping):
        return _from_dict(value)
    try:
        hash(value)
    except TypeError:  # Annotated with something that has no hash: usable, and made anew each time
        return _from_type(value)
    return _remembered_type(value)


def parse_response(request: Request, response: Response) -> Response:
    """The response with ``parsed`` set, where the request has a response format and the answer is no tool call.

    Raises ResponseFormatError, which carries the response, where the content does not satisfy the format.
    """
    format = request.response_format
    if format is None or response.tool_calls:
        return response
    try:
        if response.content is None:
            raise ValueError("The answer has no content.")
        parsed = format.parse(response.content)
    except ValueError as error:
        message = f"The answer does not satisfy the response_format: {error}"
        if response.finish_reason == "length":
            message = f"The answer was cut by max_tokens before it satisfied the response_format: {error}"
        raise ResponseFormatError(message, response=response) from error
    return evolve(response, parsed=parsed)


# -- JSON -------------------------------------------------------------------------------------------------------------


def _unfenced(content: str) -> str:
    """What stands inside of the one fenced block that is the whole content, else the content.

    Servers that hold a model to the schema never send a fence, small local models often do.
    """
    text = content.strip()
    if not (text.startswith("```") and text.endswith("```")):
        return content
    language, newline, body = text[3:-3].partition("\n")
    return body if newline and language.strip().lower() in ("", "json") and "\n```" not in body else content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value.")


def _load(content: str) -> Any:
    text = _unfenced(content)
    if not text.strip():
        raise ValueError("The content is empty.")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"The content is not JSON: {_short(str(error))}.") from error
    except RecursionError as error:
        raise ValueError("The content is not JSON that can be read: it is nested too deeply.") from error


_JSON = ResponseFormat(parse=_load)


def _short(text: str) -> str:
    """One line of at most 200 characters, without a full stop."""
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 200 else f"{text[:197]}..."


# -- JSON schemas -----------------------------------------------------------------------------------------------------


def _from_dict(value: Mapping[str, Any]) -> ResponseFormat | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _JSON
    if kind != "json_schema":
        return _from_schema(value, None, None)
    inner = value.get("json_schema", value)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise InvalidRequestError(
            'A response_format of type json_schema has the shape {"type": "json_schema", '
            '"json_schema": {"name": ..., "schema": {...}}}.'
        )
    schema = inner["schema"]
    if inner.get("description") and "description" not in schema:
        schema = {**schema, "description": inner["description"]}
    strict = inner.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError("'strict' of a response_format must be true or false.")
    return _from_schema(schema, inner.get("name"), strict)


def _from_schema(schema: Mapping[str, Any], name: object, strict: bool | None) -> ResponseFormat:
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise InvalidRequestError(
            f"The response_format's name {str(name)[:80]!r} must be 1 to 64 letters of a-z and A-Z, digits, "
            "underscores and hyphens."
        )
    return _remembered_schema(_schema_text(schema), name, strict)


def _schema_text(schema: object) -> str:
    """The schema as JSON text: the key it is remembered by, and a copy that nobody can change under us."""
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"A JSON schema is a dict, not {type(schema).__name__}.")
    if not schema.keys() & _SCHEMA_WORDS:
        raise InvalidRequestError("The dict is no JSON schema: it has neither a type nor properties.")
    try:
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The JSON schema holds something that JSON cannot: {_short(str(error))}.") from error


@functools.lru_cache(maxsize=256)
def _remembered_schema(text: str, name: str | None, strict: bool | None) -> ResponseFormat:
    schema: dict[str, Any] = json.loads(text)
    check = _validator(text)

    def parse(content: str) -> Any:
        value = _load(content)
        check(value)
        return value

    return ResponseFormat(
        name=name or _name(schema.get("title")),
        schema=schema,
        strict=is_strict(schema) if strict is None else strict,
        parse=parse,
    )


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Callable[[Any], None]:
    """A check that raises ValueError for a value that the schema does not admit; the schema itself is checked here."""
    import jsonschema
    import referencing

    schema = json.loads(text)
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        doubtful = doubtful_place(schema)
        if doubtful is not None and len(text) > _LONGEST_DOUBTFUL:
            raise InvalidRequestError(
                f"The JSON schema is not valid at {doubtful}, or too long for what it says there."
            )
        if doubtful is not None:
            cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InvalidRequestError(
            f"The JSON schema is not valid at {error.json_path}: {_short(error.message)}."
        ) from error
    for ref in _references(schema):
        if "$id" not in text and resolve(schema, ref) is None:
            raise InvalidRequestError(f"The JSON schema refers to {ref[:100]!r}, which is not in it.")
    # With a registry of its own jsonschema never fetches a reference from the network.
    validator = cls(schema, registry=referencing.Registry())

    def check(value: Any) -> None:
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except (referencing.exceptions.Unresolvable, RecursionError) as cause:
            raise ValueError(f"The content cannot be checked against the schema: {_short(str(cause))}.") from cause
        if error is not None:
            raise ValueError(f"{_place(error.absolute_path)}: {_short(error.message)}.")

    return check


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            elif key not in ("enum", "const", "default", "examples"):
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _place(path: Any) -> str:
    """Where in the content: ``people[2].name``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return f"The field {text!r}" if text else "The content"


def _name(wish: object) -> str:
    name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(wish or ""))[:64].strip("_")
    return name or "response"


# -- types ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _remembered_type(value: Any) -> ResponseFormat:
    return _from_type(value)


def _from_type(value: Any) -> ResponseFormat:
    import pydantic

    is_type = isinstance(value, type)
    if not is_type and (isinstance(value, pydantic.BaseModel) or dataclasses.is_dataclass(value)):
        raise InvalidRequestError(f"response_format takes the class {type(value).__name__}, not an instance of it.")
    if inspect.isroutine(value):
        raise InvalidRequestError("response_format takes a type or a JSON schema, not a function.")
    name = _name(value.__name__ if is_type and not isinstance(value, GenericAlias) else None)
    try:
        adapter = pydantic.TypeAdapter(value)
        schema = _schema_of(adapter)
        parse = functools.partial(_validate, adapter)
        if not _is_object(schema):
            wrapper = pydantic.create_model(
                "Response", __config__=pydantic.ConfigDict(extra="forbid"), value=(value, ...)
            )
            wrapped = pydantic.TypeAdapter(wrapper)
            schema = _schema_of(wrapped)
            parse = functools.partial(_validate_wrapped, wrapped, adapter)
    except Exception as error:  # a type may bring its own hooks, which raise what they like
        reason = _short(str(error).split("\n", 1)[0])
        raise InvalidRequestError(f"The response_format {name!r} has no JSON schema: {reason}.") from error
    strict = strictened(schema)
    return ResponseFormat(
        name=name, schema=schema if strict is None else strict, strict=strict is not None, parse=parse
    )


def _schema_of(adapter: Any) -> dict[str, Any]:
    from pydantic.json_schema import GenerateJsonSchema

    class Schema(GenerateJsonSchema):
        # A default that JSON cannot hold is the type's own affair: it is filled in when the answer is parsed.
        ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  # pydantic's own spelling

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False  # a title made of the name says nothing that the name does not say

    schema: dict[str, Any] = adapter.json_schema(schema_generator=Schema)
    return schema


def _is_object(schema: Mapping[str, Any]) -> bool:
    """Whether an object is on top, be it by reference, as in a type that contains itself."""
    target = resolve(schema, schema["$ref"]) if "$ref" in schema else schema
    return target is not None and target.get("type") == "object"


def _validate(adapter: Any, content: str) -> Any:
    import pydantic

    text = _unfenced(content)
    if not text.strip():
        raise ValueError("The content is empty.")
    try:
        return adapter.validate_json(text)
    except pydantic.ValidationError as error:
        # The input is left out: it may be the whole content.
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        first = errors[0]
        raise ValueError(f"{_place(first['loc'])}: {_short(first['msg'])}{more}.") from None


def _validate_wrapped(wrapped: Any, adapter: Any, content: str) -> Any:
    """The value in its object, or, from a model that was not held to the schema, the bare value."""
    try:
        return _validate(wrapped, content).value
    except ValueError:
        try:
            return _validate(adapter, content)
        except ValueError:
            pass
        raise


# -- grammars ---------------------------------------------------------------------------------------------------------


def as_grammar(value: object) -> Grammar | None:
    """Checks a Regex, EBNF, Choice or JSONSchema before anything is sent; raises InvalidRequestError."""
    if value is None:
        return None
    if isinstance(value, Regex):
        try:
            re.compile(value.pattern)
        except (re.error, TypeError) as error:
            raise InvalidRequestError(
                f"The pattern of the Regex grammar is not valid: {_short(str(error))}."
            ) from error
        return value
    if isinstance(value, EBNF):
        if not isinstance(value.grammar, str) or not value.grammar.strip():
            raise InvalidRequestError("The EBNF grammar must be a text that is not empty.")
        return value
    if isinstance(value, Choice):
        options: Any = value.options
        if not isinstance(options, tuple | list) or not options or not all(isinstance(item, str) for item in options):
            raise InvalidRequestError("The options of a Choice grammar must be strings, and at least one.")
        return value if isinstance(options, tuple) else Choice(tuple(options))
    if isinstance(value, JSONSchema):
        _validator(_schema_text(value.schema))
        return value
    raise InvalidRequestError(f"A grammar is a Regex, EBNF, Choice or JSONSchema, not {type(value).__name__}.")
