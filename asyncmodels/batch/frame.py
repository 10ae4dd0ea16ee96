"""The items of a run as a table of pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas

from asyncmodels.batch.item import Item
from asyncmodels.types import Request

__all__ = ["as_frame"]

_WHOLE = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "error_status")


def as_frame(items: Sequence[Item]) -> pandas.DataFrame:
    """One row for each item; ``id`` is the index. Whole numbers that may be missing are of pandas' type for that."""
    frame = pandas.DataFrame.from_records([_row(item) for item in items], columns=list(_row(_NONE)))
    return frame.astype(dict.fromkeys(_WHOLE, "Int64")).set_index("id")


def _prompt(request: Request) -> str | None:
    if request.messages:
        return request.messages[-1].text
    prompt = None if request.score is None else request.score.prompt
    return prompt if isinstance(prompt, str) else None


def _row(item: Item) -> dict[str, Any]:
    response, error = item.response, item.error
    usage = None if response is None else response.usage
    timing = None if response is None else response.timing
    return {
        "id": item.id,
        "prompt": None if item.request is None else _prompt(item.request),
        "content": None if response is None else response.content,
        "parsed": None if response is None else response.parsed,
        "reasoning": None if response is None else response.reasoning,
        "tool_calls": None if response is None else response.tool_calls,
        "finish_reason": None if response is None else response.finish_reason,
        "error": None if error is None else type(error).__name__,
        "error_text": None if error is None else str(error),
        "error_status": getattr(error, "status", None),
        "input_tokens": None if usage is None else usage.input_tokens,
        "output_tokens": None if usage is None else usage.output_tokens,
        "cached_tokens": None if usage is None else usage.cached_tokens,
        "reasoning_tokens": None if usage is None else usage.reasoning_tokens,
        "seconds": item.seconds,
        "queued": None if timing is None else timing.queued,
        "service": None if timing is None else timing.service,
        "first_token": None if timing is None else timing.first_token,
        "attempts": getattr(error, "attempts", 1) if response is None else response.attempts,
        "model": None if response is None else response.model,
        "agent": None if item.request is None else item.request.agent,
        "reused": item.reused,
    }


_NONE = Item(index=0, id="", request=None)
