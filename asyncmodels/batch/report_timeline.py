"""What happened when, of a run of any length, in bounded memory.

Time is cut into bins; where there are too many, each two become one. So a run of a week takes no more room than one of
a minute, and one that was resumed a month later no more than one that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyncmodels.batch.record import Sample

__all__ = ["Column", "Timeline"]

_FINEST = 1 / 32
_MOST_BINS = 4096
_PAUSE = 5.0
"""Seconds of nothing at all that are cut out of a chart."""


@dataclass(slots=True)
class _Bin:
    net: int = 0
    """How many more items began here than ended."""
    held: float = 0.0
    """How many seconds those that began here were in flight here, less those in which those that ended were not."""
    served_net: int = 0
    served: float = 0.0
    """The same of those that were with the model, and neither waited nor were to be tried again."""
    done: int = 0
    failed: int = 0
    input: int = 0
    output: int = 0
    cost: float = 0.0
    refused: int = 0
    samples: int = 0
    in_flight: int = 0
    limits: int = 0
    limit: int = 0
    first: float = math.inf
    last: float = -math.inf

    def add(self, other: _Bin) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first = min(self.first, other.first)
        self.last = max(self.last, other.last)


_SUMS = tuple(name for name in _Bin.__slots__ if name not in ("first", "last"))


@dataclass(slots=True, kw_only=True)
class Column:
    """Some time of a run, as a chart shows it."""

    start: float = 0.0
    """Seconds since the run began, pauses left out."""
    seconds: float
    pause: float = 0.0
    """How many seconds were cut out before it."""
    done: int = 0
    failed: int = 0
    """Of those that are done."""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    refused: int = 0
    in_flight: float = 0.0
    """On average, those among them that wait."""
    served: float = 0.0
    """How many of them were with the model."""
    limit: float | None = None


class Timeline:
    """Takes items and samples in any order; tells columns for a chart."""

    def __init__(self) -> None:
        self._width = _FINEST
        self._bins: dict[int, _Bin] = {}

    def item(
        self,
        began: float,
        ended: float,
        *,
        failed: bool,
        service: float | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cost: float = 0.0,
    ) -> None:
        if not (0 < began <= ended < math.inf):  # of an item that was never asked, or that somebody else wrote
            return
        start = self._at(began)
        start.net += 1
        start.held += self._left(began)
        end = self._at(ended)
        end.net -= 1
        end.held -= self._left(ended)
        end.done += 1
        end.failed += failed
        end.input += input_tokens
        end.output += output_tokens
        end.cost += cost
        if service is not None and 0 <= service < math.inf:
            sent = max(began, ended - service)
            start = self._at(sent)
            start.served_net += 1
            start.served += self._left(sent)
            end = self._at(ended)
            end.served_net -= 1
            end.served -= self._left(ended)

    def sample(self, sample: Sample, *, refused: int = 0) -> None:
        """``refused`` is since the sample before."""
        if not (0 < sample.at < math.inf):
            return
        there = self._at(sample.at)
        there.samples += 1
        there.in_flight += sample.in_flight
        there.refused += refused
        if sample.limit is not None:
            there.limits += 1
            there.limit += sample.limit

    def span(self) -> tuple[float, float] | None:
        """When the first and when the last thing happened, in seconds since 1970."""
        if not self._bins:
            return None
        return min(each.first for each in self._bins.values()), max(each.last for each in self._bins.values())

    def columns(self, most: int = 150) -> list[Column]:
        """About so many at most, one for each short time of the run, pauses left out."""
        while (count := self._active()) > 4 * most:
            self._halve()
        together = max(1, math.ceil(count / most))
        columns: list[Column] = []
        start = 0.0
        for stretch in self._stretches():
            for column in self._drawn(stretch, together):
                column.start = start
                start += column.seconds
                columns.append(column)
        if columns:
            columns[0].pause = 0.0
        return columns

    # -- bins ---------------------------------------------------------------------------------------------------------

    def _at(self, time: float) -> _Bin:
        place = int(time / self._width)
        found = self._bins.get(place)
        if found is None:
            if len(self._bins) >= _MOST_BINS:
                self._halve()
                return self._at(time)
            found = self._bins[place] = _Bin()
        if time < found.first:
            found.first = time
        if time > found.last:
            found.last = time
        return found

    def _left(self, time: float) -> float:
        """Seconds until the end of its bin."""
        return (int(time / self._width) + 1) * self._width - time

    def _halve(self) -> None:
        halved: dict[int, _Bin] = {}
        for place, each in self._bins.items():
            if place % 2 == 0:
                each.held += each.net * self._width  # through the second half of the new one
                each.served += each.served_net * self._width
            there = halved.get(place // 2)
            if there is None:
                halved[place // 2] = each
            else:
                there.add(each)
        self._bins = halved
        self._width *= 2

    def _is_pause(self, before: int, after: int, in_flight: int) -> bool:
        return in_flight <= 0 and (after - before - 1) * self._width > _PAUSE

    def _active(self) -> int:
        """How many bins there are without the pauses, and with those in which nothing began or ended."""
        count, in_flight, before = 0, 0, None
        for place in sorted(self._bins):
            count += 1
            if before is not None and not self._is_pause(before, place, in_flight):
                count += place - before - 1
            in_flight += self._bins[place].net
            before = place
        return count

    def _stretches(self) -> list[_Stretch]:
        stretches: list[_Stretch] = []
        in_flight, served, before = 0, 0, None
        for place in sorted(self._bins):
            if before is None or self._is_pause(before, place, in_flight):
                pause = 0.0 if before is None else (place - before - 1) * self._width
                stretches.append(_Stretch(place * self._width, pause, []))
            else:
                stretches[-1].bins += [(_NOTHING, in_flight, served)] * (place - before - 1)
            stretches[-1].bins.append((self._bins[place], in_flight, served))
            in_flight += self._bins[place].net
            served += self._bins[place].served_net
            before = place
        return stretches

    # -- columns ------------------------------------------------------------------------------------------------------

    def _drawn(self, stretch: _Stretch, together: int) -> list[Column]:
        wide = together * self._width
        parts = [self._part(stretch.bins[at : at + together]) for at in range(0, len(stretch.bins), together)]
        # Nothing had happened yet, or any more, in some of the outermost: they are as long as what did.
        parts[0].seconds -= max(0.0, stretch.bins[0][0].first - stretch.start)
        parts[-1].seconds -= max(0.0, stretch.start + len(stretch.bins) * self._width - stretch.bins[-1][0].last)
        if len(parts) > 1 and parts[0].seconds < wide / 2:
            parts[1].add(parts.pop(0))
        if len(parts) > 1 and parts[-1].seconds < wide / 2:
            last = parts.pop()
            parts[-1].add(last)
        sampled = _between([part.sum.in_flight / part.sum.samples if part.sum.samples else None for part in parts])
        columns, limit = [], None
        for part, level in zip(parts, sampled, strict=True):
            columns.append(part.column(level))
            limit = columns[-1].limit = limit if columns[-1].limit is None else columns[-1].limit
        columns[0].pause = stretch.pause
        return columns

    def _part(self, bins: list[tuple[_Bin, int, int]]) -> _Part:
        part = _Part(_Bin(), len(bins) * self._width)
        for each, in_flight, served in bins:
            part.sum.add(each)
            part.held += in_flight * self._width + each.held
            part.served += served * self._width + each.served
        return part


_NOTHING = _Bin()


@dataclass(slots=True)
class _Stretch:
    """Bins that follow each other, each with how many items were in flight, and with the model, when it began."""

    start: float
    pause: float
    bins: list[tuple[_Bin, int, int]]


@dataclass(slots=True)
class _Part:
    sum: _Bin
    seconds: float
    held: float = 0.0
    """Seconds of all items that were in flight."""
    served: float = 0.0

    def add(self, other: _Part) -> None:
        self.sum.add(other.sum)
        self.seconds += other.seconds
        self.held += other.held
        self.served += other.served

    def column(self, sampled: float | None) -> Column:
        sum, seconds = self.sum, max(self.seconds, 1e-3)
        # What has not ended yet, or never will because the run was killed, is in no item but in the samples.
        in_flight = max(self.held / seconds, 0.0 if sampled is None else sampled)
        return Column(
            seconds=seconds,
            done=sum.done,
            failed=sum.failed,
            input_tokens=sum.input,
            output_tokens=sum.output,
            cost=sum.cost,
            refused=sum.refused,
            in_flight=in_flight,
            served=max(0.0, self.served / seconds),
            limit=sum.limit / sum.limits if sum.limits else None,
        )


def _between(values: list[float | None]) -> list[float | None]:
    """With a straight line over each gap between two of them."""
    filled = list(values)
    before: int | None = None
    for place, value in enumerate(values):
        if value is None:
            continue
        if before is not None and (first := values[before]) is not None:
            for gap in range(before + 1, place):
                filled[gap] = first + (value - first) * (gap - before) / (place - before)
        before = place
    return filled
