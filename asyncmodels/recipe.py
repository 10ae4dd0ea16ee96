"""How an object was made: the arguments of its constructor, so that it can be written down and made again."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = ["Reproducible", "constructor_arguments", "made_with"]


class Reproducible:
    """A base whose objects remember what their constructor was called with; ``constructor_arguments`` reads it.

    The arguments may hold secrets, so they show nowhere by themselves.
    """

    _made_with: _Arguments

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made._made_with = _Arguments(args, kwargs)
        return made


@dataclass(frozen=True, slots=True)
class _Arguments:
    """One of them may be a key, and whoever shows all attributes of a model must not show it."""

    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)


def made_with(made: Reproducible) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which ``made`` was made, as they were given: ``type(made)(*args, **kwargs)`` makes another."""
    return made._made_with.args, made._made_with.kwargs


def constructor_arguments(made: Reproducible) -> dict[str, Any]:
    """By name, in their order, the arguments with which ``made`` was made; those left to their default are absent.

    What the constructor takes as ``**kwargs`` stands among them under its own name, what it takes as ``*args`` as one
    tuple.
    """
    made_with = made._made_with
    # Not that of the class itself: it would be the signature of __new__ for a class without an __init__ of its own.
    signature = inspect.signature(type(made).__init__)
    arguments = signature.bind(made, *made_with.args, **made_with.kwargs).arguments
    named: dict[str, Any] = {}
    for position, (name, value) in enumerate(arguments.items()):
        if position == 0:
            continue  # self
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named
