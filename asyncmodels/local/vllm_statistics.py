"""What vLLM's scheduler says about itself, kept for ``statistics()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger

__all__ = ["VLLMStatistics"]


class VLLMStatistics(PrometheusStatLogger):  # type: ignore[misc]  # vllm is not looked into
    """Keeps the latest figures of each engine core, and adds up what is counted.

    It stands in the place of vLLM's logger for Prometheus, which vLLM adds where it finds none of that class and which
    writes to the registry that all of the process shares.
    """

    def __init__(self, vllm_config: Any = None, engine_indexes: Any = None) -> None:
        self._latest: dict[int, Any] = {}
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self._latest[engine_idx] = scheduler_stats
            self._prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        pass

    def record_admission_rejection(self, reason: str) -> None:
        pass

    def figures(self) -> Mapping[str, float]:
        """The figures over all engine cores; may be called on any thread."""
        latest = list(self._latest.values())
        return {
            "num_running": sum(stats.num_running_reqs for stats in latest),
            "num_waiting": sum(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs for stats in latest),
            "kv_cache_usage": sum(stats.kv_cache_usage for stats in latest) / max(len(latest), 1),
            "prefix_cache_hit_rate": self._prefix_hits / max(self._prefix_queries, 1),
            "preemptions": self._preemptions,
        }
