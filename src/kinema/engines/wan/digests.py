"""The weights and the code of the wan engine, each as a digest: other ones make another video."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from kinema.engines.wan.checkpoint import Checkpoint, is_component

_TEXTS = (".json", ".model", ".txt")
# Of every tensor: a model that was tuned or merged differs there, and reading on would take as long as loading it.
_TENSOR_START_BYTES = 1024


def weights_digest(checkpoint: Checkpoint) -> str:
    """Of the files that the components are read from: small ones whole, of weights the header and each tensor's start.

    Copies of a folder have the same one.
    """
    digest = hashlib.sha256()
    for path in _files(checkpoint):
        digest.update(f"{path.relative_to(checkpoint.path).as_posix()} {path.stat().st_size}\n".encode())
        for part in [path.read_bytes()] if path.suffix in _TEXTS else sample_weights(path):
            digest.update(part)
    return digest.hexdigest()[:16]


def code_digest() -> str:
    """Of this package's source: any change of it may change the numbers, and none can be forgotten so."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:16]


def _files(checkpoint: Checkpoint) -> list[Path]:
    components = [name for name in checkpoint.index if is_component(checkpoint.index, name)]
    found = [path for name in components for path in (checkpoint.path / name).glob("*")]
    return sorted(path for path in found if path.suffix in (".safetensors", *_TEXTS))


def sample_weights(path: Path) -> Iterator[bytes]:
    """Of a safetensors file: the header, and of each tensor the first bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
        yield header
        data_start = file.tell()
        for entry in json.loads(header).values():
            if "data_offsets" not in entry:  # the file's own metadata
                continue
            start, end = entry["data_offsets"]
            file.seek(data_start + start)
            yield file.read(min(end - start, _TENSOR_START_BYTES))
