"""What travels between a run and its workers, as bytes: a model as how it was made, requests, answers and errors.

Whatever can be pickled travels, classes and functions of the main program among it (cloudpickle sends those whole).
"""

from __future__ import annotations

import pickle  # for what the processes of one run tell each other, and nobody else
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

from ray import cloudpickle

from asyncmodels.errors import AsyncModelsError, ConfigurationError, InvalidRequestError, InvalidResponseError
from asyncmodels.formats import parse_response
from asyncmodels.model import Model
from asyncmodels.recipe import Reproducible, constructor_arguments, made_with
from asyncmodels.registry import load
from asyncmodels.types import Request, Response, evolve

__all__ = [
    "Packed",
    "made",
    "packed_answer",
    "packed_error",
    "packed_model",
    "packed_requests",
    "unpacked_answer",
    "unpacked_error",
    "unpacked_requests",
]

_LARGE = 512 * 1024
"""Bytes of requests that go to a worker in one piece, or one request where that is larger."""
_CAUSES = 5

# -- models -----------------------------------------------------------------------------------------------------------


class _Recipes(cloudpickle.CloudPickler):
    """Pickles models and policies as how they were made: they are made again, with pools and engines of their own."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Reproducible):
            args, kwargs = made_with(obj)
            return _again, (type(obj), args, kwargs)
        return super().reducer_override(obj)  # type: ignore[no-untyped-call]  # Ray left it without types


def _again(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cls(*args, **kwargs)


def packed_model(model: Model | str | Callable[[], Model]) -> bytes:
    """Raises ConfigurationError for what cannot be sent."""
    try:
        return _pickled(model)
    except Exception as error:
        what, instead = type(model).__name__, "give RayExecutor(model=...) a function that makes the model there"
        if not isinstance(model, Model):
            what, instead = "The function that makes the model", "what it uses must be made inside of it"
        elif (culprit := _culprit(model)) is not None:
            what = f"The {culprit} of this {what}"
        raise ConfigurationError(f"{what} cannot be sent to the workers ({_said(error)}): {instead}.") from error


def made(packed: bytes) -> Model:
    """The model, made here. Raises what its constructor raises, and ConfigurationError where there comes no model."""
    model = pickle.loads(packed)  # noqa: S301  # of the run's own making
    if isinstance(model, str):
        model = load(model)
    elif not isinstance(model, Model):
        model = model()
    if not isinstance(model, Model):
        raise ConfigurationError(
            f"RayExecutor(model=...) takes a function that returns a Model; this one returned {type(model).__name__}."
        )
    return model


def _pickled(value: object) -> bytes:
    file = BytesIO()
    pickler: Any = _Recipes(file, pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]  # the same
    pickler.dump(value)
    return file.getvalue()


def _culprit(model: Model) -> str | None:
    """The argument that cannot be sent."""
    for name, value in constructor_arguments(model).items():
        try:
            _pickled(value)
        except Exception:  # the one that fails is looked for
            return name
    return None


# -- requests ---------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The first requests of some, as many as go in one piece."""

    data: bytes
    size: int
    """How many they are."""
    error: Exception | None
    """Why the one after them cannot be sent; None where it is not known that it cannot."""


def packed_requests(requests: Sequence[Request]) -> Packed:
    """What several requests have in common, such as a schema, travels once."""
    file = BytesIO()
    pickler: Any = cloudpickle.CloudPickler(file, pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]  # the same
    end = 0
    for count, request in enumerate(requests):
        if end > _LARGE:
            return Packed(file.getvalue(), count, None)
        try:
            pickler.dump(_plain(request))
        except Exception as error:
            failure = InvalidRequestError(f"This request cannot be sent to another process ({_said(error)}).")
            failure.__cause__ = error
            # Later ones could refer to what was cut off with this one: they go in another piece.
            return Packed(file.getvalue()[:end], count, failure)
        end = file.tell()
    return Packed(file.getvalue(), len(requests), None)


def unpacked_requests(data: bytes) -> Iterator[Request]:
    """Raises InvalidRequestError at the first that cannot be read; those after it cannot be read either."""
    file = BytesIO(data)
    unpickler = pickle.Unpickler(file)  # noqa: S301  # of the run's own making
    while file.tell() < len(data):
        try:
            request = unpickler.load()
        except Exception as error:
            raise InvalidRequestError(
                f"This request cannot be read on the worker ({_said(error)}). What requests hold must be importable "
                'there, for instance by RayExecutor(runtime_env={"working_dir": "."}).'
            ) from error
        yield request


def _plain(request: Request) -> Request:
    """Without the functions that tools were made from, which nobody calls, and which drag along who knows what."""
    if all(tool.function is None for tool in request.tools):
        return request
    return evolve(request, tools=tuple(replace(tool, function=None) for tool in request.tools))


# -- answers ----------------------------------------------------------------------------------------------------------


def packed_answer(response: Response) -> bytes:
    """``parsed`` is made anew from the content at the other end, with the classes that are there; ``raw`` comes along
    where it is a plain dict, ``rate_limits`` are for the chain at this end. Raises InvalidResponseError."""
    raw = response.raw if type(response.raw) is dict else None
    try:
        return pickle.dumps(evolve(response, parsed=None, rate_limits=None, raw=raw), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise InvalidResponseError(f"The answer cannot be sent back from the worker ({_said(error)}).") from error


def unpacked_answer(data: bytes, request: Request) -> Response | Exception:
    try:
        response: Response = pickle.loads(data)  # noqa: S301  # of a worker of ours
        return response if request.response_format is None else parse_response(request, response)
    except AsyncModelsError as error:
        return error
    except Exception as error:
        failure = InvalidResponseError(f"The answer of the worker cannot be read ({_said(error)}).")
        failure.__cause__ = error
        return failure


def packed_error(error: BaseException) -> bytes:
    """With its causes, as far as they can be sent; what cannot be sent itself is told in words."""
    chain: list[bytes] = []
    link: BaseException | None = error
    while link is not None and len(chain) < _CAUSES:
        try:
            packed: bytes = cloudpickle.dumps(link)  # type: ignore[no-untyped-call]  # the same
            pickle.loads(packed)  # noqa: S301  # there are errors that can be pickled and not be made again
        except Exception:
            break
        chain.append(packed)
        link = link.__cause__
    return pickle.dumps((_said(error), chain), pickle.HIGHEST_PROTOCOL)


def unpacked_error(data: bytes) -> Exception:
    said, chain = pickle.loads(data)  # noqa: S301  # of a worker of ours
    links: list[BaseException] = []
    for packed in chain:
        try:
            links.append(pickle.loads(packed))  # noqa: S301  # the same
        except Exception:  # its class is not known here
            break
    for link, cause in pairwise(links):
        link.__cause__ = cause
    return links[0] if links and isinstance(links[0], Exception) else AsyncModelsError(said)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
