"""A Request as Amazon Bedrock's Converse API wants it. No I/O, and nothing of botocore.

The parameters are plain dicts; https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html
describes them. ``converse_blocks.py`` turns the messages into content blocks, ``converse_answer.py`` reads the answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.messages import convert_roles, flatten
from asyncmodels.remote.converse_blocks import (
    BLOCKS,
    CACHE_NAMES,
    blocks_of,
    cache_point,
    check_extra,
    has_tool_blocks,
)
from asyncmodels.remote.converse_format import (
    Form,
    FormatTool,
    form_of,
    format_tool,
    output_config,
    tool_entry,
)
from asyncmodels.request import Parameters
from asyncmodels.types import Request, Tool

__all__ = [
    "CONVERSE_PARAMETERS",
    "ConverseParameters",
    "Dialect",
    "FormatTool",
    "StructuredOutput",
    "check_dicts",
    "inference_fields",
    "request_params",
]

StructuredOutput: TypeAlias = Literal["auto", "native", "tool"]


class ConverseParameters(Parameters, total=False):
    """The fields of ``Request`` as callers write them, and beside them Converse's own parameters by its own names."""

    inferenceConfig: Mapping[str, Any] | None  # noqa: N815  # Converse's own name, as are those below
    guardrailConfig: Mapping[str, Any] | None  # noqa: N815
    additionalModelRequestFields: Mapping[str, Any] | None  # noqa: N815
    additionalModelResponseFieldPaths: Sequence[str] | None  # noqa: N815
    requestMetadata: Mapping[str, str] | None  # noqa: N815
    performanceConfig: Mapping[str, Any] | None  # noqa: N815
    promptVariables: Mapping[str, Any] | None  # noqa: N815
    serviceTier: Mapping[str, Any] | None  # noqa: N815
    toolConfig: Mapping[str, Any] | None  # noqa: N815
    outputConfig: Mapping[str, Any] | None  # noqa: N815


CONVERSE_PARAMETERS = frozenset(ConverseParameters.__annotations__) - frozenset(Parameters.__annotations__)
"""The names of ``ConverseParameters`` that ``Parameters`` does not have."""

