"""What stands over every test that needs vLLM."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

__all__ = ["VLLM"]

VLLM = (
    pytest.mark.model,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM wants an environment of its own."),
    pytest.mark.timeout(600),  # processes start, and import torch one after the other
    pytest.mark.filterwarnings("default"),  # of vLLM's own code and what it imports
)
