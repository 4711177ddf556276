"""Bring a checkpoint's components to a device: the same lines for the tiny model and for the real ones.

Built on torch's meta device, diffusers' and transformers' modules cost no memory and no random numbers; then each
weight gets its place, in the type that the libraries would load it in, and threads read the files' tensors to these
places, all components' at once (``tensors.py``). A copy of a smaller type comes first, where there is one
(``repack.py``).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from kinema.engines.wan.checkpoint import Checkpoint, weight_files
from kinema.engines.wan.repack import Copy, copy_of
from kinema.engines.wan.tensors import DamagedFile, Reader, Reading, Stored, list_tensors
from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# With fewer, one that is kept free costs more than it saves: of two, 1.6 times the time.
_FEW_CORES = 4


@dataclass
class Components:
    """A loaded checkpoint. ``transformer_2`` is the low-noise expert of Wan 2.2 A14B, else None."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: Any
    transformer: Any
    transformer_2: Any | None
    vae: Any
    device: torch.device


# From a checkpoint to its components in a type on a device. ``load`` is one; measurements have others.
LoadComponents = Callable[[Checkpoint, torch.device, torch.dtype], Components]
# The same of the transformers alone, one or the two experts, for the other ranks: a function of a module, which each of
# them imports.
LoadTransformers = Callable[[Checkpoint, torch.device, torch.dtype], list[Any]]


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda when there is one. Raises ConfigError for a device that torch does not know or have."""
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        log.info("device auto: chose %s", chosen)
        return torch.device(chosen)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise ConfigError(f"engine.device = {name!r} cannot be used ({reason}); give auto, cpu or cuda:0") from exc
    return device


def leave_cores(device: torch.device) -> None:
    """Of four CPU cores or more, keep one in four for what a service does beside: requests, H.264, files.

    A product is done when the last of its threads is, and with a thread on every core some always wait: on 16 cores a
    video took 1.3 times as long as with 12 threads, and twice as long beside another one. A number of threads that
    somebody chose, in OMP_NUM_THREADS or MKL_NUM_THREADS, stays, as does a smaller one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if device.type == "cpu" and cores >= _FEW_CORES and not is_chosen:
        torch.set_num_threads(min(torch.get_num_threads(), cores - cores // 4))
        log.info("threads: chose %d for %d cores", torch.get_num_threads(), cores)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on cuda, the type that Wan was trained in, and float32 on the CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
        log.info("dtype auto: chose %s on %s", name, device.type)
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Components:
    """Read the weights (safetensors only). The VAE stays float32, as published; what it decodes in
    is chosen later.

    Raises ConfigError when a file is damaged or does not fit its config.
    """
    root = checkpoint.path
    with _loading(checkpoint, device):
        text_encoder, vae = blank_text_encoder(root, device, dtype), blank_vae(root, device)
        transformers = _blank_transformers(checkpoint, device, dtype)
        with filling(checkpoint, [*transformers, text_encoder, vae], device):
            tokenizer = AutoTokenizer.from_pretrained(str(root), subfolder="tokenizer")
        return Components(
            tokenizer=tokenizer,
            text_encoder=text_encoder.module,
            transformer=transformers[0].module,
            transformer_2=transformers[1].module if len(transformers) > 1 else None,
            vae=vae.module,
            device=device,
        )


def load_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """One, or the two experts. Raises ConfigError as ``load`` does."""
    with _loading(checkpoint, device):
        transformers = _blank_transformers(checkpoint, device, dtype)
        with filling(checkpoint, transformers, device):
            return [one.module for one in transformers]


@contextmanager
def _loading(checkpoint: Checkpoint, device: torch.device) -> Iterator[None]:
    diffusers_logging.disable_progress_bar()  # whoever calls shows progress in its own way
    transformers_logging.disable_progress_bar()
    try:
        # A tensor that is made in inference mode can be written in it alone, and the readers have threads of their own.
        with torch.inference_mode(mode=False):
            yield
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    except Exception as exc:  # the libraries raise many kinds; all mean that this folder cannot be served
        raise ConfigError(f"the model in {checkpoint.path} cannot be loaded: {exc}") from exc


def _blank_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[Blank]:
    names = ["transformer", "transformer_2"] if checkpoint.has_two_experts else ["transformer"]
    return [blank_transformer(checkpoint.path, name, device, dtype) for name in names]


@dataclass(frozen=True)
class Blank:
    """A module and the memory of its weights, by their names in the file, which is still without content."""

    component: str
    module: Any
    targets: dict[str, Tensor]


def blank_text_encoder(root: Path, device: torch.device, dtype: torch.dtype) -> Blank:
    """UMT5's encoder, all of it in this type."""
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_json_file(root / "text_encoder" / "config.json"))
    return _placed("text_encoder", module, device, dtype)


def blank_transformer(root: Path, component: str, device: torch.device, dtype: torch.dtype) -> Blank:
    """``transformer`` or ``transformer_2``; what diffusers keeps in float32 is float32 here too."""
    config = WanTransformer3DModel.load_config(str(root), subfolder=component)
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(config)
    # Its tables are no weights: they are computed, which a meta device does not do.
    made = module.config
    module.rope = type(module.rope)(made.attention_head_dim, made.patch_size, made.rope_max_seq_len).to(device)
    return _placed(component, module, device, dtype)


def blank_vae(root: Path, device: torch.device) -> Blank:
    """In float32, as it is published."""
    config = AutoencoderKLWan.load_config(str(root), subfolder="vae")
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(config)
    return _placed("vae", module, device, torch.float32)


def stored_tensors(root: Path, component: str) -> dict[str, Stored]:
    """All that the component's files have. Raises DamagedFile."""
    found: dict[str, Stored] = {}
    for path in weight_files(root, component):
        found.update(list_tensors(path)[0])
    return found


def match(blank: Blank, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The stored tensor of each target. Raises DamagedFile when one is missing or has another shape."""
    found: dict[str, Stored] = {}
    for name, target in blank.targets.items():
        source = next((stored[alias] for alias in _aliases(blank.module, name) if alias in stored), None)
        if source is None:
            raise DamagedFile(f"{blank.component} has no tensor {name}")
        if source.shape != tuple(target.shape):
            raise DamagedFile(
                f"{blank.component}: {name} has the shape {list(source.shape)} and not {list(target.shape)}"
            )
        found[name] = source
    known = {alias for name in blank.targets for alias in _aliases(blank.module, name)}
    if unknown := sorted(set(stored) - known):
        log.info("%s: %d tensors of the files are not used, for instance %s", blank.component, len(unknown), unknown[0])
    return found


def _placed(component: str, module: Any, device: torch.device, dtype: torch.dtype) -> Blank:  # noqa: ANN401
    """Every parameter where it will be; those that are one stay one."""
    targets: dict[str, Tensor] = {}
    tied = _tied(module)
    for name, parameter in list(module.named_parameters()):
        if name in tied:
            continue
        target = torch.empty(parameter.shape, device=device, dtype=_kept_dtype(module, name, dtype))
        targets[name] = target
        for alias in _aliases(module, name):
            owner, _, own_name = alias.rpartition(".")
            setattr(module.get_submodule(owner), own_name, torch.nn.Parameter(target, requires_grad=False))
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    assert not left, f"no memory for {left}"
    return Blank(component, module.eval(), targets)


def _kept_dtype(module: Any, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """diffusers keeps what is named in such a list in float32; transformers does so for float16 alone."""
    kept = module._keep_in_fp32_modules or [] if isinstance(module, WanTransformer3DModel) else []
    return torch.float32 if any(part in kept for part in name.split(".")) else dtype


def _aliases(module: Any, name: str) -> list[str]:  # noqa: ANN401
    """The names of one weight, its own first: an embedding that is used in two places has two."""
    return [name, *(alias for alias, source in _tied(module).items() if source == name)]


def _tied(module: Any) -> dict[str, str]:  # noqa: ANN401
    """From each other name of a weight to its own; diffusers' modules have none."""
    return getattr(module, "_tied_weights_keys", None) or {}


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers()


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
            job.copy.keep(job.blank.targets)


def _job(checkpoint: Checkpoint, blank: Blank) -> _Job:
    published = match(blank, stored_tensors(checkpoint.path, blank.component))
    copy = copy_of(checkpoint, blank.component, blank.targets, published)
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
        if job.copy.fits(job.blank.targets):
            return job
    except (OSError, DamagedFile) as exc:
        job.copy.discard(str(exc))
    reader.begin(job.published, job.blank.targets).wait()
    return replace(job, used=job.published)