_INFERENCE = {
    "maxTokens": "max_tokens",
    "temperature": "temperature",
    "topP": "top_p",
    "stopSequences": "stop_sequences",
}
_OURS = ("modelId", "messages", "system")
_DICTS = CONVERSE_PARAMETERS - {"additionalModelResponseFieldPaths"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one model is spoken to."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Converse parameters of every call."""
    role_conversions: Mapping[str, str] = field(default_factory=dict)
    flatten_messages: bool = False
    structured_output: StructuredOutput = "auto"
    """``native`` asks by ``outputConfig``, ``tool`` by a tool that the model must call."""
    knows_output_config: bool = False
    """Whether the client's service model has ``outputConfig``, as those since 2026 do."""
    knows_strict_tools: bool = False
    parameters: frozenset[str] = CONVERSE_PARAMETERS
    """Those of Converse that the client's service model knows."""
    blocks: frozenset[str] = BLOCKS
    """The kinds of content that it knows."""


def inference_fields(config: Any) -> dict[str, Any]:
    """An ``inferenceConfig`` by the names of ``Request``. Raises InvalidRequestError for a field that it has not."""
    if not isinstance(config, Mapping):
        raise InvalidRequestError(f"inferenceConfig must be a dict, not {type(config).__name__}.")
    unknown = [str(name) for name in config if name not in _INFERENCE]
    if unknown:
        raise InvalidRequestError(
            f"inferenceConfig has no {unknown[0]!r}: its fields are {', '.join(_INFERENCE)}; "
            "what only one model knows goes into additionalModelRequestFields."
        )
    return {_INFERENCE[name]: value for name, value in config.items()}


def check_dicts(parameters: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for one of Converse's ``parameters`` that must be a dict, and is none."""
    for name, value in parameters.items():
        if name in _DICTS and not isinstance(value, Mapping | None):
            raise InvalidRequestError(f"{name} must be a dict, not {type(value).__name__}.")


# -- out --------------------------------------------------------------------------------------------------------------


def request_params(
    request: Request, model_id: str, dialect: Dialect, *, stream: bool
) -> tuple[dict[str, Any], FormatTool | None]:
    """The parameters of ``converse`` for ``request``, and the name of the tool that stands for its response format.

    Raises InvalidRequestError and UnsupportedError for what Converse cannot take.
    """
    extra = {name: value for name, value in {**dialect.settings, **request.extra}.items() if value is not None}
    for name in _OURS:
        if name in extra:
            raise InvalidRequestError(f"extra sets {name!r}, which the request itself decides.")
    for name in extra:
        if name not in dialect.parameters:
            raise _unknown(name, dialect)
    check_dicts(extra)
    messages = request.messages
    if dialect.role_conversions:
        messages = convert_roles(messages, dialect.role_conversions)
    if dialect.flatten_messages:
        messages = flatten(messages)
    config, asks = _tool_config(request, dialect, extra.pop("toolConfig", None), extra)
    system, turns = blocks_of(
        messages, tools_as_text=config is None and has_tool_blocks(messages), known=dialect.blocks
    )
    if not turns:
        raise InvalidRequestError("The messages are nothing but system prompts: Converse wants one of the user's.")
    params: dict[str, Any] = {"modelId": model_id, "messages": turns}
    if system:
        params["system"] = system
    inference = _inference(request, extra.pop("inferenceConfig", None))
    if inference:
        params["inferenceConfig"] = inference
    if config is not None:
        params["toolConfig"] = config
    guardrail = extra.get("guardrailConfig")
    if not stream and isinstance(guardrail, Mapping) and "streamProcessingMode" in guardrail:
        extra["guardrailConfig"] = {key: value for key, value in guardrail.items() if key != "streamProcessingMode"}
    params.update(extra)
    return params, asks


def _unknown(name: str, dialect: Dialect) -> InvalidRequestError | UnsupportedError:
    if name in CONVERSE_PARAMETERS:
        return UnsupportedError(f"extra has {name!r}, which needs a newer botocore: this one's Converse has it not.")
    close = difflib.get_close_matches(str(name), dialect.parameters, n=1)
    if close:
        return InvalidRequestError(f"extra has {name!r}, which Converse does not know: did you mean {close[0]!r}?")
    return InvalidRequestError(
        f"extra has {name!r}, which Converse does not know: what only one model knows goes into "
        "additionalModelRequestFields."
    )


def _inference(request: Request, given: Any) -> dict[str, Any]:
    fields = inference_fields(given) if given is not None else {}
    config: dict[str, Any] = {}
    for name, ours in _INFERENCE.items():
        value = getattr(request, ours)
        if value is None or value == ():
            value = fields.get(ours)
        if value is not None:
            config[name] = value
    stops = config.get("stopSequences")
    if isinstance(stops, Sequence) and not isinstance(stops, str):
        # Claude refuses a stop that is nothing but white space; it is cut from the answer here in any case.
        kept = [stop for stop in stops if not isinstance(stop, str) or stop.strip()]
        if kept:
            config["stopSequences"] = kept
        else:
            del config["stopSequences"]
    return config


def _tool_config(
    request: Request, dialect: Dialect, given: Any, extra: dict[str, Any]
) -> tuple[dict[str, Any] | None, FormatTool | None]:
    """The ``toolConfig``, and the tool that asks for the response format where ``outputConfig`` cannot."""
    tools = [entry for tool in request.tools for entry in _tool(tool, dialect)]
    choice = request.tool_choice
    form = form_of(request)
    by_tool = False
    if form is not None:
        if "outputConfig" in extra:
            raise InvalidRequestError("extra sets 'outputConfig', which the request's response_format decides.")
        if _natively(form, dialect):
            extra["outputConfig"] = output_config(form)
        else:
            by_tool = True
    if choice == "none":
        tools = []
        given = None
    config: dict[str, Any] = dict(given or {})
    tools = [*tools, *config.pop("tools", ())]
    if choice is not None and choice != "none":
        config["toolChoice"] = _choice(choice)
    asks = None
    if by_tool and form is not None:
        if config.get("toolChoice") not in (None, {"auto": {}}):
            raise UnsupportedError(
                "A tool_choice that demands a call cannot be had beside a response_format, for which the model must "
                "call a tool, too."
            )
        asks = format_tool(form, set(map(_name, tools)))
        # Beside other tools the model may still call one of those first; what it must not do is answer in words.
        config["toolChoice"] = {"any": {}} if tools else {"tool": {"name": asks.name}}
        tools.append(tool_entry(asks, form))
    # Converse has no choice "none": without tools none is called.
    return ({"tools": tools, **config} if tools else None), asks


def _name(entry: Any) -> str:
    """The name of an entry of ``tools``, which may be the caller's own; empty where it has none."""
    specification = (entry.get("toolSpec") or entry.get("systemTool")) if isinstance(entry, Mapping) else None
    name = specification.get("name") if isinstance(specification, Mapping) else None
    return name if isinstance(name, str) else ""


def _natively(form: Form, dialect: Dialect) -> bool:
    if dialect.structured_output == "native":
        if not dialect.knows_output_config:
            raise UnsupportedError(
                "structured_output='native' needs a botocore whose Converse has outputConfig; this one is older."
            )
        if form.schema is None:
            raise UnsupportedError("structured_output='native' needs a JSON schema: Converse has no JSON mode.")
        return True
    return dialect.structured_output == "auto" and dialect.knows_output_config and form.schema is not None


def _tool(tool: Tool, dialect: Dialect) -> list[dict[str, Any]]:
    spec: dict[str, Any] = {"name": tool.name, "inputSchema": {"json": dict(tool.parameters)}}
    if tool.description:
        spec["description"] = tool.description
    if tool.strict is not None and dialect.knows_strict_tools:
        spec["strict"] = tool.strict
    elif tool.strict:
        raise UnsupportedError(f"The tool {tool.name!r} is strict, which this version of botocore cannot ask for.")
    if not tool.extra:
        return [{"toolSpec": spec}]
    check_extra(tool.extra, CACHE_NAMES, f"The tool {tool.name!r}")
    return [{"toolSpec": spec}, *cache_point(tool.extra)]


def _choice(choice: str) -> dict[str, Any]:
    if choice == "auto":
        return {"auto": {}}
    return {"any": {}} if choice == "required" else {"tool": {"name": choice}}
