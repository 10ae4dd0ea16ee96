"""Our answers and errors -> what inspect_ai expects and logs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    Logprob,
    Logprobs,
    ModelCall,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.tool import ToolCall as InspectToolCall
from pydantic import ValidationError

from asyncmodels.errors import AsyncModelsError, ContentFilterError, ContextLengthError
from asyncmodels.integrations.inspect_ai_messages import INTERNAL
from asyncmodels.types import (
    FinishReason,
    ImagePart,
    Message,
    Part,
    ProviderPart,
    Request,
    Response,
    TextPart,
    TokenLogprob,
    ToolCall,
    Usage,
)

__all__ = ["call_of", "failed_call", "frozen", "output_of", "refusal_of"]

_REMOVED = "<base64-data-removed>"  # the words that inspect_ai's own providers log for it


# -- answers ----------------------------------------------------------------------------------------------------------


def output_of(model: str, request: Request, responses: Sequence[Response]) -> ModelOutput:
    """``responses`` are the choices, of which there is one unless more were asked for."""
    first = responses[0]
    usages = [response.usage for response in responses if response.usage is not None]
    usage = None if not usages else _usage(sum(usages[1:], usages[0]))
    attempts = max(response.attempts for response in responses)
    notes: dict[str, Any] = {}
    if attempts > 1:
        notes["attempts"] = attempts
    if first.cached:
        notes["cached"] = True
    output = ModelOutput(
        model=first.model or model,
        choices=[_choice(model, request, response) for response in responses],
        usage=usage,
        metadata=notes or None,
    )
    if _KNOWS_IDS:
        output.response_id = first.id
    return output


_KNOWS_IDS = "response_id" in ModelOutput.model_fields  # newer versions only


def _choice(model: str, request: Request, response: Response) -> ChatCompletionChoice:
    message = ChatMessageAssistant(
        content=_content(response),
        tool_calls=[_tool_call(call) for call in response.tool_calls] or None,
        model=response.model or model,
        source="generate",
    )
    return ChatCompletionChoice(
        message=message,
        stop_reason=_stop_reason(request, response),
        logprobs=None if response.logprobs is None else _logprobs(response.logprobs),
    )


def _content(response: Response) -> str | list[Content]:
    text = response.content or ""
    kept: dict[str, Any] = {}
    if response.extra:
        kept["extra"] = frozen(response.extra)
    signed = {call.id: frozen(call.extra) for call in response.tool_calls if call.extra}
    if signed:
        kept["calls"] = signed
    reasoning = response.reasoning
    if reasoning is None and (written := _THOUGHT.match(text)):
        # Of a server that does not tell thoughts from answers; a scorer must not take one for the other.
        reasoning, text = written["thought"].strip(), text[written.end() :]
        kept["tags"] = True
    if reasoning is None and not kept:
        if response.finish_reason == "content_filter" and text:
            return [ContentText(text=text, refusal=True)]
        return text
    thought = ContentReasoning(
        reasoning=reasoning or "", redacted=reasoning is None, internal={INTERNAL: kept} if kept else None
    )
    return [thought, ContentText(text=text)]


_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*", re.DOTALL)


def _tool_call(call: ToolCall) -> InspectToolCall:
    try:
        return InspectToolCall(id=call.id, function=call.name, arguments=call.parse_arguments())
    except (ValueError, RecursionError) as error:
        # inspect_ai tells the model so, instead of running the tool.
        fault = f"Error parsing the following tool call arguments:\n\n{call.arguments}\n\nError details: {error}"
        return InspectToolCall(id=call.id, function=call.name, arguments={}, parse_error=fault)


_STOPS: Mapping[FinishReason | None, StopReason] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}


def _stop_reason(request: Request, response: Response) -> StopReason:
    if response.finish_reason != "length":
        return _STOPS.get(response.finish_reason, "unknown")
    # Cut before it had all the tokens that were asked for: then it was the context that was full.
    asked, usage = request.max_tokens, response.usage
    full = asked is not None and usage is not None and 0 < usage.output_tokens < asked
    return "model_length" if full else "max_tokens"


def _usage(usage: Usage) -> ModelUsage:
    return ModelUsage(
        input_tokens=usage.input_tokens - (usage.cached_tokens or 0),
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_tokens_cache_read=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def _logprobs(logprobs: Sequence[TokenLogprob]) -> Logprobs:
    return Logprobs(
        content=[
            Logprob(
                token=entry.token,
                logprob=entry.logprob,
                top_logprobs=[TopLogprob(token=token, logprob=logprob) for token, logprob in entry.top] or None,
            )
            for entry in logprobs
        ]
    )


def frozen(value: Any) -> Any:
    """``value`` as JSON can hold it; bytes, such as Bedrock's encrypted thoughts, are marked and come back as such."""
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return {str(key): frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return value


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal_of(model: str, error: AsyncModelsError) -> ModelOutput | None:
    """The output that stands for an error which says something about the sample; None where it is an error."""
    reason: StopReason
    if isinstance(error, ContextLengthError):
        reason = "model_length"
    elif isinstance(error, ContentFilterError):
        reason = "content_filter"
    else:
        return None
    return ModelOutput.from_content(model, error.message, stop_reason=reason, error=error.message)


# -- what is logged of a call -----------------------------------------------------------------------------------------


def call_of(model: str, request: Request, responses: Sequence[Response]) -> ModelCall:
    """The call with the time for which it was served: what it waited, for a slot or a retry, counts as waiting."""
    answers: list[dict[str, Any]] = [
        response.raw if type(response.raw) is dict else _answer(response) for response in responses
    ]
    answer: dict[str, Any] = answers[0] if len(answers) == 1 else {"choices": answers}
    asked, seconds = _logged(model, request), max(map(_service, responses))
    try:
        return ModelCall(request=asked, response=answer, time=seconds)
    except (ValidationError, RecursionError):  # a provider's own object is not always JSON
        return ModelCall.create(asked, answer, time=seconds)


def failed_call(model: str, request: Request | None, error: AsyncModelsError) -> ModelCall:
    """``request`` is None where it could not be made."""
    told = {
        "error": {
            "type": type(error).__name__,
            "message": error.message,
            "code": error.code,
            "status": error.status,
            "request_id": error.request_id,
        }
    }
    call = ModelCall.create({"model": model} if request is None else _logged(model, request), told)
    if "error" in ModelCall.model_fields:  # newer versions only
        call.error = True
    return call


def _service(response: Response) -> float:
    timing = response.timing
    if timing.service is not None:
        return timing.service
    return max(0.0, (timing.total or 0.0) - timing.queued)


def _answer(response: Response) -> dict[str, Any]:
    usage, timing = response.usage, response.timing
    return {
        "content": response.content,
        "reasoning": response.reasoning,
        "tool_calls": [_logged_call(call) for call in response.tool_calls],
        "finish_reason": response.finish_reason,
        "usage": None
        if usage is None
        else {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        },
        "timing": {"queued": timing.queued, "first_token": timing.first_token, "service": timing.service},
    }


_LOGGED = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
           "logprobs", "tool_choice")  # fmt: skip


