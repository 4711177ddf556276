"""What a video of the wan engine depends on besides its request: weights, code, libraries, device.

Weights and code are named by a digest each: other ones make another video.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from kinema.engines.hardware import cpu_name
from kinema.engines.wan.checkpoint import Checkpoint, is_component
from kinema.engines.wan.ranks.plan import Plan
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.manifest import EngineFacts

_TEXTS = (".json", ".model", ".txt")
# Of every tensor: a model that was tuned or merged differs there, and reading on would take as long as loading it.
_TENSOR_START_BYTES = 1024


def facts_of(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    attention: AttentionChoice,
    linears: Linears,
    plan: Plan | None,
    *,
    has_step_cache: bool,
) -> EngineFacts:
    """Reads a part of the weights, for their digest. Raises OSError."""
    is_cuda = device.type == "cuda"
    versions = {
        "wan engine": code_digest(),
        "torch": str(torch.__version__),
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
    }
    if is_cuda:
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        versions["triton"] = version("triton")
    if attention.has_fa3:
        versions["fa3-fwd"] = version("fa3-fwd")
    return EngineFacts(
        engine="wan",
        weights=weights_digest(checkpoint),
        dtype=_name(dtype),
        decode_dtype=_name(vae_dtype),
        device=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        threads=None if is_cuda else torch.get_num_threads(),
        gpus=None if plan is None else plan.num_ranks,
        parallel=None if plan is None else plan.parallel,
        attention=attention.name,
        linears=None if linears == "dtype" else linears,
        step_cache=has_step_cache or None,
        versions=versions,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
