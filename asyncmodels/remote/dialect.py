"""How the bodies of one endpoint differ from the next's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from asyncmodels.remote.quirks import Quirks

__all__ = ["Dialect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one endpoint differs from the next."""

    max_tokens_field: str = "max_tokens"
    """OpenAI itself wants ``max_completion_tokens``; most compatible servers know only ``max_tokens``."""
    role_conversions: Mapping[str, str] = field(default_factory=dict)
    flatten_messages: bool = False
    max_stops: int = 4
    """How many stop sequences the endpoint takes; all are cut from the answer here in any case."""
    seed_field: str = "seed"
    reasoning_field: str | None = None
    """Where an assistant's turn that called tools has its reasoning, for endpoints that want it back."""
    reasoning_details: bool = True
    """Whether messages may hold OpenRouter's ``reasoning_details``."""
    stream_options: bool = True
    """Whether a stream is asked for its usage."""
    json_schema: bool = True
    json_object: bool = True

    def identity(self) -> dict[str, Any]:
        """What of it decides answers and is not as usual: a field that is new to it makes no other of those before."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _OF_NO_ACCOUNT}
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if value != getattr(_USUAL, name)
        }

    @classmethod
    def of(cls, quirks: Quirks, *, role_conversions: Mapping[str, str], flatten_messages: bool = False) -> Dialect:
        """The dialect of a server with ``quirks``; the caller's own ``role_conversions`` come before its."""
        role = quirks.system_role
        renamed = {} if role is None else {name: role for name in ("system", "developer") if name != role}
        return cls(
            max_tokens_field=quirks.max_tokens_field or "max_tokens",
            role_conversions={**renamed, **role_conversions},
            flatten_messages=flatten_messages,
            max_stops=0 if quirks.stop is False else 4 if quirks.max_stops is None else quirks.max_stops,
            seed_field=quirks.seed_field or "seed",
            reasoning_field=quirks.reasoning_field,
            reasoning_details=quirks.reasoning_details is not False,
            stream_options=quirks.stream_options is not False,
            json_schema=quirks.json_schema is not False,
            json_object=quirks.json_object is not False,
        )


_USUAL = Dialect()
_OF_NO_ACCOUNT = ("max_stops", "stream_options")
"""All stops are cut here in any case, and a stream's usage is no answer."""
