"""Bring a checkpoint's components to a device: the same lines for the tiny model and for the real ones.

Modules of diffusers and transformers are built on torch's meta device, where they cost no memory and no random numbers.
Each weight then gets its memory, in the type in which the libraries would load it, and threads fill the memory of all
components at once (``tensors.py``): from a copy in a smaller type where there is one (``weights_cache.py``), else from
the checkpoint itself.
"""

from __future__ import annotations

import logging
import os
import threading
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

from kinema.engines.base import StageReport, report_nothing
from kinema.engines.wan.checkpoint import Checkpoint, weight_files
from kinema.engines.wan.tensors import DamagedFile, PendingRead, StoredTensor, TensorReader, list_tensors
from kinema.engines.wan.weights_cache import CachedWeights, cached_weights_of
from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# With fewer cores, one that stays free costs more than it saves: on two, a video takes 1.6 times as long.
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


# Makes the components of a checkpoint, in a type on a device. ``load`` reads them; measurements draw random ones.
LoadComponents = Callable[[Checkpoint, torch.device, torch.dtype], Components]
# Makes the transformers alone, one or the two experts, for the other ranks. It must be a function of a module, since
# each rank imports it.
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


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: StageReport = report_nothing
) -> Components:
    """Read the weights (safetensors only) of all components. The VAE stays float32, as published; the type that it
    decodes in is chosen later.

    Raises ConfigError when a file is damaged or does not fit its config, or when the device has too little memory.
    """
    root = checkpoint.path
    with _loading(checkpoint, device):
        text_encoder, vae = empty_text_encoder(root, device, dtype), empty_vae(root, device)
        transformers = _empty_transformers(checkpoint, device, dtype)
        with filling(checkpoint, [*transformers, text_encoder, vae], device, report):
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
    """Read the weights of the transformer, or of both experts. Raises ConfigError as ``load`` does."""
    with _loading(checkpoint, device):
        transformers = _empty_transformers(checkpoint, device, dtype)
        with filling(checkpoint, transformers, device):
            return [empty.module for empty in transformers]


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


def _empty_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[EmptyModule]:
    names = ["transformer", "transformer_2"] if checkpoint.has_two_experts else ["transformer"]
    return [empty_transformer(checkpoint.path, name, device, dtype) for name in names]


@dataclass(frozen=True)
class EmptyModule:
    """A module whose weights have memory but no content yet; ``targets`` is that memory, by the names in the files."""

    component: str
    module: Any
    targets: dict[str, Tensor]


def empty_text_encoder(root: Path, device: torch.device, dtype: torch.dtype) -> EmptyModule:
    """UMT5's encoder, with every weight in this type."""
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_json_file(root / "text_encoder" / "config.json"))
    return _give_memory("text_encoder", module, device, dtype)


def empty_transformer(root: Path, component: str, device: torch.device, dtype: torch.dtype) -> EmptyModule:
    """The component ``transformer`` or ``transformer_2``; what diffusers keeps in float32 is float32 here too."""
    config = WanTransformer3DModel.load_config(str(root), subfolder=component)
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(config)
    # The tables of the rotation are no weights: they are computed, and a meta device computes nothing.
    made = module.config
    module.rope = type(module.rope)(made.attention_head_dim, made.patch_size, made.rope_max_seq_len).to(device)
    return _give_memory(component, module, device, dtype)


def empty_vae(root: Path, device: torch.device) -> EmptyModule:
    """The VAE in float32, as it is published."""
    config = AutoencoderKLWan.load_config(str(root), subfolder="vae")
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(config)
    return _give_memory("vae", module, device, torch.float32)


def stored_tensors(root: Path, component: str) -> dict[str, StoredTensor]:
    """All tensors in the component's files. Raises DamagedFile."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(root, component):
        found.update(list_tensors(path)[0])
    return found


def match(empty: EmptyModule, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensor of each target. Raises DamagedFile when one is missing or has another shape."""
    found: dict[str, StoredTensor] = {}
    for name, target in empty.targets.items():
        source = next((stored[alias] for alias in _aliases(empty.module, name) if alias in stored), None)
        if source is None:
            raise DamagedFile(f"{empty.component} has no tensor {name}")
        if source.shape != tuple(target.shape):
            raise DamagedFile(
                f"{empty.component}: {name} has the shape {list(source.shape)} and not {list(target.shape)}"
            )
        found[name] = source
    known = {alias for name in empty.targets for alias in _aliases(empty.module, name)}
    if unknown := sorted(set(stored) - known):
        log.info("%s: %d tensors of the files are not used, for instance %s", empty.component, len(unknown), unknown[0])
    return found


