"""What callers are told when something goes wrong on the owner thread, each as an error of their own."""

from __future__ import annotations

from asyncmodels.errors import AsyncModelsError, ClosedError, EngineDeadError, EngineError, ModelLoadError

__all__ = ["closed_error", "dead_error", "load_error", "memory_error", "row_error"]


def closed_error() -> ClosedError:
    return ClosedError("The engine was closed.")


def dead_error(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"The engine died while the request was with it ({type(cause).__name__}: {cause}).")
    error.__cause__ = cause
    return error


def memory_error(cause: Exception) -> EngineError:
    error = EngineError(f"There is not enough memory for the request ({type(cause).__name__}: {_line(cause)}).")
    error.__cause__ = cause
    return error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def row_error(cause: Exception) -> Exception:
    if isinstance(cause, AsyncModelsError):
        return cause
    error = EngineError(f"The request broke inside the engine ({type(cause).__name__}: {cause}).")
    error.__cause__ = cause
    return error


def load_error(model_id: str, cause: BaseException | None) -> Exception:
    if cause is None:
        return closed_error()
    if isinstance(cause, AsyncModelsError):
        return cause
    error = ModelLoadError(f"The model {model_id!r} could not be loaded ({type(cause).__name__}: {cause}).")
    error.__cause__ = cause
    return error
