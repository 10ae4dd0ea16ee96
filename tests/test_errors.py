"""The error tree is what errors.py draws, and errors keep what they carry wherever they are sent."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from asyncmodels import errors
from asyncmodels.errors import (
    AsyncModelsError,
    ContextLengthError,
    RateLimitError,
    ResponseFormatError,
    ServerError,
    TransportError,
)
from asyncmodels.types import Response, Timing, Usage

CLASSES: list[type[AsyncModelsError]] = [
    item
    for item in vars(errors).values()
    if inspect.isclass(item) and issubclass(item, AsyncModelsError) and item.__module__ == errors.__name__
]


TRIPS: dict[str, Callable[[AsyncModelsError], AsyncModelsError]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),  # noqa: S301  # our own bytes
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """From the drawing on top of errors.py: each class with its parent and its foreign parent, "(also ...)"."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:│   |    )*(?:[├└]── )?)([A-Z]\w+Error)\b(.*)$", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        also = re.search(r"\(also (\w+)\)", match[3])
        path = [*path[:depth], match[2]]
        tree[match[2]] = (path[-2] if depth else None, also[1] if also else None)
    return tree


def real() -> dict[str, tuple[str | None, str | None]]:
    """The same of the classes themselves; a foreign parent counts where a class brings it in."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    for cls in CLASSES:
        parents = [base.__name__ for base in cls.__bases__ if issubclass(base, AsyncModelsError)]
        foreign = [base.__name__ for base in cls.__bases__ if not issubclass(base, AsyncModelsError)]
        assert len(parents) <= 1
        if cls is AsyncModelsError:
            foreign = []
        tree[cls.__name__] = (parents[0] if parents else None, foreign[0] if foreign else None)
    return tree


def make(cls: type[AsyncModelsError]) -> AsyncModelsError:
    data: dict[str, Any] = {"status": 429, "retry_after": 1.5, "request_id": "r1", "code": "c", "attempts": 3}
    if issubclass(cls, ContextLengthError):
        data |= {"requested": 9000, "limit": 8192}
    if issubclass(cls, ResponseFormatError):
        data["response"] = Response(content="{", usage=Usage(1, 2), timing=Timing(total=1))
    return cls("It went wrong: 100 % {of} it.", **data)


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """The drawing on top of errors.py shows exactly the classes there are, each below its parent."""
    assert drawn() == real()
    assert next(iter(drawn())) == "AsyncModelsError"


def test_every_error_is_public() -> None:
    """Each class is in __all__, which lists nothing else and lists it sorted."""
    assert sorted(errors.__all__) == errors.__all__
    assert set(errors.__all__) == {cls.__name__ for cls in CLASSES}
    assert [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, Exception)] == CLASSES


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_says_its_sentence(cls: type[AsyncModelsError]) -> None:
    """str gives the message and nothing else, and without arguments everything has its default."""
    assert str(make(cls)) == make(cls).message == "It went wrong: 100 % {of} it."
    bare = cls()
    assert (str(bare), bare.status, bare.retry_after, bare.request_id, bare.code, bare.attempts) == (
        "",
        None,
        None,
        None,
        None,
        1,
    )
    assert cls.__doc__
    assert issubclass(cls, Exception)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("trip", TRIPS)
def test_an_error_survives_a_trip(cls: type[AsyncModelsError], trip: str) -> None:
    """Pickled or copied, an error keeps its class, its message, and all that it carries."""
    error = make(cls)
    error.add_note("a note of the caller's")

    arrived = TRIPS[trip](error)

    assert type(arrived) is cls
    assert arrived is not error
    assert vars(arrived) == vars(error)
    assert (str(arrived), arrived.args) == (str(error), error.args)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_foreign_parent_is_a_builtin_that_catches_it(cls: type[AsyncModelsError]) -> None:
    """Where the drawing says "(also X)", `except X` catches the error."""
    _, also = drawn()[cls.__name__]
    if also is not None:
        assert isinstance(make(cls), getattr(__import__("builtins"), also))


def test_what_is_retryable() -> None:
    """Exactly these errors say that the same request can succeed a moment later."""
    assert {cls.__name__ for cls in CLASSES if cls.retryable} == {
        "AttemptTimeoutError",
        "ConflictError",
        "ConnectError",
        "ConnectTimeoutError",
        "ConnectionLostError",
        "DNSError",
        "IdleTimeoutError",
        "LimitStoreError",
        "OverloadedError",
        "ProtocolError",
        "QueueFullError",
        "RateLimitError",
        "ReadTimeoutError",
        "ServerError",
        "ServerTimeoutError",
        "StreamError",
        "TransportError",
        "TruncatedResponseError",
    }


def test_a_transport_error_knows_whether_anything_was_sent() -> None:
    """Only where no connection was made the server cannot have seen the request."""
    unsent = {cls.__name__ for cls in CLASSES if issubclass(cls, TransportError) and not cls.sent}

    assert unsent == {"ConnectError", "ConnectTimeoutError", "DNSError", "TLSError"}


def test_an_error_of_somebody_elses_survives_too() -> None:
    """A subclass outside of the package, with a constructor of its own, is pickled with what it carries."""
    error = OwnError(7)

    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes

    assert (type(arrived), arrived.number, arrived.status, str(arrived)) == (OwnError, 7, 503, "number 7")


class OwnError(ServerError):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}", status=503)
        self.number = number


def test_a_cause_is_kept() -> None:
    """`raise ... from` works as on any exception."""
    cause = OSError("reset")

    with pytest.raises(RateLimitError) as caught:
        raise RateLimitError("x") from cause

    assert caught.value.__cause__ is cause
