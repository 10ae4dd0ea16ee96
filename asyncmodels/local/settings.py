"""What the settings of an engine may be: each check raises a ConfigurationError in one sentence, naming the setting."""

from __future__ import annotations

from collections.abc import Mapping

from asyncmodels.errors import ConfigurationError

__all__ = ["check_flag", "check_keywords", "check_whole"]


def check_whole(name: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    """Refuses everything but a whole number of at least ``least``; with ``optional`` None is welcome, too."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        none = ", or None" if optional else ""
        raise ConfigurationError(f"{name} must be a whole number of at least {least}{none}, not {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Refuses everything but True and False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}.")


def check_keywords(name: str, value: object) -> None:
    """Refuses everything but None and a mapping whose keys are strings."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ConfigurationError(f"{name} must be a mapping from names to values, not {value!r}.")
