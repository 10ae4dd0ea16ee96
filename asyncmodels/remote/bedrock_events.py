"""The exceptions in an event stream that botocore's service model does not know: botocore drops what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

__all__ = ["keep_exceptions"]


def keep_exceptions(stream: Any) -> None:
    """Lets ``stream``, an event stream of aiobotocore, say the name and the message of every exception in it."""
    parser = getattr(stream, "_parser", None)
    if parser is not None:
        stream._parser = _Parser(parser)


class _Parser:
    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._parse = parser.parse

    def parse(self, event: Mapping[str, Any], shape: Any) -> Any:
        """What the parser gives for it, to be awaited."""
        return self._parse(event, shape) if event.get("status_code") == 200 else self._refusal(event, shape)

    async def _refusal(self, event: Mapping[str, Any], shape: Any) -> Any:
        parsed = await self._parse(event, shape)
        headers = event.get("headers") or {}
        details = parsed.setdefault("Error", {})
        if not details.get("Code"):
            details["Code"] = headers.get(":exception-type") or headers.get(":error-code") or ""
        if not details.get("Message"):
            details["Message"] = headers.get(":error-message") or _message(event.get("body") or b"")
        return parsed


def _message(body: bytes) -> str:
    with suppress(ValueError):
        said = json.loads(body)
        if isinstance(said, Mapping):
            return str(said.get("message") or said.get("Message") or "")
    return body.decode("utf-8", "replace")
