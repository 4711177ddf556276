"""Bring a checkpoint's components to a device: the same lines for the tiny model and for the real ones.

A component's weights get their memory first (``empty_weights.py``), and threads fill the memory of all components at
once (``tensors.py``): from a copy in a smaller type where there is one (``weights_cache.py``), else from the checkpoint
itself. Neither diffusers nor transformers is imported for it: they cost seconds of every start.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kinema.engines.base import StageReport, report_nothing
from kinema.engines.failures import meaning_of
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.empty_weights import (
    EmptyWeights,
    empty_image_encoder,
    empty_text_encoder,
    empty_transformers,
    empty_vae,
    names_of,
    shapes_of,
    size_of_weights,
    transformer_weights,
    unused_of,
)
from kinema.engines.wan.image_encoder import ImageEncoder
from kinema.engines.wan.placement import Placement, encoders_of, transformer_bytes
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.engines.wan.single_file import is_mark, is_scale, names_of_file, shape_of
from kinema.engines.wan.tensors import FLOAT8, PendingRead, StoredTensor, TensorReader, list_tensors, read_number
from kinema.engines.wan.text_encoder import TextEncoder
from kinema.engines.wan.text_graphs import PaddedTexts
from kinema.engines.wan.tokenizer import Tokenizer
from kinema.engines.wan.transformer.network import TransformerWeights
from kinema.engines.wan.vae.autoencoder import Vae
from kinema.engines.wan.weights_cache import CachedWeights, cached_weights_of
from kinema.errors import ConfigError, WorkerLost

log = logging.getLogger(__name__)

# With fewer cores, one that stays free costs more than it saves: on two, a video takes 1.6 times as long.
_FEW_CORES = 4
# So many tensors are named that a checkpoint has too many of, or too few.
_MAX_LISTED = 3


@dataclass
class Components:
    """A loaded checkpoint. ``transformer_2`` is the low-noise expert of Wan 2.2 A14B, else None, and ``image_encoder``
    is there for a model that attends to pictures. A transformer is its ``TransformerWeights`` at first, and what an
    engine makes of them later. On CUDA an engine encodes prompts by ``texts``."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    transformer: Any
    transformer_2: Any | None
    vae: Vae
    device: torch.device
    image_encoder: ImageEncoder | None = None
    texts: PaddedTexts | None = None


