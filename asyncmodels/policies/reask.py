"""Answers that came and are of no use: when to ask again, and what to tell the model then."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from asyncmodels.errors import ConfigurationError, ResponseFormatError
from asyncmodels.formats import parse_response
from asyncmodels.types import FinishReason, Message, Request, Response, evolve

__all__ = ["Reask", "Repair", "Unwanted"]

Repair: TypeAlias = Callable[[Request, Response, ResponseFormatError], Request]


@dataclass(frozen=True, slots=True)
class Reask:
    """Which answers ``Retry`` asks for again, at once and up to ``times`` times a call.

    - with ``invalid``, those that do not satisfy the ``response_format``;
    - those with one of these ``finish_reasons``, such as ``{"length", "content_filter"}``;
    - those for which ``when(response)`` is true.

    ``repair`` says how an invalid answer is asked for again: with it, and what is wrong with it, at the end of the
    conversation (True); with the same words once more (False), which is of use only where answers are sampled; or with
    the request that ``repair(request, response, error)`` returns.
    """

    times: int = 1
    invalid: bool = True
    repair: bool | Repair = True
    finish_reasons: Collection[FinishReason] = ()
    when: Callable[[Response], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 1:
            raise ConfigurationError(f"The times of Reask must be a whole number of at least 1, not {self.times!r}.")
        if isinstance(self.finish_reasons, str) or not set(self.finish_reasons) <= set(get_args(FinishReason)):
            known = ", ".join(get_args(FinishReason))
            raise ConfigurationError(f"The finish_reasons of Reask are a set of {known}, not {self.finish_reasons!r}.")
        if not (callable(self.repair) or isinstance(self.repair, bool)):
            raise ConfigurationError(f"The repair of Reask is True, False or a function, not {self.repair!r}.")
        if not (callable(self.when) or self.when is None):
            raise ConfigurationError(f"The when of Reask is a function, not {self.when!r}.")

    def unwanted(self, request: Request, response: Response) -> Unwanted | None:
        """What is wrong with the answer, in the form of an exception that carries it; None when it is fine."""
        if response.finish_reason in self.finish_reasons or (self.when is not None and self.when(response)):
            return Unwanted(response)
        if self.invalid and request.response_format is not None:
            try:
                parse_response(request, response)
            except ResponseFormatError as error:
                return Unwanted(response, error.with_traceback(None))
        return None

    def again(self, request: Request, unwanted: Unwanted) -> Request:
        """What to ask instead."""
        error = unwanted.error
        if error is None or error.response is None or self.repair is False:
            return request
        if self.repair is True:
            return _with_correction(request, error.response, error)
        return self.repair(request, error.response, error)


class Unwanted(Exception):  # noqa: N818  # it is no failure: the answer that it carries may be given to the caller yet
    """An answer, or a stream of it, that is of no use; ``error`` says why where it does not satisfy the format."""

    def __init__(self, answer: Any, error: ResponseFormatError | None = None) -> None:
        super().__init__("The answer is asked for again.")
        self.answer = answer
        self.error = error


def _with_correction(request: Request, response: Response, error: ResponseFormatError) -> Request:
    said = (Message("assistant", response.content),) if response.content else ()
    wish = Message("user", f"{error.message} Answer again, with the corrected JSON and nothing else.")
    return evolve(request, messages=(*request.messages, *said, wish))
