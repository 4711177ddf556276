"""Bring a checkpoint's components to a device: the same lines for the tiny model and for the real ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError

log = logging.getLogger(__name__)


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
    path = str(checkpoint.path)
    with _loading(checkpoint, device):
        text_encoder = UMT5EncoderModel.from_pretrained(
            path, subfolder="text_encoder", dtype=dtype, use_safetensors=True
        )
        first, second = _transformers(checkpoint, device, dtype)
        return Components(
            tokenizer=AutoTokenizer.from_pretrained(path, subfolder="tokenizer"),
            text_encoder=text_encoder.eval().to(device),
            transformer=first,
            transformer_2=second,
            vae=AutoencoderKLWan.from_pretrained(path, subfolder="vae", dtype=torch.float32, use_safetensors=True).to(
                device
            ),
            device=device,
        )


def load_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """One, or the two experts. Raises ConfigError as ``load`` does."""
    with _loading(checkpoint, device):
        return [module for module in _transformers(checkpoint, device, dtype) if module is not None]


@contextmanager
def _loading(checkpoint: Checkpoint, device: torch.device) -> Iterator[None]:
    diffusers_logging.disable_progress_bar()  # whoever calls shows progress in its own way
    transformers_logging.disable_progress_bar()
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    except Exception as exc:  # the loaders raise many kinds; all mean that this folder cannot be served
        raise ConfigError(f"the model in {checkpoint.path} cannot be loaded: {exc}") from exc


def _transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any | None]:
    path = str(checkpoint.path)
    first = _transformer(path, "transformer", dtype).to(device)
    return first, _transformer(path, "transformer_2", dtype).to(device) if checkpoint.has_two_experts else None


def _transformer(path: str, subfolder: str, dtype: torch.dtype) -> Any:  # noqa: ANN401 - a diffusers module
    return WanTransformer3DModel.from_pretrained(path, subfolder=subfolder, dtype=dtype, use_safetensors=True)
