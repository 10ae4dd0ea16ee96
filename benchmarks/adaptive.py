"""The adaptive limit of ``Concurrency("auto")`` against an oracle and a rival, on servers in simulated time.

    python benchmarks/adaptive.py                    # the tables, medians of 5 seeds
    python benchmarks/adaptive.py --quick            # one seed
    python benchmarks/adaptive.py --retry-after 1    # servers that say Retry-After: 1 when they refuse
    python benchmarks/adaptive.py --noise 0.8        # calls that differ more in what they take
    python benchmarks/adaptive.py --plot limits.png  # the limits over time as well (needs matplotlib)
    python benchmarks/adaptive.py --json out.json

2,000 callers ask again as soon as they are answered, and back off as ``Retry`` does when they are refused; a call takes
1 s of the server's time on average, log-normal, and 50 ms on the way. Each run lasts 600 s. ``oracle`` always sets the
limit that the server has just then; its answers are 100 %.

``inspect_ai`` is the controller of inspect_ai 0.3.285 (``AdaptiveConcurrency``) with its default bounds (10, 20, 100)
and with the bounds of ``Concurrency("auto")`` (1 to 1,000, from 20): slow start by doubling, then 5 % more for each
round of clean answers with at least 80 % of the limit in use, a fifth less for a refusal, at most every 15 s. Here it
gets slots that are free while their callers back off, which inspect_ai does not give it. ``fixed`` is a limit of 1,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from tests.policies.simulation import (  # found by the line above
    Given,
    Limiter,
    Metered,
    Ours,
    Outcome,
    Queueing,
    Refusing,
    Server,
    Sharing,
    run,
    steady,
    stepping,
)

SECONDS = 600
STEPS = "200, 20, 200"
DOWN, UP = 200, 400
"""When the server that steps has less room, and when it has it back."""


class Rival:
    """What inspect_ai does, told in our words; ``clean`` calls are those that were not refused before."""

    parks = False

    def __init__(self, least: int, start: int, most: int) -> None:
        self.least, self.most = least, most
        self.now = start
        self.successes = 0
        self.peak = 0
        self.refused_ever = False
        self.cooled_at = 0.0

    def limit(self, now: float) -> int:
        return self.now

    def began(self, now: float, running: int) -> None:
        if now >= self.cooled_at:
            self.peak = max(self.peak, running)

    def succeeded(self, now: float, started: float, level: int, running: int, *, clean: bool) -> None:
        if not clean or now < self.cooled_at:
            return
        self.successes += 1
        if self.successes < max(self.now, 4):
            return
        saturated = self.peak >= 0.8 * self.now
        self.successes = self.peak = 0
        if saturated:
            grown = self.now + max(1, round(0.05 * self.now)) if self.refused_ever else 2 * self.now
            if self.refused_ever and grown >= 10:
                grown = -(-grown // 5) * 5
            self.now = min(grown, self.most)

    def refused(self, now: float, started: float, running: int, retry_after: float | None) -> None:
        self.successes = self.peak = 0
        self.refused_ever = True
        if now < self.cooled_at:
            return
        self.cooled_at = now + 15
        cut = int(0.8 * self.now)
        self.now = max(cut // 5 * 5 if cut >= 10 else cut, self.least, 1)


LIMITERS: dict[str, Callable[[Server], Limiter]] = {
    "oracle": lambda server: Given(server.best),
    "auto": lambda server: Ours(),
    "inspect_ai 10-100": lambda server: Rival(10, 20, 100),
    "inspect_ai 1-1000": lambda server: Rival(1, 20, 1000),
    "fixed 1000": lambda server: Given(steady(1000)),
}


@dataclass(frozen=True)
class Setting:
    retry_after: float | None
    noise: float


def servers(setting: Setting) -> dict[str, Callable[[], Server]]:
    refusing = partial(Refusing, retry_after=setting.retry_after, noise=setting.noise)
    return {
        "at most 1": lambda: refusing(steady(1)),
        "at most 8": lambda: refusing(steady(8)),
        "at most 64": lambda: refusing(steady(64)),
        "at most 500": lambda: refusing(steady(500)),
        STEPS: lambda: refusing(stepping(200, (DOWN, 20), (UP, 200))),
        "slower past 32": lambda: Sharing(steady(32), noise=setting.noise),
        "queues past 32": lambda: Queueing(32, noise=setting.noise),
        "64, 16, 64 slower": lambda: Sharing(stepping(64, (DOWN, 16), (UP, 64)), noise=setting.noise),
        "20 a second": lambda: Metered(20, 20, setting.retry_after, noise=setting.noise),
    }


KNEES = {"slower past 32": 32, "queues past 32": 32}


@dataclass(frozen=True)
class Row:
    server: str
    limiter: str
    share_of_oracle: float
    refused_share: float
    recovery: int | None
    """Seconds from the return of the room until 180 of 200 are used; None if never."""
    settled: float
    """The mean limit in the last two thirds."""
    within: float | None
    """How much of that time the limit was within a quarter of the knee."""


def outcome(server: str, limiter: str, setting: Setting, seed: int) -> Outcome:
    built = servers(setting)[server]()
    return run(built, LIMITERS[limiter](built), seconds=SECONDS, seed=seed)


def measured(job: tuple[str, str, Setting, int]) -> Outcome:
    return outcome(*job)


def row(server: str, limiter: str, runs: list[Outcome], oracles: list[Outcome]) -> Row:
    tails = [run.trace[SECONDS // 3 :] for run in runs]
    recoveries = [seconds for run in runs if (seconds := recovery(run)) is not None]
    knee = KNEES.get(server)
    return Row(
        server,
        limiter,
        statistics.median(run.throughput / best.throughput for run, best in zip(runs, oracles, strict=True)),
        statistics.median(run.refused_share for run in runs),
        int(statistics.median(recoveries)) if server == STEPS and len(recoveries) == len(runs) else None,
        statistics.median(statistics.mean(tail) for tail in tails),
        None
        if knee is None
        else statistics.median(sum(abs(limit - knee) <= knee / 4 for limit in tail) / len(tail) for tail in tails),
    )


def recovery(run: Outcome) -> int | None:
    return next((second + 1 - UP for second in range(UP, SECONDS) if run.trace[second] >= 180), None)


def table(rows: list[Row]) -> None:
    print(f"{'server':20}{'limiter':20}{'of oracle':>10}{'refused':>9}{'recovery':>10}{'settled':>9}{'within 25%':>12}")
    for one in rows:
        recovered = "" if one.server != STEPS else "never" if one.recovery is None else f"{one.recovery} s"
        within = "" if one.within is None else f"{one.within:.0%}"
        print(
            f"{one.server:20}{one.limiter:20}{one.share_of_oracle:10.1%}{one.refused_share:9.2%}{recovered:>10}"
            f"{one.settled:9.1f}{within:>12}"
        )


def plot(path: str, setting: Setting) -> None:
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]  # only who wants the plot needs it

    pyplot.switch_backend("Agg")
    names = list(servers(setting))
    figure, axes = pyplot.subplots(3, 3, figsize=(15, 10), constrained_layout=True)
    styles: dict[str, dict[str, Any]] = {
        "oracle": {"color": "black", "linestyle": "--", "linewidth": 1.2},
        "auto": {"color": "tab:blue", "linewidth": 1.6},
        "inspect_ai 10-100": {"color": "tab:orange", "linewidth": 1.0},
        "inspect_ai 1-1000": {"color": "tab:red", "linewidth": 1.0},
    }
    for name, axis in zip(names, axes.flat, strict=True):
        for limiter, style in styles.items():
            axis.plot(outcome(name, limiter, setting, 0).trace, label=limiter, **style)
        axis.set_title(f"server: {name}")
        axis.set_yscale("log")
        axis.set_xlabel("seconds")
        axis.set_ylabel("limit")
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--retry-after", type=float)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--only", default="", help="servers whose name has this in it")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args()
    setting = Setting(options.retry_after, options.noise)
    seeds = range(1 if options.quick else 5)
    names = [name for name in servers(setting) if options.only in name]
    jobs = [(server, limiter, setting, seed) for server in names for limiter in LIMITERS for seed in seeds]
    with ProcessPoolExecutor() as pool:
        runs = dict(zip(jobs, pool.map(measured, jobs), strict=True))

    def of(server: str, limiter: str) -> list[Outcome]:
        return [runs[server, limiter, setting, seed] for seed in seeds]

    rows = [
        row(server, limiter, of(server, limiter), of(server, "oracle"))
        for server in names
        for limiter in LIMITERS
        if limiter != "oracle"
    ]
    table(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(one) for one in rows], indent=1))
    if options.plot:
        plot(options.plot, setting)


if __name__ == "__main__":
    main()
