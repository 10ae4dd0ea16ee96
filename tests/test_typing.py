"""Types are part of the public API: mypy must accept tests/typing/right.py, and refuse each marked line of wrong/."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = "tests/typing/right.py"
WRONG = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/typing/wrong").glob("*.py"))

REPORT = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")
MARK = re.compile(r"# error: \[(?P<codes>[a-z, -]+)\]$")


@pytest.fixture(scope="module")
def reports() -> dict[str, Counter[tuple[int, str]]]:
    """Per file, which errors mypy reports in which lines; one run for all files."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "--no-color-output"]
    ended = subprocess.run(
        [*command, RIGHT, *WRONG], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    found: dict[str, Counter[tuple[int, str]]] = {file: Counter() for file in (RIGHT, *WRONG)}
    for line in ended.stdout.splitlines():
        report = REPORT.match(line)
        if report is not None:
            found.setdefault(report["file"], Counter())[int(report["line"]), report["code"]] += 1
        else:
            assert ": note: " in line, line
    assert ended.stderr == ""
    return found


@pytest.mark.timeout(300)
def test_right_uses_are_accepted(reports: dict[str, Counter[tuple[int, str]]]) -> None:
    """mypy finds nothing to say about the right uses, nor about our own modules that they import."""
    wrong = {file: errors for file, errors in reports.items() if file not in WRONG and errors}
    assert wrong == {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", WRONG)
def test_wrong_uses_are_refused(reports: dict[str, Counter[tuple[int, str]]], file: str) -> None:
    """mypy refuses exactly the marked lines, each for the reason that is written there."""
    expected: set[tuple[int, str]] = set()
    for number, line in enumerate((ROOT / file).read_text("utf-8").splitlines(), 1):
        mark = MARK.search(line)
        if mark is not None:
            expected |= {(number, code.strip()) for code in mark["codes"].split(",")}
    assert expected
    assert set(reports[file]) == expected


def test_the_package_says_that_it_is_typed() -> None:
    """py.typed lies beside the modules, so that checkers believe our annotations."""
    assert (ROOT / "asyncmodels/py.typed").exists()
