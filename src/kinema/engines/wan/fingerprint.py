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
from kinema.engines.wan.configs import solver_name
from kinema.engines.wan.ranks.plan import ParallelPlan
from kinema.engines.wan.weight_files import GGUF, header_of
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
    if checkpoint.image_encoder is not None:
        versions["pillow"] = version("pillow")  # makes the picture that the encoder sees
    if is_cuda:
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        versions["triton"] = version("triton")
    if any(path.suffix.lower() == GGUF for path in checkpoint.files.values()):
        versions["gguf"] = version("gguf")
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
        solver=solver_name(checkpoint.solver),
        versions=versions,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_digest(checkpoint: Checkpoint) -> str:
    """A digest of the files that the components are read from; copies of a folder have the same.

    Small files count whole, files of weights by their header and the start of each tensor. Raises OSError, DamagedFile
    or ConfigError.
    """
    digest = hashlib.sha256()
    for name, path in _files(checkpoint):
        digest.update(f"{name} {path.stat().st_size}\n".encode())
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


def _files(checkpoint: Checkpoint) -> list[tuple[str, Path]]:
    """The files that are read, by names that do not depend on where they lie: the place in the model's folder, also for
    those of its base, or the component whose folder a file replaces."""
    components = [name for name in checkpoint.index if is_component(checkpoint.index, name)]
    folders = [checkpoint.root_of(name) / name for name in components]
    texts = [path for folder in folders for path in folder.glob("*") if path.suffix in _TEXTS]
    weights = [path for name in checkpoint.components_with_weights for path in _weight_files(checkpoint, name)]
    replaced = {path: f"{name}{path.suffix}" for name, path in checkpoint.files.items()}

    def name_of(path: Path) -> str:
        return replaced.get(path) or f"{path.parent.name}/{path.name}"

    return sorted((name_of(path), path) for path in [*texts, *weights])


def _weight_files(checkpoint: Checkpoint, name: str) -> list[Path]:
    """Those of a component; none where a benchmark draws its weights."""
    folder = checkpoint.root_of(name) / name
    is_drawn = name not in checkpoint.files and not any(folder.glob("*.safetensors"))
    return [] if is_drawn else checkpoint.weight_files(name)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


def sample_weights(path: Path) -> Iterator[bytes]:
    """The header of a file of weights, then the first bytes of each tensor. Raises OSError or DamagedFile."""
    header = header_of(path)
    yield header.raw
    with path.open("rb") as file:
        for entry in header.entries.values():
            file.seek(entry.start)
            yield file.read(min(entry.size, _TENSOR_START_BYTES))
