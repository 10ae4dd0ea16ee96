"""What a run has done so far, in bounded memory: counts, tokens, and percentiles of how long items took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncmodels.batch.item import Item
from asyncmodels.histogram import Histogram
from asyncmodels.types import Usage

__all__ = ["RunStatistics", "Tally"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """What a run has done. Seconds are of the wall clock; tokens are what the provider said it used."""

    total: int | None
    """How many inputs there are, None where the input does not say."""
    read: int
    """Inputs that were taken up."""
    in_flight: int
    succeeded: int
    failed: int
    reused: int
    """Of those that succeeded, the ones that came from the journal."""
    cached: int
    """Of those that succeeded, the ones that a cache answered."""
    retries: int
    """Attempts beyond the first, of items that succeeded in the end or whose error says so."""
    elapsed: float
    usage: Usage
    """Tokens of the items that were asked now, reused ones left out."""
    p50: float | None
    p95: float | None
    """Seconds an item took, waiting included, within 4 %; None before the first."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """How many items failed, by the name of the error's class."""
    batches: Mapping[str, int] = field(default_factory=dict)
    """In mode "batch": how many batches there are and were, by the provider's word for what they do, or did."""
    answered_there: int = 0
    """Of the items in flight in such a run, those that the provider has answered and not given out yet."""

    @property
    def done(self) -> int:
        """Items that have ended, well or not."""
        return self.succeeded + self.failed

    @property
    def per_second(self) -> float:
        """Items that were asked now and are done, per second of the run so far."""
        return (self.done - self.reused) / self.elapsed if self.elapsed > 0 else 0.0


class Tally:
    """Counts items as they end."""

    def __init__(self) -> None:
        self.read = 0
        self.in_flight = 0
        self.batches: Mapping[str, int] = {}
        self.answered_there = 0
        self._succeeded = 0
        self._reused = 0
        self._cached = 0
        self._retries = 0
        self._usage = [0, 0, 0, 0]
        self._errors: Counter[str] = Counter()
        self._times = Histogram()

    @property
    def failed(self) -> int:
        return self._errors.total()

    def add(self, item: Item) -> None:
        if item.error is not None:
            self._errors[type(item.error).__name__] += 1
            self._retries += max(0, (getattr(item.error, "attempts", None) or 1) - 1)
        elif item.response is not None:
            self._succeeded += 1
            if item.reused:
                self._reused += 1
                return
            self._cached += item.response.cached
            self._retries += max(0, item.response.attempts - 1)
            self._count(item.response.usage)
        if item.request is not None:
            self._times.add(item.seconds)

    def statistics(self, *, total: int | None, elapsed: float) -> RunStatistics:
        return RunStatistics(
            total=total,
            read=self.read,
            in_flight=self.in_flight,
            succeeded=self._succeeded,
            failed=self.failed,
            reused=self._reused,
            cached=self._cached,
            retries=self._retries,
            elapsed=elapsed,
            usage=Usage(*self._usage),
            p50=self._times.quantile(0.5),
            p95=self._times.quantile(0.95),
            errors=dict(self._errors.most_common()),
            batches=dict(self.batches),
            answered_there=self.answered_there,
        )

    def _count(self, usage: Usage | None) -> None:
        if usage is None:
            return
        tokens = (usage.input_tokens, usage.output_tokens, usage.cached_tokens or 0, usage.reasoning_tokens or 0)
        for place, count in enumerate(tokens):
            self._usage[place] += count
