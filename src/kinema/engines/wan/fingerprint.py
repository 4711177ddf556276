"""What a video of the wan engine depends on besides its request: weights, code, libraries, device.

Weights and code are named by a digest each: other ones make another video. torch is imported only where it is asked, so
that the sglang engine names weights without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.engines.hardware import cpu_name
from kinema.engines.wan.checkpoint import Checkpoint, is_component
from kinema.engines.wan.ranks.plan import ParallelPlan
from kinema.engines.wan.safetensors_header import read_header
from kinema.manifest import EngineFacts

if TYPE_CHECKING:
    import torch

    from kinema.engines.wan.transformer.attention import AttentionChoice
    from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype

_PACKAGE = Path(__file__).parent
_TEXTS = (".json", ".model", ".txt")
# So much of every tensor is read: a model that was tuned or merged differs there, and reading all would take as long as
# loading it.
_TENSOR_START_BYTES = 1024


def facts_of(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    attention: AttentionChoice,
    linears: Linears,
    weights_dtype: WeightsDtype,
    plan: ParallelPlan | None,
    *,
    has_step_cache: bool,
) -> EngineFacts:
    """What must be equal for one engine to use a checkpoint of another, and what a manifest names.

    Reads a part of the weights, for their digest. Raises OSError.
    """
    import torch  # noqa: PLC0415 - see above

    is_cuda = device.type == "cuda"
    versions = {
        "wan engine": code_digest(),
        "torch": str(torch.__version__),
        # Of those that decide which tokens a prompt has.
        "tokenizers": version("tokenizers"),
        "ftfy": version("ftfy"),
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
        parallel=None if plan is None else plan.numbers,
        attention=attention.name,
        linears=None if linears == "dtype" else linears,
        weights_dtype=None if weights_dtype == "dtype" else weights_dtype,
        step_cache=has_step_cache or None,
        versions=versions,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_digest(checkpoint: Checkpoint) -> str:
    """A digest of the files that the components are read from; copies of a folder have the same.

    Small files count whole, files of weights by their header and the start of each tensor. Raises OSError or
    DamagedFile.
    """
    digest = hashlib.sha256()
    for path in _files(checkpoint):
        digest.update(f"{path.relative_to(checkpoint.path).as_posix()} {path.stat().st_size}\n".encode())
        for part in _chunks(path) if path.suffix in _TEXTS else sample_weights(path):
            digest.update(part)
    return digest.hexdigest()[:16]


def code_digest(package: Path = _PACKAGE) -> str:
    """A digest of a package's source, by default of this one.

    Any change of it may change the numbers, so no file is left out and none can be forgotten.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:16]


def _files(checkpoint: Checkpoint) -> list[Path]:
    components = [name for name in checkpoint.index if is_component(checkpoint.index, name)]
    found = [path for name in components for path in (checkpoint.path / name).glob("*")]
    return sorted(path for path in found if path.suffix in (".safetensors", *_TEXTS))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


def sample_weights(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then the first bytes of each tensor. Raises OSError or DamagedFile."""
    header = read_header(path)
    yield header.raw
    with path.open("rb") as file:
        for entry in header.entries.values():
            file.seek(entry.start)
            yield file.read(min(entry.size, _TENSOR_START_BYTES))
