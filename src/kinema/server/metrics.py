"""``GET /metrics``: the numbers of ``/health`` in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kinema.service.sweeper import Sweeping, SweepState

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class Numbers(Collector):
    """What was known when somebody asked."""

    is_ready: bool
    num_waiting: int
    swept: SweepState

    def text(self) -> bytes:
        """The numbers, a line each."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterable[Metric]:
        """Yield each number with its name."""
        yield GaugeMetricFamily("kinema_ready", "Whether a worker takes jobs.", value=self.is_ready)
        yield GaugeMetricFamily("kinema_jobs_waiting", "Videos that wait for a worker.", value=self.num_waiting)
        state = GaugeMetricFamily(
            "kinema_storage_sweep_state", "1 for what the sweep of the storage does now.", labels=["state"]
        )
        for one in Sweeping:
            state.add_metric([one.value], float(self.swept.sweeping is one))
        yield state
        yield GaugeMetricFamily(
            "kinema_storage_held_files",
            "Files that belong to no video of the database and are kept.",
            value=self.swept.num_files,
        )
        yield GaugeMetricFamily("kinema_storage_held_bytes", "The size of these files.", value=self.swept.size_bytes)