def _logged(model: str, request: Request) -> dict[str, Any]:
    """The request as a log shows it, in the words of OpenAI's API where it has some; images are left out."""
    shown: dict[str, Any] = {"model": model, "messages": [_logged_message(message) for message in request.messages]}
    for name in _LOGGED:
        value = getattr(request, name)
        if value is not None:
            shown[name] = value
    if request.stop_sequences:
        shown["stop"] = list(request.stop_sequences)
    if request.tools:
        shown["tools"] = [
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            for tool in request.tools
        ]
    if request.response_format is not None:
        form = request.response_format
        shown["response_format"] = {"name": form.name, "schema": form.schema, "strict": form.strict}
    if request.extra:
        shown["extra"] = frozen(request.extra)
    return shown


def _logged_message(message: Message) -> dict[str, Any]:
    content = message.content
    shown: dict[str, Any] = {
        "role": message.role,
        "content": content if content is None or isinstance(content, str) else list(map(_logged_part, content)),
    }
    if message.tool_calls:
        shown["tool_calls"] = [_logged_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:
        shown["reasoning"] = message.reasoning
    return shown


def _logged_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logged_part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        place = part.url if part.url is not None else str(part.source) if part.data is None else _REMOVED
        return {"type": "image_url", "image_url": {"url": place}}
    return _without_data(part)


def _without_data(part: ProviderPart) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(json.dumps(part.value, default=lambda value: f"<{type(value).__name__}>"))
    for inner in shown.values():
        if isinstance(inner, dict):
            for name, value in inner.items():
                if name == "data" or (isinstance(value, str) and value.startswith("data:")):
                    inner[name] = _REMOVED
    return shown
