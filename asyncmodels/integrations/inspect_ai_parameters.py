"""inspect_ai's GenerateConfig and choice of tools -> the parameters of one call of ours.

Each of its fields is one of these: a parameter of ours; a field of the provider's own, which goes into ``extra``; what
inspect_ai sees to itself; what changes nothing here, with a warning, once; or what cannot be had, an UnsupportedError.
``FIELDS`` says which is which, and a test that none is forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from inspect_ai.model import GenerateConfig
from inspect_ai.tool import ToolChoice, ToolFunction

from asyncmodels.errors import UnsupportedError
from asyncmodels.formats import as_response_format
from asyncmodels.types import ResponseFormat

__all__ = ["FIELDS", "Kind", "parameters_from", "tool_choice_from", "warn_of"]

logger = logging.getLogger(__name__)

Kind = Literal["parameter", "extra", "inspect", "ignored", "refused"]

FIELDS: Mapping[str, Kind] = {
    "timeout": "parameter",
    "max_tokens": "parameter",
    "temperature": "parameter",
    "top_p": "parameter",
    "top_k": "parameter",
    "seed": "parameter",
    "stop_seqs": "parameter",
    "frequency_penalty": "parameter",
    "presence_penalty": "parameter",
    "logprobs": "parameter",
    "top_logprobs": "parameter",
    "response_schema": "parameter",
    "num_choices": "parameter",  # as many calls, see the provider
    "max_retries": "parameter",  # of the model as it is made, see the provider
    "extra_headers": "parameter",  # the same
    "extra_body": "extra",
    "logit_bias": "extra",
    "parallel_tool_calls": "extra",
    "reasoning_effort": "extra",
    "reasoning_summary": "extra",
    "reasoning_mode": "extra",
    "verbosity": "extra",
    "max_connections": "inspect",
    "adaptive_connections": "inspect",
    "attempt_timeout": "inspect",  # around a whole call of ours, whose retries it ends too
    "system_message": "inspect",
    "max_tool_output": "inspect",
    "reasoning_history": "inspect",
    "cache": "inspect",
    "fail_on_refusal": "inspect",
    "stream_idle_timeout": "ignored",
    "internal_tools": "ignored",
    "cache_prompt": "ignored",
    "effort": "ignored",
    "reasoning_tokens": "ignored",
    "batch": "ignored",
    "best_of": "refused",
    "prompt_logprobs": "refused",
    "fallback_models": "refused",
    "modalities": "refused",
}
_SAME = (
    "timeout",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "frequency_penalty",
    "presence_penalty",
)
# False, and no word, ask for nothing; of these hints True is what happens anyhow.
_NEEDS_NO_WORD: Mapping[str, tuple[Any, ...]] = {
    "cache_prompt": ("auto", True),
    "internal_tools": (False,),
    "batch": (False,),
    "modalities": ([],),
    "fallback_models": ([],),
}
_WHY = {
    "stream_idle_timeout": "answers are not streamed",
    "internal_tools": "tools are those of the task",
    "cache_prompt": "the provider decides that by itself",
    "effort": "give it as extra_body where the provider knows it",
    "reasoning_tokens": "give it as extra_body where the provider knows it",
    "max_retries": "it is fixed when the model is made: give it to get_model(), or as -M retry=N",
    "batch": "every sample is a call of its own",
    "reasoning_summary": "only the Responses API (-M api=responses) has summaries",
    "reasoning_mode": "only the Responses API (-M api=responses) knows it",
    "best_of": "ask several times, by epochs",
    "prompt_logprobs": "only log-probabilities of the answer can be had",
    "fallback_models": "give a model of ours with a Fallback to inspect_model",
    "modalities": "answers are text",
}


def tool_choice_from(choice: ToolChoice) -> str:
    if isinstance(choice, ToolFunction):
        return choice.name
    return "required" if choice == "any" else choice


def parameters_from(config: GenerateConfig, *, tools: bool, responses: bool) -> dict[str, Any]:
    """The keyword arguments of ``generate`` without those of the tools; ``responses`` for the Responses API.

    Raises UnsupportedError for a field that cannot be had, and InvalidRequestError for a schema that is none.
    """
    params = {name: value for name in _SAME if (value := getattr(config, name)) is not None}
    if config.stop_seqs:
        params["stop_sequences"] = tuple(config.stop_seqs)
    if config.logprobs or config.top_logprobs:
        params["logprobs"] = config.top_logprobs or 0
    if config.response_schema is not None:
        params["response_format"] = _response_format(config)
    extra = _extra(config, tools=tools, responses=responses)
    if extra:
        params["extra"] = extra
    _look_at_the_rest(config)
    return params


def _response_format(config: GenerateConfig) -> ResponseFormat:
    """Without a check of the answer: that is the scorer's part, and one bad answer must not end an evaluation."""
    asked = config.response_schema
    assert asked is not None  # noqa: S101  # the caller has looked
    shape = {
        "name": asked.name,
        "schema": asked.json_schema.model_dump(exclude_none=True),
        "description": asked.description,
        "strict": asked.strict,
    }
    format = as_response_format({"type": "json_schema", "json_schema": shape})
    assert format is not None  # noqa: S101  # a schema is a format
    return replace(format, parse=str)


def _extra(config: GenerateConfig, *, tools: bool, responses: bool) -> dict[str, Any]:
    extra: dict[str, Any] = dict(config.extra_body or {})
    if config.logit_bias is not None:
        extra["logit_bias"] = {str(token): bias for token, bias in config.logit_bias.items()}
    if tools and config.parallel_tool_calls is not None:
        extra["parallel_tool_calls"] = config.parallel_tool_calls
    verbosity = _given(config, "verbosity")
    effort, summary, mode = (_given(config, f"reasoning_{name}") for name in ("effort", "summary", "mode"))
    if responses:
        reasoning = {"effort": effort, "summary": None if summary == "none" else summary, "mode": mode}
        said = {name: value for name, value in reasoning.items() if value is not None}
        if said:
            extra["reasoning"] = {**said, **(extra.get("reasoning") or {})}
        if verbosity is not None:
            extra["text"] = {"verbosity": verbosity, **(extra.get("text") or {})}
        return extra
    if effort is not None:
        extra["reasoning_effort"] = effort
    if verbosity is not None:
        extra["verbosity"] = verbosity
    if summary not in (None, "none"):
        warn_of("reasoning_summary")
    if mode not in (None, "standard"):
        warn_of("reasoning_mode")
    return extra


def _look_at_the_rest(config: GenerateConfig) -> None:
    for name in _REST:
        value = _given(config, name)
        if value is None or value in _NEEDS_NO_WORD.get(name, ()):
            continue
        if FIELDS[name] == "refused":
            raise UnsupportedError(f"The provider asyncmodels does not support {name}: {_WHY[name]}.")
        warn_of(name)


_REST = tuple(name for name, kind in FIELDS.items() if kind in ("ignored", "refused"))
_warned: set[str] = set()


def warn_of(name: str) -> None:
    """Says once in the life of the process that a field changes nothing."""
    if name not in _warned:
        _warned.add(name)
        logger.warning("%s changes nothing with the provider asyncmodels: %s.", name, _WHY[name])


def _given(config: GenerateConfig, name: str) -> Any:
    """A field that older versions of inspect_ai may not have."""
    return getattr(config, name, None)
