"""Copies of published weights in the smaller type that a device computes in: half the bytes to read at each start.

The published Wan checkpoints are float32, and a GPU computes in bfloat16. A copy is one file for a component, with the
numbers that converting its weights gives. The file's name has a digest of the source (sizes, times of change, headers
and the start of each tensor), its header has checksums of its tensors, and it is put into place whole. A copy that does
not fit is never used; it is removed and written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.fingerprint import sample_weights
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.engines.wan.tensors import StoredTensor, checksums_of, list_tensors, size_of, write_tensors

log = logging.getLogger(__name__)

# A copy that saves fewer bytes is not worth its place on the disk.
_LEAST_SAVING_BYTES = 64 * 2**20
# A copy must leave that much of the disk free.
_LEFT_FREE_BYTES = 2 * 2**30
# An unfinished copy of that age belongs to a process that was killed.
_ABANDONED_S = 3600.0


@dataclass(frozen=True)
class CachedWeights:
    """The copy of one component's weights at ``path``, whether it exists or not.

    Copies of the same component from an older source begin with ``prefix`` too.
    """

    path: Path
    prefix: str

    def tensors(self) -> dict[str, StoredTensor] | None:
        """The copy's tensors; None when there is no copy, or a damaged one, which is logged and removed."""
        try:
            return list_tensors(self.path)[0]
        except FileNotFoundError:
            return None
        except OSError as exc:
            log.warning("the copy %s cannot be read: %s", self.path, exc)
            return None
        except DamagedFile as exc:
            self.discard(str(exc))
            return None

    def fits(self, targets: Mapping[str, Tensor]) -> bool:
        """Whether the tensors that were read from the copy are those that were written; if not, it is removed."""
        try:
            sums = json.loads(list_tensors(self.path)[1]["sums"])
        except (OSError, DamagedFile, KeyError, TypeError, ValueError, RecursionError):
            sums = None
        if sums == checksums_of(targets):
            return True
        self.discard("its checksums differ")
        return False

    def discard(self, reason: str) -> None:
        """Remove the copy and log why; the next start writes it again."""
        log.warning("the copy %s is not used and removed: %s", self.path, reason)
        with suppress(OSError):  # a copy that cannot be removed is found to be damaged again
            self.path.unlink(missing_ok=True)

    def write(self, targets: Mapping[str, Tensor]) -> None:
        """Write these tensors as the copy, and remove older copies of the same component. A failure is only logged."""
        started, partial = time.perf_counter(), self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_older()
            free = shutil.disk_usage(self.path.parent).free
            if free < size_of(targets) + _LEFT_FREE_BYTES:
                log.warning("no room for a copy of the weights of %.1f GB in %s", _gb(targets), self.path.parent)
                return
            write_tensors(partial, targets, {"sums": json.dumps(checksums_of(targets))})
            partial.replace(self.path)
        except OSError as exc:
            log.warning("no copy of the weights was kept: %s", exc)
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return
        seconds = time.perf_counter() - started
        log.info("a copy of %.1f GB for later starts was kept in %.1f s: %s", _gb(targets), seconds, self.path)

    def _remove_older(self) -> None:
        for path in self.path.parent.glob(f"{self.prefix}*"):
            is_begun = path.suffix == ".partial"
            if path != self.path and (not is_begun or time.time() - path.stat().st_mtime > _ABANDONED_S):
                path.unlink(missing_ok=True)


def cached_weights_of(
    checkpoint: Checkpoint, component: str, targets: Mapping[str, Tensor], sources: Mapping[str, StoredTensor]
) -> CachedWeights | None:
    """The copy of a component's weights in the types of ``targets``; ``sources`` are the published tensors.

    None when copies are switched off, or when this one would save too little.
    """
    saving = sum(source.size for source in sources.values()) - size_of(targets)
    if checkpoint.cache is None or saving < _LEAST_SAVING_BYTES:
        return None
    read_from = checkpoint.files.get(component, checkpoint.root_of(component) / component).resolve()
    place = hashlib.sha256(str(read_from).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", checkpoint.name)
    prefix = f"{name}.{component}.{place}."
    return CachedWeights(checkpoint.cache / f"{prefix}{_digest(checkpoint, component, targets)}.safetensors", prefix)


def _digest(checkpoint: Checkpoint, component: str, targets: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for path in checkpoint.weight_files(component):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for part in sample_weights(path):
            digest.update(part)
    for name, tensor in targets.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()[:16]


def _gb(targets: Mapping[str, Tensor]) -> float:
    return size_of(targets) / 1e9
