"""How a run goes through a provider's batch API: the settings of ``map(..., mode=BatchMode(...))``."""

from __future__ import annotations

import math
import os
import random as _random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError

__all__ = ["BatchMode", "RunMode", "as_mode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMode:
    """How a run uses a provider's batch API. ``mode="batch"`` stands for ``mode=BatchMode()``; times are in seconds.

    A batch holds ``max_requests`` and ``max_bytes`` at most, of None as much as the provider takes (OpenAI: 50,000 and
    200 MB). ``at_once`` batches are at the provider at a time, and as many files on this disk, in ``folder``: None is
    beside the journal, or where the system keeps temporary files.

    A batch is looked at after ``poll``, and then ever more rarely, down to once in ``poll_max``. A provider that cannot
    be asked for longer than ``patience`` ends the run; its batches go on.

    ``cancel`` says what becomes of the provider's batches when a run is left before its end: True cancels them, False
    leaves them to be gone on with by the same call. None is False for a run that has a journal, and True for one that
    has none, for nobody would ever get their answers.

    A crash, or a lost connection, can leave it open whether a batch was begun. Then the provider's list of batches is
    looked through, ``settle`` seconds after it was tried, so that what was on its way has arrived. Where the provider
    has no such list, ``on_unknown="refuse"`` ends the run with a BatchError, and ``"ask"`` begins another batch, which
    may pay for the same requests twice.
    """

    max_requests: int | None = None
    max_bytes: int | None = None
    at_once: int = 20
    folder: str | os.PathLike[str] | None = None
    poll: float = 5.0
    poll_max: float = 60.0
    patience: float = 3600.0
    cancel: bool | None = None
    settle: float = 10.0
    on_unknown: Literal["refuse", "ask"] = "refuse"
    clock: Clock = field(default=SYSTEM_CLOCK, repr=False)
    random: Callable[[], float] = field(default=_random.random, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_bytes", "at_once"):
            value = getattr(self, name)
            if value is None and name != "at_once":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} of BatchMode must be a whole number of at least 1, not {value!r}.")
        for name in ("poll", "poll_max", "patience", "settle"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} of BatchMode must be a number of seconds, not {value!r}.")
        if not 0 < self.poll <= self.poll_max:
            raise ConfigurationError(
                "BatchMode looks at a batch every poll to poll_max seconds, 0 < poll <= poll_max, not "
                f"{self.poll!r} and {self.poll_max!r}."
            )
        if not (self.cancel is None or isinstance(self.cancel, bool)):
            raise ConfigurationError(f"cancel of BatchMode must be True, False or None, not {self.cancel!r}.")
        if self.on_unknown not in ("refuse", "ask"):
            raise ConfigurationError(f'on_unknown of BatchMode must be "refuse" or "ask", not {self.on_unknown!r}.')
        if not isinstance(self.folder, str | os.PathLike | None):
            raise ConfigurationError(f"folder of BatchMode must be a path, not {self.folder!r}.")


RunMode: TypeAlias = Literal["calls", "batch"] | BatchMode
"""One call for each input, or files of inputs through the provider's batch API."""


def as_mode(mode: RunMode) -> BatchMode | None:
    """The settings of a run through a batch API; None for one that makes calls. Raises ConfigurationError."""
    if isinstance(mode, BatchMode):
        return mode
    if mode == "batch":
        return BatchMode()
    if mode == "calls":
        return None
    raise ConfigurationError(f'mode must be "calls", "batch" or a BatchMode, not {mode!r}.')
