"""The charts of a report, as SVG in its page. Colours are the page's, by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asyncmodels.batch.report_text import duration, escaped, money, rounded, whole
from asyncmodels.batch.report_timeline import Column
from asyncmodels.histogram import Histogram

__all__ = ["cost_chart", "in_flight_chart", "latency_chart", "throughput_chart", "token_chart"]

_WIDTH, _HEIGHT = 560, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 18, 24
_MOST_BARS = 44


@dataclass(frozen=True, slots=True)
class _Series:
    name: str
    style: str
    """A class of the page: its colour."""


def latency_chart(service: Histogram, seconds: Histogram) -> str | None:
    """How long answers took. None where there are none."""
    apart = bool(service.counts())
    front, back = (service, seconds) if apart else (seconds, None)
    edges, counts, behind = _bars(front, back)
    if not edges:
        return None
    most = max([*counts, *behind])
    scale = _Scale(most)
    low, high = math.log(edges[0]), math.log(edges[-1])

    def across(value: float) -> float:
        return _LEFT + (math.log(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    marks = [
        f'<text class="tick" x="{across(at):.1f}" y="{_HEIGHT - 8}">{duration(at)}</text>' for at in _log_ticks(edges)
    ]
    bars, outline, hits = [], [], []
    for place, count in enumerate(counts):
        left, right = across(edges[place]), across(edges[place + 1])
        if count:
            bars.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{scale(count):.1f}" width="{right - left - 1:.1f}" '
                f'height="{scale(0) - scale(count):.1f}"/>'
            )
        if behind:
            outline.append(f"{left:.1f},{scale(behind[place]):.1f} {right:.1f},{scale(behind[place]):.1f}")
        between = f"{duration(edges[place])} to {duration(edges[place + 1])}"
        told = f"{between}\n{whole(count)} " + ("by the model" if apart else "items")
        hits.append(_hit(left, right, told + (f"\n{whole(behind[place])} with waiting and retries" if behind else "")))
    lines = [f'<polyline class="line second" points="{" ".join(outline)}"/>'] if behind else []
    p50, p95 = front.quantile(0.5), front.quantile(0.95)
    for at, name, anchor, aside in ((p50, "p50", "end", -4), (p95, "p95", "start", 4)):
        if at is not None:
            x = min(max(across(at), _LEFT), _WIDTH - _RIGHT)
            side = ("start", 4) if anchor == "end" and x < _LEFT + 70 else (anchor, aside)
            side = ("end", -4) if side[0] == "start" and x > _WIDTH - 70 else side
            lines.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{_HEIGHT - _BOTTOM}"/>')
            lines.append(
                f'<text class="label" x="{x + side[1]:.1f}" y="{_TOP - 4}" text-anchor="{side[0]}">'
                f"{name} {duration(at)}</text>"
            )
    series = [_Series("by the model" if apart else "items", "first")]
    if behind:
        series.append(_Series("with waiting and retries", "second"))
    said = f"Half of the answers took at most {duration(p50)}, 95 % at most {duration(p95)}."
    return _figure("Latency", series, said, [*scale.grid(), *bars, *lines, *marks, *hits])


def throughput_chart(columns: Sequence[Column]) -> str | None:
    done = [column.done / column.seconds for column in columns]
    failed = [column.failed / column.seconds for column in columns]
    if not any(done):
        return None
    time, scale = _Time(columns), _Scale(max(done))
    drawn = [time.area("area", scale, done), time.line("line first", scale, done)]
    series = [_Series("done per second", "first")]
    if any(failed):
        drawn.append(time.area("bad", scale, failed))
        series.append(_Series("of them failed", "bad"))
    told = [
        f"{rounded(column.done / column.seconds)} per second\n{whole(column.failed)} of {whole(column.done)} failed"
        for column in columns
    ]
    mean = sum(column.done for column in columns) / time.seconds
    said = f"{rounded(mean)} items per second on average, {rounded(max(done))} at most."
    return _figure("Throughput", series, said, [*scale.grid(), *drawn, *time.grid(), *time.hits(told)])


def in_flight_chart(columns: Sequence[Column]) -> str | None:
    taken, limits = [column.in_flight for column in columns], [column.limit for column in columns]
    if not any(taken):
        return None
    known = [limit for limit in limits if limit is not None]
    served = [column.served for column in columns]
    apart = any(served)
    shown = served if apart else taken
    # Those that wait may be so many that nothing else could be seen beside them.
    waiting = apart and max(taken) <= 3 * max([*served, *known])
    time, scale = _Time(columns), _Scale(max([*shown, *known, *(taken if waiting else ())]))
    drawn = [time.area("area", scale, shown), time.line("line first", scale, shown)]
    series = [_Series("with the model" if apart else "in flight", "first")]
    said = f"{rounded(max(shown))} items were {'with the model' if apart else 'in flight'} at most."
    if waiting:
        drawn.append(time.line("line second", scale, taken))
        series.append(_Series("and waiting", "second"))
    if known:
        drawn.append(time.line("line limit", scale, limits))
        series.append(_Series("limit", "limit"))
        said += f" The limit was between {rounded(min(known))} and {rounded(max(known))}."
    refusals = [place for place, column in enumerate(columns) if column.refused]
    if refusals:
        drawn += [_tick(time.middle(place)) for place in refusals]
        series.append(_Series("refused (429)", "bad"))
    told = []
    for column in columns:
        lines = [f"{rounded(column.served)} with the model"] if apart else []
        lines += [f"{rounded(column.in_flight)} in flight{', waiting ones among them' if apart else ''}"]
        lines += [f"limit {rounded(column.limit)}"] if column.limit is not None else []
        lines += [f"{whole(column.refused)} refused"] if column.refused else []
        told.append("\n".join(lines))
    return _figure("In flight and limit", series, said, [*scale.grid(), *drawn, *time.grid(), *time.hits(told)])


def token_chart(columns: Sequence[Column]) -> str | None:
    given = [column.input_tokens / column.seconds for column in columns]
    made = [column.output_tokens / column.seconds for column in columns]
    if not any(given) and not any(made):
        return None
    time, scale = _Time(columns), _Scale(max([*given, *made]))
    drawn = [
        time.line("line second", scale, given),
        time.area("area", scale, made),
        time.line("line first", scale, made),
    ]
    series = [_Series("output per second", "first"), _Series("input per second", "second")]
    told = [f"{rounded(o)} out per second\n{rounded(i)} in per second" for o, i in zip(made, given, strict=True)]
    mean = sum(column.output_tokens for column in columns) / time.seconds
    said = f"{rounded(mean)} tokens of output per second on average, {rounded(max(made))} at most."
    return _figure("Tokens", series, said, [*scale.grid(), *drawn, *time.grid(), *time.hits(told)])


def cost_chart(columns: Sequence[Column], currency: str) -> str | None:
    total, sums = 0.0, []
    for column in columns:
        total += column.cost
        sums.append(total)
    if not total:
        return None
    time, scale = _Time(columns), _Scale(total, money=currency)
    drawn = [time.area("area", scale, sums), time.line("line first", scale, sums)]
    said = f"{money(total, currency)} for the tokens of all items."
    told = [money(amount, currency) for amount in sums]
    series = [_Series("cost so far, by the tokens", "first")]
    return _figure("Cost", series, said, [*scale.grid(), *drawn, *time.grid(), *time.hits(told)])


# -- parts ------------------------------------------------------------------------------------------------------------


class _Scale:
    """From a value of at least 0 to how far down it is."""

    def __init__(self, most: float, *, money: str | None = None) -> None:
        step = _step(most / 3.2)
        self._ticks = [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]
        self._top = self._ticks[-1] or 1.0
        self._money = money

    def __call__(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self._top * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        drawn = []
        for tick in self._ticks:
            y = self(tick)
            said = rounded(tick) if self._money is None else money(tick, self._money)
            style = "base" if tick == 0 else "grid"
            drawn.append(f'<line class="{style}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text class="value" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{escaped(said)}</text>')
        return drawn


class _Time:
    """The columns of a run side by side."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self.seconds = columns[-1].start + columns[-1].seconds

    def x(self, seconds: float) -> float:
        return _LEFT + seconds / self.seconds * (_WIDTH - _LEFT - _RIGHT)

    def middle(self, place: int) -> float:
        column = self._columns[place]
        return self.x(column.start + column.seconds / 2)

    def line(self, style: str, scale: _Scale, values: Sequence[float | None]) -> str:
        """With a gap wherever there is none."""
        path, pen = [], "M"
        for column, value in zip(self._columns, values, strict=True):
            if value is None or column.pause:
                pen = "M"
            if value is None:
                continue
            y = f"{scale(value):.1f}"
            path.append(f"{pen}{self.x(column.start):.1f} {y}H{self.x(column.start + column.seconds):.1f}")
            pen = "L"
        return f'<path class="{style}" d="{"".join(path)}"/>'

    def area(self, style: str, scale: _Scale, values: Sequence[float]) -> str:
        base = f"{scale(0):.1f}"
        path = [f"M{_LEFT} {base}"]
        for column, value in zip(self._columns, values, strict=True):
            path.append(f"L{self.x(column.start):.1f} {scale(value):.1f}H{self.x(column.start + column.seconds):.1f}")
        return f'<path class="{style}" d="{"".join(path)}V{base}Z"/>'

    def grid(self) -> list[str]:
        drawn = []
        step = _step_of_time(self.seconds / 6)
        for number in range(int(self.seconds / step + 1e-9) + 1):
            x = self.x(number * step)
            anchor = "end" if x > _WIDTH - 22 else "middle"
            at = duration(number * step)
            drawn.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{at}</text>')
        for column in self._columns:
            if column.pause:
                x = self.x(column.start)
                drawn.append(
                    f'<line class="pause" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{_HEIGHT - _BOTTOM}"/>'
                )
                anchor, aside = ("end", -4) if x > _WIDTH / 2 else ("start", 4)
                drawn.append(
                    f'<text class="label" x="{x + aside:.1f}" y="{_TOP - 6}" text-anchor="{anchor}">'
                    f"pause of {duration(column.pause)}</text>"
                )
        return drawn

    def hits(self, told: Iterable[str]) -> list[str]:
        return [
            _hit(
                self.x(column.start),
                self.x(column.start + column.seconds),
                f"at {duration(column.start) if column.start else '0 s'}\n{text}",
            )
            for column, text in zip(self._columns, told, strict=True)
        ]


