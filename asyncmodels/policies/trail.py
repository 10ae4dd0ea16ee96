"""What a call has been through that was sent to one target after another: whom it asked in vain, and why."""

from __future__ import annotations

from collections.abc import Iterator

from asyncmodels.errors import AsyncModelsError, CircuitOpenError, InvalidRequestError, UnsupportedError
from asyncmodels.policies.own_copy import own_error
from asyncmodels.policies.targets import Target

__all__ = ["Trail"]


class Trail:
    """Targets with the errors that they have given, in their order; ``visits`` of them were sent the request, and made
    ``attempts``."""

    def __init__(self) -> None:
        self.failures: list[tuple[Target, Exception]] = []
        self.attempts = 0
        self.visits = 0

    def add(self, target: Target, error: Exception) -> None:
        self.failures.append((target, error))
        if not isinstance(error, UnsupportedError | CircuitOpenError):  # for nothing was sent then
            self.visits += 1
            self.attempts += error.attempts if isinstance(error, AsyncModelsError) else 1

    def __contains__(self, target: Target) -> bool:
        return any(failed is target for failed, _ in self.failures)

    def __iter__(self) -> Iterator[tuple[Target, Exception]]:
        return iter(self.failures)

    def error(self) -> Exception:
        """What the caller is told: the last error, with the others in ``tried``.

        One that says that the request did not fit its target is passed over where another target failed otherwise: a
        caller who reads that the request is wrong would not send it again. What comes back is a copy where there are
        several, for one error object may be everybody's.
        """
        errors = [error for _, error in self.failures]
        if len(errors) == 1:
            return errors[0]
        if all(isinstance(error, UnsupportedError) for error in errors):
            said = " ".join(f"{target.name}: {error}" for target, error in self.failures)
            told: Exception = UnsupportedError(f"None of {len(errors)} models can do what is asked. {said}")
            others = self.failures
        else:
            mine = max(range(len(errors)), key=lambda n: (not isinstance(errors[n], InvalidRequestError), n))
            told = own_error(errors[mine], errors[mine].__traceback__)
            others = [failure for n, failure in enumerate(self.failures) if n != mine]
            told.__notes__ = [*getattr(told, "__notes__", ())]
            for target, error in others:
                told.add_note(f"{target.name} was asked, too: {type(error).__name__}: {error}")
        if isinstance(told, AsyncModelsError):
            told.tried = tuple((target.name, error) for target, error in others)
            told.attempts = max(1, self.attempts)
        return told
