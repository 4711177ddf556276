"""The queue as clients see it, looked at twice a second at most however many ask."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from kinema.cluster.base import Cluster
from kinema.job import JobId
from kinema.jobs.outlook import Outlook, outlooks, remaining
from kinema.jobs.store import ActiveJob, JobStore, QueueLimits
from kinema.settings import JobSettings

_FRESH_S = 0.5
# The SDKs do not try again after a longer wait.
_MAX_RETRY_AFTER_S = 120
_DEFAULT_RETRY_AFTER_S = 5


class QueueView:
    """Reads the store, and knows of the cluster only how many workers each model has."""

    def __init__(self, store: JobStore, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._active: Sequence[ActiveJob] = ()
        self._rates: dict[str, float | None] = {}
        self._outlooks: dict[JobId, Outlook] = {}
        self._next_slot_s: dict[str, int] = {}

    async def outlooks(self) -> Mapping[JobId, Outlook]:
        """Of every job that has not ended. Raises StoreUnavailable."""
        async with self._lock:
            if time.monotonic() - self._read_at > _FRESH_S:
                await self._read()
        return self._outlooks

    async def limits(self, model: str, settings: JobSettings) -> QueueLimits:
        """The settings' limits, seconds turned into work; those in seconds hold once a video of the model was timed."""
        await self.outlooks()
        rate = None
        if (settings.max_queued_s, settings.max_queued_s_per_key) != (None, None):
            rate = self._rates[model] if model in self._rates else await self._store.seconds_per_work(model)
        return QueueLimits(
            max_queued=settings.max_queued,
            max_queued_per_key=settings.max_queued_per_key,
            max_work=_work(settings.max_queued_s, rate),
            max_work_per_key=_work(settings.max_queued_s_per_key, rate),
            retry_after_s=self._next_slot_s.get(model, _DEFAULT_RETRY_AFTER_S),
        )

    async def _read(self) -> None:
        self._active = await self._store.active()
        models = {job.model for job in self._active}
        self._rates = {model: await self._store.seconds_per_work(model) for model in models}
        workers = Counter(worker.capabilities.model for worker in self._cluster.workers())
        self._outlooks = outlooks(self._active, self._rates, workers)
        self._next_slot_s = _next_slots_s(self._active, self._rates)
        self._read_at = time.monotonic()


def _next_slots_s(active: Sequence[ActiveJob], rates: Mapping[str, float | None]) -> dict[str, int]:
    """By model, the seconds to the end of the running job that is nearest to it: that lets one in from the queue."""
    found: dict[str, int] = {}
    for job in active:
        rate = rates.get(job.model)
        if not job.is_waiting and rate is not None:
            seconds = min(max(round(remaining(job) * rate), 1), _MAX_RETRY_AFTER_S)
            found[job.model] = min(found.get(job.model, seconds), seconds)
    return found


def _work(seconds: float | None, rate: float | None) -> float | None:
    return None if seconds is None or not rate else seconds / rate
