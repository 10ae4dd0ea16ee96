"""What a report says of all items together, in bounded memory however many there are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncmodels.batch.record import Record, Sample
from asyncmodels.batch.report_cost import Costs
from asyncmodels.batch.report_timeline import Timeline
from asyncmodels.histogram import Histogram
from asyncmodels.policies.prices import Price

__all__ = ["Example", "Failures", "Summary"]

_MOST_KINDS = 100
_EXAMPLES = 3
_LONGEST = 600
_OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Example:
    id: str
    place: int
    text: str


@dataclass(slots=True)
class Failures:
    """Of one class."""

    count: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)


class Summary:
    """Adds up the items and samples of a journal whose ``run`` this is."""

    def __init__(self, run: Mapping[str, Any], price: Price | None = None) -> None:
        self.run = run
        self.items = 0
        self.failed = 0
        self.cached = 0
        self.retries = 0
        self.refused = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.without_usage = 0
        self.most_in_flight = 0
        self.limit: int | None = None
        """The latest."""
        self.seconds = Histogram()
        self.service = Histogram()
        self.queued = Histogram()
        self.first_token = Histogram()
        self.errors: dict[str, Failures] = {}
        self.models: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.timeline = Timeline()
        self.costs = Costs(run, price)
        self._refused_before = 0

    @property
    def answered(self) -> int:
        return self.items - self.failed

    def item(self, record: Record) -> None:
        self.items += 1
        self.retries += max(0, record.attempts - 1)
        if record.error is not None:
            self.failed += 1
            self._fail(record.error, record)
        elif record.cached:
            self.cached += 1
        for counter, name in ((self.models, record.model), (self.endings, record.finish_reason)):
            if name is not None:
                counter[name if name in counter or len(counter) < 20 else _OTHERS] += 1
        if record.error is None and not record.cached:
            self._time(record)
        tokens = (record.input_tokens or 0, record.output_tokens or 0)
        if record.input_tokens is None and record.error is None:
            self.without_usage += 1
        self.input_tokens += tokens[0]
        self.output_tokens += tokens[1]
        self.cached_tokens += record.cached_tokens or 0
        self.reasoning_tokens += record.reasoning_tokens or 0
        cost = self.costs.item(record)
        self.timeline.item(
            record.began,
            record.began + record.seconds,
            failed=record.error is not None,
            service=record.service,
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            cost=cost,
        )

    def sample(self, sample: Sample) -> None:
        refused = sample.refused or 0
        # Each run counts from nothing; a journal may be that of several.
        since = refused - self._refused_before if refused >= self._refused_before else refused
        self._refused_before = refused
        self.refused += since
        self.most_in_flight = max(self.most_in_flight, sample.in_flight)
        self.limit = self.limit if sample.limit is None else sample.limit
        self.costs.sample(sample)
        self.timeline.sample(sample, refused=since)

    def _time(self, record: Record) -> None:
        found = (
            (self.seconds, record.seconds),
            (self.service, record.service),
            (self.queued, record.queued),
            (self.first_token, record.first_token),
        )
        for histogram, seconds in found:
            if seconds is not None and 0 <= seconds < math.inf:
                histogram.add(seconds)

    def _fail(self, error: str, record: Record) -> None:
        kind = error if error in self.errors or len(self.errors) < _MOST_KINDS else _OTHERS
        failures = self.errors.setdefault(kind, Failures())
        failures.count += 1
        if record.error_status is not None and (
            record.error_status in failures.statuses or len(failures.statuses) < 20
        ):
            failures.statuses[record.error_status] += 1
        if len(failures.examples) >= _EXAMPLES:
            return
        text = (record.error_text or "")[:_LONGEST]
        if all(_alike(text) != _alike(example.text) for example in failures.examples):
            failures.examples.append(Example(record.id, record.place, text))


def _alike(text: str) -> str:
    """What two messages have in common that differ in their numbers only."""
    return re.sub(r"\d+", "0", text[:200])
