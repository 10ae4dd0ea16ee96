"""Which releases of litellm the extra allows."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirement() -> Requirement:
    [found] = [parsed for parsed in map(Requirement, EXTRAS["litellm"]) if parsed.name == "litellm"]
    return found


@pytest.mark.parametrize("stolen", ["1.82.7", "1.82.8"])
def test_the_stolen_releases_are_excluded(stolen: str) -> None:
    """An attacker published them, and they steal credentials; no resolver may ever choose them."""
    assert not requirement().specifier.contains(stolen, prereleases=True)


def test_the_releases_these_tests_run_with_are_allowed() -> None:
    """The one that resolves beside openai 3, the newest that resolves alone, and the one that is installed."""
    assert {"1.83.0", "1.106.2", version("litellm")} <= set(
        requirement().specifier.filter(["1.83.0", "1.106.2", version("litellm")])
    )


def test_no_other_extra_brings_it() -> None:
    """Its newest releases cannot be installed beside huggingface_hub 2, so that it is only for those who ask."""
    others = [line for name, lines in EXTRAS.items() if name != "litellm" for line in lines]
    assert not [line for line in others if Requirement(line).name == "litellm" or "litellm" in Requirement(line).extras]
