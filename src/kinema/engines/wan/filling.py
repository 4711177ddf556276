"""From files to a checkpoint's modules: all of them at once, in the background; copies of a smaller type come first."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.modules import Blank, match, stored_tensors
from kinema.engines.wan.repack import Copy, copy_of
from kinema.engines.wan.tensors import DamagedFile, Reader, Reading, Stored

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """``published`` are the checkpoint's own tensors, ``used`` what is read: those, or the copy's."""

    blank: Blank
    published: dict[str, Stored]
    copy: Copy | None
    used: dict[str, Stored]

    @property
    def is_from_copy(self) -> bool:
        return self.used is not self.published


@contextmanager
def filling(checkpoint: Checkpoint, blanks: Sequence[Blank], device: torch.device) -> Iterator[None]:
    """The modules get their weights while the block runs, and have them after it. Raises DamagedFile or OSError."""
    started = time.perf_counter()
    with Reader(device) as reader:
        jobs = [_job(checkpoint, blank) for blank in blanks]
        readings = [reader.begin(job.used, job.blank.targets) for job in jobs]
        yield
        jobs = [_finish(job, reading, reader) for job, reading in zip(jobs, readings, strict=True)]
    size = sum(source.size for job in jobs for source in job.used.values())
    log.info("weights: %.2f GB read in %.1f s", size / 1e9, time.perf_counter() - started)
    for job in jobs:
        if job.copy is not None and not job.is_from_copy:
            job.copy.keep(job.blank)


def _job(checkpoint: Checkpoint, blank: Blank) -> _Job:
    published = match(blank, stored_tensors(checkpoint.path, blank.component))
    copy = copy_of(checkpoint, blank, published)
    copied = None if copy is None else copy.tensors()
    if copy is not None and copied is not None:
        try:
            return _Job(blank, published, copy, match(blank, copied))
        except DamagedFile as exc:
            copy.discard(str(exc))
    return _Job(blank, published, copy, published)


def _finish(job: _Job, reading: Reading, reader: Reader) -> _Job:
    """What comes from a copy and is not what was written there is read again, from the checkpoint itself."""
    if job.copy is None or not job.is_from_copy:
        reading.wait()
        return job
    try:
        reading.wait()
        if job.copy.fits(job.blank):
            return job
    except (OSError, DamagedFile) as exc:
        job.copy.discard(str(exc))
    reader.begin(job.published, job.blank.targets).wait()
    return replace(job, used=job.published)