# Makes the components of a checkpoint, in a type, in their places. ``load`` reads them; measurements draw random ones.
LoadComponents = Callable[[Checkpoint, Placement, torch.dtype], Components]
# Makes the transformers alone, one or the two experts, for the other ranks. It must be a function of a module, since
# each rank imports it.
LoadTransformers = Callable[[Checkpoint, torch.device, torch.dtype], list[TransformerWeights]]


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
    """Keep one in four CPU cores, of four or more, free for a service's other work: requests, H.264, files.

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
    checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype, report: StageReport = report_nothing
) -> Components:
    """Read the weights (safetensors only) of all components to their places. The VAE stays float32, as published; the
    type that it decodes in is chosen later.

    Raises ConfigError when a file is damaged or does not fit its config, or when the device has too little memory.
    """
    device = placement.device
    with _loading(checkpoint, placement, dtype):
        _check_factors(checkpoint)
        published = _published(checkpoint, [*checkpoint.transformers, *encoders_of(checkpoint), "vae"])
        text_encoder = empty_text_encoder(checkpoint, placement.of_encoders, dtype)
        image_encoder = empty_image_encoder(checkpoint, placement.of_encoders, dtype)
        vae = empty_vae(checkpoint, device)
        transformers = empty_transformers(checkpoint, placement.of_transformers, dtype)
        encoders = [text_encoder] if image_encoder is None else [text_encoder, image_encoder]
        with filling(checkpoint, published, [*transformers, *encoders, vae], device, report):
            tokenizer = Tokenizer.load(checkpoint.root_of("tokenizer") / "tokenizer")
        experts = [transformer_weights(checkpoint, empty) for empty in transformers]
        return Components(
            tokenizer=tokenizer,
            text_encoder=TextEncoder(checkpoint.text_encoder, text_encoder.targets),
            transformer=experts[0],
            transformer_2=experts[1] if len(experts) > 1 else None,
            vae=Vae(checkpoint.vae, vae.targets),
            device=device,
            image_encoder=image_encoder_of(checkpoint, image_encoder),
        )


def image_encoder_of(checkpoint: Checkpoint, filled: EmptyWeights | None) -> ImageEncoder | None:
    """The image encoder with its weights; None for a model that has none."""
    config, processor = checkpoint.image_encoder, checkpoint.image_processor
    if filled is None or config is None or processor is None:
        return None
    return ImageEncoder(config, processor, filled.targets)


def load_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[TransformerWeights]:
    """Read the weights of the transformer, or of both experts. Raises ConfigError as ``load`` does."""
    with _loading(checkpoint, Placement(device), dtype):
        published = _published(checkpoint, list(checkpoint.transformers))
        transformers = empty_transformers(checkpoint, device, dtype)
        with filling(checkpoint, published, transformers, device):
            return [transformer_weights(checkpoint, empty) for empty in transformers]


@contextmanager
def _loading(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> Iterator[None]:
    try:
        # A tensor that is made in inference mode can be written in it alone, and the readers have threads of their own.
        with torch.inference_mode(mode=False):
            yield
    except torch.OutOfMemoryError as exc:
        raise does_not_fit(checkpoint, placement, dtype) from exc
    except ConfigError:
        raise
    except Exception as exc:  # files and libraries raise many kinds
        if isinstance(lost := meaning_of(exc), WorkerLost):  # the folder may be sound
            raise lost from exc
        raise ConfigError(f"the model in {checkpoint.path} cannot be loaded: {exc}") from exc


def require_room(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype, limit_bytes: int) -> None:
    """Raises ConfigError for a model whose weights take more than so many bytes of the device, before any is read."""
    if _weight_bytes(checkpoint, placement, dtype) > limit_bytes:
        raise does_not_fit(checkpoint, placement, dtype, limit_bytes)


def does_not_fit(
    checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype, limit_bytes: int | None = None
) -> ConfigError:
    """What the model needs of the device, and what is there, where that is known."""
    needs = f"its weights take {_weight_bytes(checkpoint, placement, dtype) / 1e9:.3g} GB there"
    there = "" if limit_bytes is None else f", and all of its tensors may take {limit_bytes / 1e9:.3g} GB"
    return ConfigError(
        f"{checkpoint.name} does not fit into the memory of {placement.device}: {needs}{there}; give a smaller model, "
        "a device or an engine.wan.memory_gb with more, or engine.offload = 'auto'"
    )


def _weight_bytes(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> int:
    """Those that lie on the device, all at once, as they are while they are read."""
    components = ["vae"] if placement.has_text_offloaded else ["vae", *encoders_of(checkpoint)]
    transformers = 0 if placement.has_blocks_offloaded else transformer_bytes(checkpoint, placement, dtype)
    return transformers + sum(size_of_weights(checkpoint, component, dtype) for component in components)


def _check_factors(checkpoint: Checkpoint) -> None:
    """Raises ConfigError for a VAE that makes frames of another size or number than its config says."""
    vae = checkpoint.vae
    said = vae.scale_factor_spatial, vae.scale_factor_temporal
    if said != vae.factors:
        raise ConfigError(
            f"the model folder {checkpoint.path}: vae/config.json: scale_factor_spatial and scale_factor_temporal are "
            f"{said}, and its layers make {vae.factors}"
        )


def _published(checkpoint: Checkpoint, components: Sequence[str]) -> dict[str, dict[str, StoredTensor]]:
    """The checkpoint's tensor of each weight of each component, before any memory is taken for them. Raises
    DamagedFile."""
    return {
        component: match(component, shapes_of(checkpoint, component), stored_tensors(checkpoint, component))
        for component in components
    }


def stored_tensors(checkpoint: Checkpoint, component: str) -> dict[str, StoredTensor]:
    """All tensors in the component's files, by diffusers' names. Raises DamagedFile, also for a tensor that two files
    have, or one file by two names."""
    found: dict[str, StoredTensor] = {}
    for path in checkpoint.weight_files(component):
        tensors = list_tensors(path)[0]
        if twice := sorted(tensors.keys() & found.keys()):
            raise DamagedFile(f"{component} has {_listed(twice)} in two files")
        found.update(tensors)
    if component not in checkpoint.files:
        return found
    found = _with_scales(found)
    names = names_of_file(found)
    if twice := sorted(name for name, count in Counter(names.values()).items() if count > 1):
        raise DamagedFile(f"{component} has {_listed(twice)} twice")
    return {new: replace(found[old], shape=shape_of(new, found[old].shape)) for old, new in names.items()}


def _with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights of an FP8 file, each with its scale. Raises DamagedFile for a scale that is no number above 0, and
    for one without a weight."""
    weights = {name: tensor for name, tensor in stored.items() if not (is_scale(name) or is_mark(name))}
    for name in filter(is_scale, stored):
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in weights:
            raise DamagedFile(f"{name[:100]} is the scale of no weight")
        try:
            scale = read_number(stored[name])
        except DamagedFile as exc:
            raise DamagedFile(f"{name[:100]} is no scale of a whole weight: {exc}") from exc
        if not 0 < scale < math.inf:
            raise DamagedFile(f"{name[:100]} is {scale}, and a scale is a number above 0")
        weights[weight] = replace(weights[weight], scale=scale)
    return weights


