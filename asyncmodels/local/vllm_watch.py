"""Ends vLLM's processes when the process that started them is gone without a word, killed for example.

vLLM calls ``watch`` in each of its processes, because it stands among the entry points ``vllm.general_plugins``. Nobody
else tells an idle engine that its parent is gone: it would keep its memory for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

__all__ = ["STARTER", "watch"]

STARTER = "ASYNCMODELS_VLLM_STARTED_BY"
"""Holds the id of the process that starts vLLM's: they inherit it, and so know whose they are."""

_INTERVAL = 1.0
"""Seconds between two looks."""


def watch() -> None:
    """Begins to watch the parent, where that is the process that uses the engine."""
    starter = os.environ.get(STARTER)
    # Whatever else that process has started, a server of its own for example, is none of our business.
    if multiprocessing.parent_process() is not None and starter == str(os.getppid()):
        threading.Thread(target=_end_without, args=(os.getppid(),), name="asyncmodels-watch", daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)  # upon which vLLM ends in good order, its workers included