def _give_memory(component: str, module: Any, device: torch.device, dtype: torch.dtype) -> EmptyModule:  # noqa: ANN401
    """Give every parameter of a meta module its memory; tied parameters share theirs."""
    targets: dict[str, Tensor] = {}
    tied = _tied(module)
    for name, parameter in list(module.named_parameters()):
        if name in tied:
            continue
        target = torch.empty(parameter.shape, device=device, dtype=dtype_of(module, name, dtype))
        targets[name] = target
        for alias in _aliases(module, name):
            owner, _, own_name = alias.rpartition(".")
            setattr(module.get_submodule(owner), own_name, torch.nn.Parameter(target, requires_grad=False))
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    assert not left, f"no memory for {left}"
    return EmptyModule(component, module.eval(), targets)


def dtype_of(module: Any, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """The type of a parameter in a module that is loaded in ``dtype``.

    diffusers keeps the transformer's parameters of a list in float32; transformers does so for float16 alone.
    """
    kept = module._keep_in_fp32_modules or [] if isinstance(module, WanTransformer3DModel) else []
    return torch.float32 if any(part in kept for part in name.split(".")) else dtype


def _aliases(module: Any, name: str) -> list[str]:  # noqa: ANN401
    """All names of one weight, its own first: an embedding that is used in two places has two."""
    return [name, *(alias for alias, source in _tied(module).items() if source == name)]


def _tied(module: Any) -> dict[str, str]:  # noqa: ANN401
    """A weight's own name for each of its other names; diffusers' modules have none."""
    return getattr(module, "_tied_weights_keys", None) or {}


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers()


@dataclass(frozen=True)
class _Source:
    """Where the weights of one module come from.

    ``published`` are the checkpoint's own tensors, and ``used`` those that are read: the same, or the copy's.
    """

    empty: EmptyModule
    published: dict[str, StoredTensor]
    copy: CachedWeights | None
    used: dict[str, StoredTensor]

    @property
    def is_copy(self) -> bool:
        return self.used is not self.published


@contextmanager
def filling(
    checkpoint: Checkpoint, modules: Sequence[EmptyModule], device: torch.device, report: StageReport = report_nothing
) -> Iterator[None]:
    """Fill the modules' weights while the block runs; they are complete after it. Raises DamagedFile or OSError."""
    started = time.perf_counter()
    with TensorReader(device) as reader:
        sources = [_choose_source(checkpoint, empty) for empty in modules]
        progress = _ReadProgress(sum(_size(source) for source in sources), report)
        reads = [reader.begin(source.used, source.empty.targets, progress.add) for source in sources]
        yield
        sources = [_finish(source, read, reader) for source, read in zip(sources, reads, strict=True)]
    size = sum(_size(source) for source in sources)
    log.info("weights: %.2f GB read in %.1f s", size / 1e9, time.perf_counter() - started)
    for source in sources:
        if source.copy is not None and not source.is_copy:
            source.copy.write(source.empty.targets)


def _size(source: _Source) -> int:
    """The bytes to read from it."""
    return sum(tensor.size for tensor in source.used.values())


class _ReadProgress:
    """Reports which part of ``total`` bytes was read, one hundredth after the other."""

    def __init__(self, total: int, report: StageReport) -> None:
        self._total = max(total, 1)
        self._report = report
        self._done = 0
        self._reported = 0.0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count what a thread has read."""
        with self._lock:
            self._done += size
            part = min(self._done * 100 // self._total / 100, 1.0)
            if part > self._reported:
                self._reported = part
                self._report("reading weights", part)


def _choose_source(checkpoint: Checkpoint, empty: EmptyModule) -> _Source:
    """The copy of the module's weights where a whole one exists, else the checkpoint itself."""
    published = match(empty, stored_tensors(checkpoint.path, empty.component))
    copy = cached_weights_of(checkpoint, empty.component, empty.targets, published)
    copied = None if copy is None else copy.tensors()
    if copy is not None and copied is not None:
        try:
            return _Source(empty, published, copy, match(empty, copied))
        except DamagedFile as exc:
            copy.discard(str(exc))
    return _Source(empty, published, copy, published)


def _finish(source: _Source, read: PendingRead, reader: TensorReader) -> _Source:
    """Wait for the read. What came from a damaged copy is read again, from the checkpoint itself."""
    if source.copy is None or not source.is_copy:
        read.wait()
        return source
    try:
        read.wait()
        if source.copy.fits(source.empty.targets):
            return source
    except (OSError, DamagedFile) as exc:
        source.copy.discard(str(exc))
    reader.begin(source.published, source.empty.targets).wait()
    return replace(source, used=source.published)
