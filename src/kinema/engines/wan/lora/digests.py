"""The digests of LoRA files, kept in a file, so that a restart does not read them all again.

The digest of a LoRA is the SHA-256 of its file's bytes; of two files it is that of both digests. It is read once for
each stamp of a file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from kinema.engines.wan.lora.folder import LoraFile, Stamp, stamp_of
from kinema.errors import InvalidRequest
from kinema.files import replacing

log = logging.getLogger(__name__)

# Of the kept file: ten thousand entries have less.
_MAX_BYTES = 8 * 2**20
_REMEMBERED_FILES = 1000


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stamp: Stamp
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


_ENTRIES = TypeAdapter(dict[str, _Entry])


class Digests:
    """The digests that are known, by the paths of files. ``path`` is where they are kept; None keeps them nowhere.

    All methods may be called on any thread.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries = _read(path)

    def known(self, lora: LoraFile) -> str | None:
        """The digest of the LoRA; None when it was not read since its files have changed."""
        entries = [self._entries.get(str(path)) for path, _stamp in lora.files]
        found = [
            entry.sha256
            for entry, (_path, stamp) in zip(entries, lora.files, strict=True)
            if entry is not None and entry.stamp == stamp
        ]
        return combined(found) if len(found) == len(entries) else None

    def read(self, lora: LoraFile) -> str:
        """The digest of the LoRA, for which its files are read unless it is known. Raises InvalidRequest when one
        cannot be read, or has changed."""
        if (known := self.known(lora)) is not None:
            return known
        read = {str(path): _Entry(stamp=stamp, sha256=_sha256_of(path, stamp)) for path, stamp in lora.files}
        with self._lock:
            self._entries = self._entries | read
            self._keep()
        return combined([entry.sha256 for entry in read.values()])

    def _keep(self) -> None:
        """Write the file, with what another process has written there meanwhile. A failure is only logged."""
        if self._path is None:
            return
        entries = _read(self._path) | self._entries
        there = {path: entry for path, entry in entries.items() if Path(path).exists()}
        try:
            with replacing(self._path) as unfinished:
                unfinished.write_bytes(_ENTRIES.dump_json(there))
        except OSError as exc:
            log.warning("the digests of LoRAs are not kept: %s", exc)


def combined(digests: Sequence[str]) -> str:
    """The digest of a LoRA, from those of its one or two files."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _read(path: Path | None) -> dict[str, _Entry]:
    """What was kept; nothing when the file is not there, or is damaged."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            return _ENTRIES.validate_json(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as exc:
        log.info("the digests of LoRAs are computed again: %s cannot be used (%s)", path, type(exc).__name__)
        return {}


@lru_cache(maxsize=_REMEMBERED_FILES)
def _sha256_of(path: Path, stamp: Stamp) -> str:
    """Remembered in the process, where several libraries may look at one folder. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            is_same = stamp_of(os.fstat(file.fileno())) == stamp
    except OSError as exc:
        raise InvalidRequest(f"the LoRA {path.name} cannot be read: {exc.strerror}") from exc
    if not is_same:
        raise InvalidRequest(f"the LoRA {path.name} was changed while it was read; try again when it is whole")
    return digest