def _tick(x: float) -> str:
    base = _HEIGHT - _BOTTOM
    return f'<line class="refusal" x1="{x:.1f}" x2="{x:.1f}" y1="{base - 7}" y2="{base}"/>'


def _hit(left: float, right: float, told: str) -> str:
    """What the pointer meets: it says what is drawn there."""
    return (
        f'<rect class="hit" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0.1):.1f}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{escaped(told)}</title></rect>'
    )


def _figure(title: str, series: Sequence[_Series], said: str, drawn: Iterable[str]) -> str:
    legend = "".join(f'<li class="{each.style}">{escaped(each.name)}</li>' for each in series)
    return (
        f'<figure class="card"><figcaption><h3>{escaped(title)}</h3><ul class="legend">{legend}</ul></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(f"{title}. {said}")}">'
        f"{''.join(drawn)}</svg></figure>\n"
    )


def _bars(front: Histogram, back: Histogram | None) -> tuple[list[float], list[int], list[int]]:
    """The edges of bars, how many there are in each, and how many of what is drawn behind; few enough bars to see."""
    found, behind = front.counts(), {} if back is None else back.counts()
    if not found and not behind:
        return [], [], []
    first, last = min([*found, *behind]), max([*found, *behind])
    # A single one is a bar, too, and not a wall.
    first, last = first - max(0, 12 - last + first) // 2, last + max(0, 13 - last + first) // 2
    together = math.ceil((last - first + 1) / _MOST_BARS)
    starts = range(first, last + 1, together)
    edges = [Histogram.edge(start) for start in (*starts, starts[-1] + together)]
    counts = [sum(found.get(start + more, 0) for more in range(together)) for start in starts]
    others = [sum(behind.get(start + more, 0) for more in range(together)) for start in starts]
    return edges, counts, others if behind else []


def _log_ticks(edges: Sequence[float]) -> list[float]:
    low, high = edges[0], edges[-1]
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)]


def _step(least: float) -> float:
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * 0.999)


def _step_of_time(least: float) -> float:
    if least <= 30:
        return _step(least) if least <= 10 else 15.0 if least <= 15 else 30.0
    for unit, steps in ((60.0, (1, 2, 5, 10, 15, 30)), (3600.0, (1, 2, 4, 6, 12))):
        for step in steps:
            if step * unit >= least:
                return step * unit
    return math.ceil(least / 86_400) * 86_400.0
