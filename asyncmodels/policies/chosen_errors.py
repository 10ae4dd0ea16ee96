"""Which errors a policy acts on, as its caller says it: by types, or by a function of the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from asyncmodels.errors import ConfigurationError

__all__ = ["ChosenErrors", "chosen"]

ChosenErrors: TypeAlias = Callable[[Exception], bool] | type[Exception] | tuple[type[Exception], ...]


def chosen(on: ChosenErrors, policy: str) -> Callable[[Exception], bool]:
    """The rule that ``on`` is. Raises ConfigurationError, in the name of the ``policy``, for what is none."""
    if isinstance(on, type | tuple):
        kinds = on if isinstance(on, tuple) else (on,)
        if all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            return lambda error: isinstance(error, kinds)
    elif callable(on):
        return on
    raise ConfigurationError(f"{policy}(on=...) takes exception types, or a function of the error, not {on!r}.")
