"""Bring a checkpoint's components to a device: the same lines for the tiny model and for the real ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.filling import filling
from kinema.engines.wan.modules import Blank, blank_text_encoder, blank_transformer, blank_vae
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
