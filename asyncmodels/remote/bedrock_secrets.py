"""What must not show: the keys of Bedrock models, in errors, in reprs and in the logs of botocore.

At DEBUG botocore logs the headers that it sends and the bodies that it gets, keys included.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable
from weakref import WeakSet

__all__ = ["Secrets", "mask_logs"]

_MASK = "***"
_KEPT = 8
_HEADER = re.compile(
    r"""((?:authorization['"]?\s*[:,]\s*b?['"]?bearer\s+)|(?:x-amz-security-token['"]?\s*[:,]\s*b?['"]?))[^\s'",)}]+""",
    re.I,
)
"""As headers are logged: in the text of a dict or of a request to be signed. They hold, too, what botocore found."""


class Secrets:
    """Strings that do not even show by looking at who holds them. As long as it lives, no log of botocore has them."""

    __slots__ = ("__weakref__", "_texts")

    def __init__(self, texts: Iterable[str | None] = ()) -> None:
        self._texts = tuple(text for text in texts if text)
        if self._texts:
            with _LOCK:
                _ALIVE.add(self)

    def add(self, text: str) -> None:
        """One more; the oldest of many is forgotten, as keys that are asked for end."""
        with _LOCK:
            if text not in self._texts:
                self._texts = (*self._texts, text)[-_KEPT:]
                _ALIVE.add(self)

    def mask(self, text: str) -> str:
        """``text`` without them."""
        for secret in self._texts:
            text = text.replace(secret, _MASK)
        return text

    def __repr__(self) -> str:
        return f"<{len(self._texts)} secrets>"


_ALIVE: WeakSet[Secrets] = WeakSet()
_LOCK = threading.RLock()


class _Filter(logging.Filter):
    """Masks a record of botocore's; lets all of them pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:  # the handler tells who wrote it
            return True
        masked = _masked(text)
        if masked != text:
            record.msg, record.args = masked, None
        if record.exc_info and record.exc_info[0] is not None:
            text = record.exc_text or _FORMATTER.formatException(record.exc_info)
            masked = _masked(text)
            if masked != text:
                record.exc_info, record.exc_text = None, masked
        return True


_FILTER = _Filter()
_FORMATTER = logging.Formatter()


def _masked(text: str) -> str:
    text = _HEADER.sub(rf"\1{_MASK}", text)
    with _LOCK:
        alive = list(_ALIVE)
    for secrets in alive:
        text = secrets.mask(text)
    return text


def mask_logs() -> None:
    """Masks what botocore and aiobotocore log from now on. A filter sees only what its own logger is told, so each
    of their loggers has it; calling it again adds those that have come since."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in ("botocore", "aiobotocore"):
            logger.addFilter(_FILTER)  # which does nothing where it is already
