"""The page of a report around its data: what can be read without a script, and what the browser may do.

It may load nothing from anywhere, and run the one script that is here and no other: a policy in the page says so, with
the digests of its script and its style.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from asyncmodels.batch.report_charts import cost_chart, in_flight_chart, latency_chart, throughput_chart, token_chart
from asyncmodels.batch.report_rows import COLUMNS, Rows
from asyncmodels.batch.report_summary import Failures, Summary
from asyncmodels.batch.report_text import clock_time, duration, escaped, money, rounded, share, whole
from asyncmodels.batch.report_timeline import Column

__all__ = ["begin_page", "end_page", "is_page_of"]


def begin_page(name: str, summary: Summary, rows: Rows, written: float) -> str:
    """All of the page before its data. ``name`` is that of the journal, ``written`` when the page was."""
    style, script = _asset("report.css"), _script()
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    model = _model(summary)
    columns = summary.timeline.columns(110)
    figures = f"{_tiles(summary, columns)}{_charts(summary, columns)}{_failures(summary)}"
    return (
        f"{_BEGIN}{_mark(name, summary.run)}"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(model)}: {escaped(name)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#table">To the prompts and answers</a>\n'
        f"{_header(name, model, summary)}<main>\n{figures}{_table(summary, rows)}</main>\n{_footer(written)}"
        '<dialog id="details" aria-label="One item"></dialog>\n<div id="tip" aria-hidden="true"></div>\n'
    )


def is_page_of(path: Path, name: str, run: Mapping[str, Any]) -> bool:
    """Whether the file at ``path`` is a page of ours about this ``run`` of a journal of this name."""
    begin = f"{_BEGIN}{_mark(name, run)}".encode()
    with open(path, "rb") as file:
        return file.read(len(begin)) == begin


def end_page(rows: Rows) -> str:
    """All of it after its data."""
    names = json.dumps({"columns": COLUMNS, "errors": list(rows.errors), "finishes": list(rows.finishes)})
    harmless = names.replace("<", "\\u003c")  # whatever an error is called, it ends no script
    return (
        f'<script type="application/json" id="names">{harmless}</script>\n<script>{_script()}</script>\n'
        "</body>\n</html>\n"
    )


_BEGIN = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'


def _mark(name: str, run: Mapping[str, Any]) -> str:
    """A journal that is started over has the name of the one before it; when it was made tells them apart."""
    created = escaped(json.dumps(run.get("created")))
    whose = f'<meta name="description" content="{escaped(name)}">\n<meta name="created" content="{created}">'
    return f'<meta name="generator" content="asyncmodels report">\n{whose}\n'


def _script() -> str:
    return _asset("report_data.js") + _asset("report.js")


def _asset(name: str) -> str:
    return files("asyncmodels.batch").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"


# -- the parts of it --------------------------------------------------------------------------------------------------


def _model(summary: Summary) -> str:
    who = summary.run.get("who")
    named = who.get("model") if isinstance(who, dict) else None
    return str(named or summary.costs.origin.model or "a model without a name")


def _header(name: str, model: str, summary: Summary) -> str:
    origin, run = summary.costs.origin, summary.run
    where = [origin.provider, _address(origin.url)]
    span = summary.timeline.span()
    facts = [escaped(each) for each in where if each] + [escaped(name)]
    if span is not None:
        facts.append(f"{clock_time(span[0])} to {clock_time(span[1])[11 if _same_day(*span) else 0 :]} UTC")
    total = run.get("total")
    state = ""
    if "ended" in run and run["ended"] is None:
        done = f"{whole(summary.items)} of {whole(total)}" if isinstance(total, int) else whole(summary.items)
        state = f'<p class="state">Not ended: {done} items so far. The run goes on, or was stopped before its end.</p>'
    return (
        f'<header><p class="kind">Report of a run</p><h1>{escaped(model)}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p>{state}</header>\n'
    )


def _address(url: str | None) -> str | None:
    """Without what may be a secret."""
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        host = f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        return None
    return f"{host}{parts.path}"


def _same_day(first: float, last: float) -> bool:
    return clock_time(first)[:10] == clock_time(last)[:10]


@dataclass(frozen=True, slots=True)
class _Tile:
    name: str
    value: str
    more: str = ""
    style: str = ""


def _tiles(summary: Summary, columns: Sequence[Column]) -> str:
    drawn = "".join(
        f'<div class="tile {tile.style}"><dt>{escaped(tile.name)}</dt><dd>{escaped(tile.value)}</dd>'
        f"<dd>{escaped(tile.more)}</dd></div>"
        for tile in _said(summary, columns)
    )
    return f'<dl class="tiles" aria-label="Totals">{drawn}</dl>\n'


def _said(summary: Summary, columns: Sequence[Column]) -> Iterable[_Tile]:
    seconds = sum(column.seconds for column in columns)
    total, more = summary.run.get("total"), ""
    if isinstance(total, int) and total > summary.items:
        more = f"{whole(total - summary.items)} of {whole(total)} are missing"
    yield _Tile("Items", whole(summary.items), more)
    yield _Tile(
        "Failed",
        share(summary.failed, summary.items),
        f"{whole(summary.failed)} of {_kinds(len(summary.errors))}" if summary.failed else "none",
        "bad" if summary.failed else "",
    )
    yield _Tile("Took", duration(seconds), "pauses left out" if any(column.pause for column in columns) else "")
    if seconds:
        done = sum(column.done for column in columns)
        yield _Tile("Throughput", f"{rounded(done / seconds)}/s", f"{rounded(done / seconds * 60)} items a minute")
    times = summary.service if summary.service.counts() else summary.seconds
    if times.counts():
        more = f"p95 {duration(times.quantile(0.95))} · p99 {duration(times.quantile(0.99))}"
        yield _Tile("Latency, p50", duration(times.quantile(0.5)), more)
    if summary.first_token.counts():
        more = f"p95 {duration(summary.first_token.quantile(0.95))}"
        yield _Tile("First token, p50", duration(summary.first_token.quantile(0.5)), more)
    if summary.input_tokens or summary.output_tokens:
        cached = f" · {rounded(summary.cached_tokens)} cached" if summary.cached_tokens else ""
        reasoning = f" · {rounded(summary.reasoning_tokens)} reasoning" if summary.reasoning_tokens else ""
        yield _Tile(
            "Tokens out", rounded(summary.output_tokens), f"{rounded(summary.input_tokens)} in{cached}{reasoning}"
        )
    yield _cost(summary)
    refused = f"{whole(summary.refused)} calls refused (429)" if summary.refused else "attempts beyond the first"
    yield _Tile("Retries", whole(summary.retries), refused)
    if summary.cached:
        yield _Tile("From the cache", whole(summary.cached), share(summary.cached, summary.items))


def _kinds(count: int) -> str:
    return "one kind" if count == 1 else f"{count} kinds"


def _cost(summary: Summary) -> _Tile:
    cost, currency = summary.costs.total, summary.costs.currency
    if cost is None:
        return _Tile("Cost", "?", summary.costs.source)
    shared = cost and summary.answered and not summary.costs.partial
    each = f"{money(cost / summary.answered * 1000, currency)} per 1,000 · " if shared else ""
    return _Tile("Cost", money(cost, currency), f"{each}{summary.costs.source}")


def _charts(summary: Summary, columns: Sequence[Column]) -> str:
    drawn = [latency_chart(summary.service, summary.seconds)]
    if columns:
        drawn += [
            throughput_chart(columns),
            in_flight_chart(columns),
            token_chart(columns),
            cost_chart(columns, summary.costs.currency),
        ]
    found = [chart for chart in drawn if chart is not None]
    if not found:
        return '<p class="note">There is nothing to draw: no item has been answered yet.</p>\n'
    wide = "" if len(found) % 2 else " wide"
    return f'<section class="charts" aria-label="Charts">\n{"".join(found)}{_numbers(summary, wide)}</section>\n'


def _numbers(summary: Summary, wide: str) -> str:
    times = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td class="number">{duration(times.quantile(part))}</td>' for part in (0.5, 0.95, 0.99, 1.0))
        + "</tr>"
        for name, times in (
            ("waiting before", summary.queued),
            ("first token", summary.first_token),
            ("by the model", summary.service),
            ("all together", summary.seconds),
        )
        if times.counts()
    )
    return (
        f'<div class="card numbers{wide}"><div><h3>Times</h3><table><thead><tr><td></td><th scope="col">p50</th>'
        '<th scope="col">p95</th><th scope="col">p99</th><th scope="col">most</th></tr></thead>'
        f"<tbody>{times}</tbody></table></div>{_counted('Endings', summary.endings)}"
        f"{_counted('Answered by', summary.models)}</div>\n"
    )


def _counted(title: str, counter: Counter[str]) -> str:
    if not counter:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td class="number">{whole(count)}</td></tr>'
        for name, count in counter.most_common(5)
    )
    more = f"<p>and {len(counter) - 5} more</p>" if len(counter) > 5 else ""
    return f"<div><h3>{title}</h3><table><tbody>{rows}</tbody></table>{more}</div>"


def _failures(summary: Summary) -> str:
    if not summary.errors:
        return ""
    kinds = sorted(summary.errors.items(), key=lambda each: -each[1].count)
    rows = "".join(_failure(name, failures, summary) for name, failures in kinds)
    return (
        '<section class="card errors" aria-labelledby="errors-title"><h2 id="errors-title">Errors</h2>\n<table><thead>'
        '<tr><th scope="col">Kind</th><th scope="col" class="number">Items</th><th scope="col">Examples</th></tr>'
        f"</thead><tbody>\n{rows}</tbody></table></section>\n"
    )


def _failure(name: str, failures: Failures, summary: Summary) -> str:
    statuses = ", ".join(f"{status}: {whole(count)}" for status, count in failures.statuses.most_common(4))
    examples = "".join(
        f'<li><button type="button" class="link" data-place="{example.place}">{escaped(example.id[:80])}</button> '
        f"{escaped(example.text) or '(no message)'}</li>"
        for example in failures.examples
    )
    return (
        f'<tr><th scope="row"><button type="button" class="link" data-error="{escaped(name)}">{escaped(name)}</button>'
        f"<small>{f'HTTP {statuses}' if statuses else ''}</small></th>"
        f'<td class="number">{whole(failures.count)}<small>{share(failures.count, summary.items)}</small></td>'
        f"<td><ul>{examples}</ul></td></tr>\n"
    )


def _table(summary: Summary, rows: Rows) -> str:
    heads = "".join(
        f'<div role="columnheader" class="{style}"><button type="button" data-sort="{by}">{name}</button></div>'
        if by
        else f'<div role="columnheader" class="{style}">{name}</div>'
        for name, by, style in _HEADS
    )
    return (
        '<section id="table" class="card" aria-labelledby="table-title"><div class="over">'
        '<h2 id="table-title">Prompts and answers</h2><p id="found" role="status"></p></div>\n'
        f"{_left_out(summary, rows)}<noscript><p class=note>The prompts and answers are shown by a script, and scripts "
        "are switched off here.</p></noscript>\n"
        '<form class="tools" role="search"><input id="query" type="search" autocomplete="off" spellcheck="false" '
        'placeholder="Search… (press /)" aria-label="Search the prompts and answers" aria-keyshortcuts="/">'
        '<select id="where" aria-label="Where to search"><option value="">everywhere</option><option value="prompt">in '
        'prompts</option><option value="answer">in answers</option><option value="error">in errors</option>'
        '<option value="id">in ids</option></select>'
        '<select id="outcome" aria-label="Which items"></select><select id="finish" aria-label="How answers ended">'
        "</select></form>\n"
        '<div id="grid" role="grid" tabindex="0" aria-label="Items; Enter shows one">'
        f'<div class="head" role="row" aria-rowindex="1">{heads}</div><div id="rows" role="rowgroup"></div></div>'
        '<p id="empty" class="note" hidden>Nothing is found.</p></section>\n'
    )


_HEADS = (
    ("#", "place", "number"),
    ("id", "", ""),
    ("outcome", "error", ""),
    ("prompt", "", ""),
    ("answer", "", ""),
    ("time", "seconds", "number"),
    ("in", "input", "number"),
    ("out", "output", "number"),
    ("tries", "attempts", "number"),
)


def _left_out(summary: Summary, rows: Rows) -> str:
    if rows.shown >= summary.items:
        return ""
    spread = rows.shown - rows.shown_besides
    besides = f", and {whole(rows.shown_besides)} more that failed" if rows.shown_besides else ""
    return (
        f'<p class="note">The table has {whole(rows.shown)} of the {whole(summary.items)} items: {whole(spread)} that '
        f"are spread evenly over the run{besides}. Everything above is about all of them.</p>\n"
    )


def _footer(written: float) -> str:
    from asyncmodels import __version__

    at = clock_time(written)
    return f"<footer><p>Times are UTC. Written by asyncmodels {escaped(__version__)} at {at}.</p></footer>\n"
