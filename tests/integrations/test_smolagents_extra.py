"""Where smolagents is not installed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["smolagents"] = None  # as if it were not installed
import asyncmodels
try:
    import asyncmodels.integrations.smolagents
except asyncmodels.MissingExtraError as error:
    print(error)
"""


def test_a_missing_package_says_what_to_install() -> None:
    """Importing the integration without smolagents names the command that mends it."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "SmolagentsModel needs the package 'smolagents': pip install \"asyncmodels[smolagents]\"\n"
