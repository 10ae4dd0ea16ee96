"""What was measured, as the lines of a table and as a plot of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncmodels.commands.bench_measure import Level, quantile

__all__ = ["HEADER", "line", "plot", "seconds"]

_COLUMNS = (
    ("at once", 7),
    ("requests", 8),
    ("errors", 6),
    ("TTFT p50", 9),
    ("p95", 9),
    ("per token", 9),
    ("p95", 9),
    ("latency", 9),
    ("p95", 9),
    ("req/s", 7),
    ("tokens/s", 9),
)
HEADER = "  ".join(name.rjust(width) for name, width in _COLUMNS)
_WIDTH = 50


def line(level: Level) -> str:
    told = "" if level.tokens_told else "~"
    cells = [
        f"{level.concurrency:,}",
        f"{len(level.answers) + level.errors.total():,}",
        f"{level.errors.total():,}",
        *(
            seconds(quantile(values, share))
            for values in (level.first_tokens, level.per_token, level.latencies)
            for share in (0.5, 0.95)
        ),
        f"{level.requests_per_second:.2f}",
        f"{told}{level.tokens_per_second:,.1f}",
    ]
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def plot(levels: Sequence[Level], encoding: str | None) -> str:
    """Bars, of blocks where ``encoding`` has them."""
    try:
        full, light = "█", "░"
        f"{full}{light}".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        full, light = "#", "-"
    return "\n\n".join(
        (
            _bars("tokens per second", levels, lambda level: (level.tokens_per_second, None), _rate, full, light),
            _bars(
                "time to first token, p50 and p95",
                levels,
                lambda level: _both(level.first_tokens),
                seconds,
                full,
                light,
            ),
            _bars("time per token, p50 and p95", levels, lambda level: _both(level.per_token), seconds, full, light),
        )
    )


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _both(values: Sequence[float]) -> tuple[float | None, float | None]:
    return quantile(values, 0.5), quantile(values, 0.95)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _bars(
    title: str,
    levels: Sequence[Level],
    of: Callable[[Level], tuple[float | None, float | None]],
    said: Callable[[float | None], str],
    full: str,
    light: str,
) -> str:
    """A bar for each level, and a lighter one to its second value."""
    values = [(level, *of(level)) for level in levels]
    most = max((value for _, *both in values for value in both if value is not None), default=0.0) or 1.0
    width = max(len(f"{level.concurrency:,}") for level in levels)
    lines = [title]
    for level, low, high in values:
        solid = round(_WIDTH * (low or 0.0) / most)
        rest = round(_WIDTH * (high or 0.0) / most) - solid
        told = said(low) if high is None else f"{said(low)} {said(high)}"
        lines.append(f"  {level.concurrency:>{width},} {full * solid}{light * max(0, rest)} {told}")
    return "\n".join(lines)
