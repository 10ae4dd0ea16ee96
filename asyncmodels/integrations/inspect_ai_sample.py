"""What a provider wants to know of inspect_ai's run, and what inspect_ai has no public name for.

All of it is allowed to be missing in another version: then samples are not told apart in queues and caches, and
inspect_ai's own limit stays as it is.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakSet

from rich.markup import escape

from asyncmodels.errors import AsyncModelsError, ConfigurationError

__all__ = ["Sample", "SetupError", "current_sample", "keys_are_replaced", "widen_gate"]

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """The sample that the running task works on."""

    uuid: str
    epoch: int


try:
    from inspect_ai.solver._task_state import sample_state
except ImportError:  # pragma: no cover  # another version
    sample_state = None  # type: ignore[assignment]  # looked at before it is called

try:
    from inspect_ai.util._concurrency import _active_controller
except ImportError:  # pragma: no cover  # another version
    _active_controller = None  # type: ignore[assignment]  # looked at before it is called


def current_sample() -> Sample | None:
    """None outside of samples, as in a notebook."""
    state = None if sample_state is None else sample_state()
    if state is None:
        return None
    return Sample(str(getattr(state, "uuid", "") or state.sample_id), int(getattr(state, "epoch", 1)))


def widen_gate(room: int) -> None:
    """Lets inspect_ai's adaptive limit for the running call's model be ``room`` from now on.

    It begins with 20, learns only from errors that it sees, and never goes above 100: under a model that finds its own
    limit and sees to its own retries it would only be a second throttle. It is widened once: what ``inspect ctl`` makes
    of it later stays.
    """
    controller = None if _active_controller is None else _active_controller.get()
    if controller is None or controller in _widened:
        return
    _widened.add(controller)
    try:
        if controller.max < room:
            controller.set_max(room)
        if controller.concurrency < room:
            controller._set_limit(room, "manual")
    except (AttributeError, TypeError):  # pragma: no cover  # another version
        logger.warning(
            "inspect_ai lets at most %s calls through at once: give --max-connections %d for more.",
            getattr(controller, "concurrency", "some"),
            room,
        )


_widened: WeakSet[object] = WeakSet()


def keys_are_replaced() -> bool:
    """Whether hooks of inspect_ai replace API keys while a model is in use."""
    with suppress(ImportError):
        from inspect_ai.hooks._hooks import has_api_key_override

        return has_api_key_override()
    return False  # pragma: no cover  # another version


try:
    from inspect_ai._util.error import PrerequisiteError
except ImportError:  # pragma: no cover  # another version
    PrerequisiteError = Exception  # type: ignore[assignment, misc]  # what it is a kind of


class SetupError(PrerequisiteError, ConfigurationError):  # type: ignore[misc]  # its message may be more than text
    """A ConfigurationError that inspect_ai's command line shows as its one sentence, instead of as a traceback."""

    def __init__(self, error: AsyncModelsError) -> None:
        ConfigurationError.__init__(self, error.message)
        self.message = escape(f"ERROR: {error.message}")  # it is printed as markup
        self._plain = error.message

    def __str__(self) -> str:
        return self._plain
