"""What was measured, as a picture: three charts side by side, in SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from asyncmodels.commands.bench_measure import Level, quantile
from asyncmodels.commands.bench_show import seconds

__all__ = ["picture"]

_WIDE, _HIGH = 300, 220
"""Of what is drawn in of one chart."""
_LEFT, _TOP, _BOTTOM, _BETWEEN = 70, 70, 50, 90
_BLUE, _GREY = "#1f6feb", "#8b949e"

_Values = Sequence[tuple[int, float | None]]


def picture(model: str, levels: Sequence[Level]) -> str:
    charts = (
        _chart("tokens per second", lambda value: f"{value:,.0f}", _of(levels, lambda level: level.tokens_per_second)),
        _chart(
            "time to first token, p50 and p95",
            seconds,
            _of(levels, lambda level: quantile(level.first_tokens, 0.5)),
            _of(levels, lambda level: quantile(level.first_tokens, 0.95)),
        ),
        _chart(
            "time per token, p50 and p95",
            seconds,
            _of(levels, lambda level: quantile(level.per_token, 0.5)),
            _of(levels, lambda level: quantile(level.per_token, 0.95)),
        ),
    )
    step = _WIDE + _BETWEEN
    width, height = _LEFT + len(charts) * step, _TOP + _HIGH + _BOTTOM
    drawn = "\n".join(
        f'<g transform="translate({_LEFT + number * step},{_TOP})">\n{chart}\n</g>'
        for number, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{_LEFT}" y="28" font-size="16" font-weight="bold">{escape(model)}</text>\n{drawn}\n</svg>\n'
    )


def _of(levels: Sequence[Level], value: Callable[[Level], float | None]) -> _Values:
    return [(level.concurrency, value(level)) for level in levels]


def _chart(title: str, said: Callable[[float], str], *lines: _Values) -> str:
    """The first line drawn through, the second one dashed; levels at even distances."""
    most = max((value for line in lines for _, value in line if value is not None), default=0.0) or 1.0
    names = [name for name, _ in lines[0]]
    distance = _WIDE / max(1, len(names) - 1)
    parts = [f'<text y="-14" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _HIGH * (1 - share)
        parts.append(f'<line x2="{_WIDE}" y1="{y:g}" y2="{y:g}" stroke="#d0d7de"/>')
        parts.append(f'<text x="-8" y="{y + 4:g}" text-anchor="end" fill="{_GREY}">{escape(said(most * share))}</text>')
    for number, name in enumerate(names):
        x = number * distance
        parts.append(f'<text x="{x:.1f}" y="{_HIGH + 18}" text-anchor="middle" fill="{_GREY}">{name:,}</text>')
    parts.append(f'<text x="{_WIDE / 2:g}" y="{_HIGH + 38}" text-anchor="middle">requests at once</text>')
    for line, dash in zip(lines, ("", ' stroke-dasharray="5 4"'), strict=False):
        points = [
            (number * distance, _HIGH * (1 - value / most))
            for number, (_, value) in enumerate(line)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_BLUE}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_BLUE}"/>' for x, y in points]
    return "\n".join(parts)
