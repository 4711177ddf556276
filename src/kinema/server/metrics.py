"""``GET /metrics``: the numbers of ``/health`` in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kinema.cluster.base import WorkerInfo
from kinema.service.sweeper import Sweeping, SweepState

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True, eq=False)
class Numbers(Collector):
    """What was known when somebody asked."""

    is_ready: bool
    num_waiting: int
    swept: SweepState
    workers: Sequence[WorkerInfo]

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
        yield from self._memory()

    def _memory(self) -> Iterable[Metric]:
        """Sums over the workers of a model, whose own names come and go."""
        limits, residents = Counter[str](), Counter[tuple[str, str]]()
        parked, resumed = Counter[str](), Counter[str]()
        for worker in self.workers:
            model = worker.capabilities.model
            parked[model] += worker.num_parked
            resumed[model] += worker.num_resumed
            if worker.memory is not None:
                limits[model] += worker.memory.limit_bytes
                residents.update({(model, name): size for name, size in worker.memory.residents.items()})
        yield _by_labels("kinema_memory_limit_bytes", "What tensors may take of the devices.", limits)
        yield _by_labels("kinema_resident_bytes", "What lies on the devices for all videos.", residents)
        yield _by_labels("kinema_videos_parked", "How often a video left a device's memory for others.", parked)
        yield _by_labels("kinema_videos_resumed", "How often one came back.", resumed)


def _by_labels(name: str, says: str, sums: Mapping[str, int] | Mapping[tuple[str, str], int]) -> Metric:
    """A gauge, since a worker that leaves takes its numbers with it."""
    labels = ["model", "resident"] if name == "kinema_resident_bytes" else ["model"]
    family = GaugeMetricFamily(name, says, labels=labels)
    for key, value in sums.items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family
