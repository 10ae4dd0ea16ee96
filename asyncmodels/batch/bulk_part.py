"""One batch of a run: what is known of it, and what becomes of an item that it did not answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncmodels.batch.bulk_spill import FileOfLines
from asyncmodels.bulk import ProviderBatch, Refusal
from asyncmodels.errors import AsyncModelsError, BatchError, InvalidRequestError, RateLimitError

__all__ = ["Part"]

_CROWDED = "token_limit_exceeded"


@dataclass(slots=True)
class Part:
    """A batch of ours, from when its file is begun until nothing of it is left."""

    number: int
    key: str = ""
    began: float = 0.0
    requests: int = 0
    lines: FileOfLines | None = None
    old: bool = False
    """Whether an earlier run began it."""
    file: str | None = None
    id: str | None = None
    """The provider's, of what was uploaded and of the batch."""
    asked: bool = False
    """Whether the provider may have been told to begin it."""
    batch: ProviderBatch | None = None
    """As it was when somebody last looked."""
    left: int = 0
    """Rows that wait for it."""
    ready: bool = False
    """Whether all that came of it is on this disk."""
    lost: BatchError | None = None
    """Why nothing will come of it, where that is no word of the batch's own."""
    unreadable: int = 0
    """Lines of its output that are none of ours."""
    gone: list[str] = field(default_factory=list)
    """Files of its output that the provider does not have any more."""
    at_line: dict[int, str] = field(default_factory=dict)
    """The ids of the items in those lines of the file that the provider refused."""

    @property
    def status(self) -> str:
        return "preparing" if self.id is None else "begun" if self.batch is None else self.batch.status

    @property
    def at_work(self) -> bool:
        """Whether the provider has it and has not ended it, as far as we know."""
        if self.id is None or self.ready or self.lost is not None:
            return False
        return self.batch is None or self.batch.state == "working"

    @property
    def crowded(self) -> bool:
        """Whether the provider refused it only because it has too much of ours in its queue."""
        batch = self.batch
        return batch is not None and batch.state == "failed" and any(r.code == _CROWDED for r in batch.refusals)

    def missing(self, id: str) -> AsyncModelsError:
        """Why there is no answer to this item."""
        if self.lost is not None:
            return BatchError(self.lost.message, state=self.lost.state, batch=self.id)
        batch = self.batch
        name = f"The batch {self.id!r}"
        if self.gone:
            said = f"{name} has ended, and the provider does not have its output {', '.join(self.gone)} any more."
            return BatchError(said, state="missing", batch=self.id)
        if batch is None or batch.state == "completed":
            unreadable = f", where {self.unreadable} lines cannot be read" if self.unreadable else ""
            said = f"{name} was completed, and there is nothing about this item in its output{unreadable}."
            return BatchError(said, state="missing", batch=self.id)
        if batch.state != "failed":
            said = f"{name} {_ENDS[batch.state]} before this item was answered."
            return BatchError(said, state=batch.state, batch=self.id)
        blamed = [refusal for refusal in batch.refusals if self.at_line.get(refusal.line or 0) == id]
        if blamed:
            said = "; ".join(f"line {refusal.line}: {refusal.message}" for refusal in blamed[:_SHOWN])
            return InvalidRequestError(f"The provider refused the batch {self.id!r} for this item: {said}")
        why = "; ".join(self._described(refusal) for refusal in batch.refusals[:_SHOWN])
        more = len(batch.refusals) - _SHOWN
        rest = f" ({more} more)" if more > 0 else ""
        said = f"The provider refused the batch {self.id!r}: {why or 'it gives no reason'}{rest}"
        if self.crowded:
            return RateLimitError(said, code=_CROWDED)
        return BatchError(said, state="failed", batch=self.id)

    def _described(self, refusal: Refusal) -> str:
        if refusal.line is None:
            return refusal.message
        id = self.at_line.get(refusal.line)
        return f"line {refusal.line}{'' if id is None else f' (item {id!r})'}: {refusal.message}"


_ENDS = {"expired": "expired", "cancelled": "was cancelled", "working": "was left"}
_SHOWN = 3
