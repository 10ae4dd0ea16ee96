"""How an object was made, as its constructor was called."""

from __future__ import annotations

import inspect
from typing import Any

from asyncmodels.callable import CallableModel
from asyncmodels.model import Model
from asyncmodels.recipe import Reproducible, constructor_arguments, made_with
from asyncmodels.testing import ScriptedBackend


class Thing(Reproducible):
    def __init__(self, name: str, size: int = 1, *, colour: str = "red", **more: Any) -> None:
        self.name = name


class Named(Thing):
    def __init__(self, **more: Any) -> None:
        super().__init__("fixed", 7, **more)


def test_arguments_come_back_by_name() -> None:
    """Positional and keyword arguments, those of **kwargs too, are found by name; defaults are absent."""
    assert constructor_arguments(Thing("a", 2, weight=3)) == {"name": "a", "size": 2, "weight": 3}
    assert constructor_arguments(Thing("a")) == {"name": "a"}


def test_a_subclass_remembers_its_own_call() -> None:
    """What counts is how the object was made, not what its constructor passed on."""
    assert constructor_arguments(Named(colour="blue")) == {"colour": "blue"}


def test_a_model_remembers() -> None:
    """Every Model is reproducible, and its policies, being *args, are one tuple."""
    backend = ScriptedBackend("hi")
    assert constructor_arguments(Model(backend, model_id="m")) == {"backend": backend, "model_id": "m"}
    assert list(constructor_arguments(CallableModel(str, temperature=0))) == ["function", "temperature"]


def test_the_signature_of_a_model_is_that_of_its_constructor() -> None:
    """Whoever asks for the signature of Model, as editors do, sees its parameters."""
    assert list(inspect.signature(Model).parameters)[:2] == ["backend", "policies"]


def test_what_is_remembered_shows_nowhere() -> None:
    """The arguments, which may hold a key, are neither in the repr nor in that of all attributes."""
    assert "sk-secret" not in repr(Model(ScriptedBackend("hi"), defaults={"extra": {"api_key": "sk-secret"}}))
    thing = Thing("sk-secret", colour="sk-secret")
    del thing.name
    assert "sk-secret" not in repr(vars(thing))
    assert constructor_arguments(thing)["colour"] == "sk-secret"


def test_another_can_be_made_as_the_first_was() -> None:
    """The arguments come back as they were given, by place and by name."""
    first = Thing("a", 2, weight=3)
    args, kwargs = made_with(first)
    assert (args, kwargs) == (("a", 2), {"weight": 3})
    assert constructor_arguments(Thing(*args, **kwargs)) == constructor_arguments(first)
