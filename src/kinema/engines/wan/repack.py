"""Copies of published weights in the smaller type that they are computed in: half the bytes to read at each start.

The published Wan checkpoints are float32, and bfloat16 is what a GPU is given. A copy has the numbers that converting
gives, in one file per component. Its name has a digest of its source (sizes, times of change, headers and the start of
each tensor), it carries sums of its tensors, and it is put into place whole: what does not fit is never used, but made
again.
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

from kinema.engines.wan.checkpoint import Checkpoint, weight_files
from kinema.engines.wan.fingerprint import sample_weights
from kinema.engines.wan.tensors import DamagedFile, Stored, list_tensors, size_of, sums_of, write_tensors

log = logging.getLogger(__name__)

# What saves less is read as it is.
_LEAST_SAVING_BYTES = 64 * 2**20
# Of the disk, that much must be left free after a copy.
_LEFT_FREE_BYTES = 2 * 2**30
# What a process that was killed had begun.
_ABANDONED_S = 3600.0


@dataclass(frozen=True)
class Copy:
    """Of one component, for modules of these types; whether it is there is for ``tensors`` to say."""

    path: Path
    prefix: str

    def tensors(self) -> dict[str, Stored] | None:
        """None when there is none, or a damaged one, which is said and removed."""
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
        """Whether what was read of it is what was written; if not, it is removed."""
        try:
            sums = json.loads(list_tensors(self.path)[1]["sums"])
        except (OSError, DamagedFile, KeyError, ValueError):
            sums = None
        if sums == sums_of(targets):
            return True
        self.discard("its sums differ")
        return False

    def discard(self, reason: str) -> None:
        """It will be made again."""
        log.warning("the copy %s is not used and removed: %s", self.path, reason)
        with suppress(OSError):  # what stays is found to be damaged again
            self.path.unlink(missing_ok=True)

    def keep(self, targets: Mapping[str, Tensor]) -> None:
        """Write what the tensors have now; older copies of the same source go. What fails is said, no more."""
        started, partial = time.perf_counter(), self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_older()
            free = shutil.disk_usage(self.path.parent).free
            if free < size_of(targets) + _LEFT_FREE_BYTES:
                log.warning("no room for a copy of the weights of %.1f GB in %s", _gb(targets), self.path.parent)
                return
            write_tensors(partial, targets, {"sums": json.dumps(sums_of(targets))})
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


def copy_of(
    checkpoint: Checkpoint, component: str, targets: Mapping[str, Tensor], sources: Mapping[str, Stored]
) -> Copy | None:
    """Where the copy of the component's weights is or would be, in the types of ``targets``; None where nobody wants
    one, or it would save too little.
    """
    saving = sum(source.size for source in sources.values()) - size_of(targets)
    if checkpoint.cache is None or saving < _LEAST_SAVING_BYTES:
        return None
    folder = (checkpoint.path / component).resolve()
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", checkpoint.name)
    prefix = f"{name}.{component}.{place}."
    return Copy(checkpoint.cache / f"{prefix}{_digest(checkpoint, component, targets)}.safetensors", prefix)


def _digest(checkpoint: Checkpoint, component: str, targets: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for path in weight_files(checkpoint.path, component):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for part in sample_weights(path):
            digest.update(part)
    for name, tensor in targets.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()[:16]


def _gb(targets: Mapping[str, Tensor]) -> float:
    return size_of(targets) / 1e9