def match(
    component: str, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensor of each weight. Raises DamagedFile when one is missing, has another shape, is of whole numbers
    or of FP8 without a scale, or belongs to no weight: the files are of another network than the config.
    """
    aliases = {name: names_of(component, name) for name in shapes}
    found = {name: stored[alias] for name in shapes for alias in reversed(aliases[name]) if alias in stored}
    if missing := [name for name in shapes if name not in found]:
        raise DamagedFile(f"{component} has no tensor {_listed(missing)}")
    known = {alias for names in aliases.values() for alias in names} | unused_of(component)
    if unknown := sorted(stored.keys() - known):
        raise DamagedFile(f"{component} has the tensor {_listed(unknown)}, which its config.json has no place for")
    for name, source in found.items():
        if source.shape != shapes[name]:
            raise DamagedFile(f"{component}: {name} has the shape {list(source.shape)} and not {list(shapes[name])}")
        if not source.dtype.is_floating_point:
            raise DamagedFile(f"{component}: {name} is of {source.dtype}; weights are floating-point numbers")
        if source.dtype in FLOAT8 and source.scale is None:
            raise DamagedFile(
                f"{component}: {name} is of {source.dtype} and has no scale; give a file with scales (scale_weight or "
                "weight_scale), as engine.wan.transformer, or weights in bf16, fp16 or fp32"
            )
    return found


def _listed(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(name[:100] for name in names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"


@dataclass(frozen=True)
class _Source:
    """Where the weights of one component come from.

    ``published`` are the checkpoint's own tensors, and ``used`` those that are read: the same, or the copy's.
    """

    empty: EmptyWeights
    published: dict[str, StoredTensor]
    copy: CachedWeights | None
    used: dict[str, StoredTensor]

    @property
    def is_copy(self) -> bool:
        return self.used is not self.published


@contextmanager
def filling(
    checkpoint: Checkpoint,
    published: Mapping[str, dict[str, StoredTensor]],
    components: Sequence[EmptyWeights],
    device: torch.device,
    report: StageReport = report_nothing,
) -> Iterator[None]:
    """Fill the components' weights while the block runs; they are complete after it. ``published`` are the checkpoint's
    own tensors of each component. Raises DamagedFile or OSError."""
    started = time.perf_counter()
    with TensorReader(device) as reader:
        sources = [_choose_source(checkpoint, empty, published[empty.component]) for empty in components]
        progress = _ReadProgress(sum(_size(source) for source in sources), report)
        reads = [reader.begin(source.used, source.empty.targets, progress.add) for source in sources]
        yield
        sources = [_finish(source, read, reader) for source, read in zip(sources, reads, strict=True)]
    size = sum(_size(source) for source in sources)
    log.info("weights: %.2f GB read in %.1f s", size / 1e9, time.perf_counter() - started)
    for source in sources:
        if source.copy is not None and not source.is_copy:
            report("keeping a copy of the weights", None)
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


def _choose_source(checkpoint: Checkpoint, empty: EmptyWeights, published: dict[str, StoredTensor]) -> _Source:
    """The copy of the component's weights where a whole one exists, else the checkpoint itself."""
    copy = cached_weights_of(checkpoint, empty.component, empty.targets, published)
    copied = None if copy is None else copy.tensors()
    if copy is not None and copied is not None:
        try:
            return _Source(empty, published, copy, match(empty.component, empty.shapes, copied))
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
