"""Random weights for a checkpoint that has configs and a tokenizer alone, drawn on the device.

A device takes the same time for them as for trained ones. A layer's outputs are about as large as its inputs, so no
number overflows, and one kind of device draws the same weights each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.loading import Components, dtype_of
from kinema.errors import ConfigError


def draw(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Components:
    """Do as ``loading.load``, types included. Raises ConfigError when they do not fit into the device's memory."""
    path = checkpoint.path
    try:
        with _made_on(device, dtype):
            text_encoder = UMT5EncoderModel(UMT5Config.from_json_file(path / "text_encoder" / "config.json"))
        transformer, *others = draw_transformers(checkpoint, device, dtype)
        with _made_on(device, torch.float32):
            vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(str(path), subfolder="vae"))
        for module in (text_encoder, vae):
            _fill(module, device)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    return Components(
        tokenizer=AutoTokenizer.from_pretrained(str(path), subfolder="tokenizer"),
        text_encoder=text_encoder.eval(),
        transformer=transformer,
        transformer_2=others[0] if others else None,
        vae=vae.eval(),
        device=device,
    )


def draw_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Do as ``loading.load_transformers``. Raises as ``draw``."""
    names = ["transformer", "transformer_2"] if checkpoint.has_two_experts else ["transformer"]
    try:
        with _made_on(device, dtype):
            modules = [_transformer(checkpoint, name) for name in names]
        for module in modules:
            _fill(module, device)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    return modules


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made within the block are made on this device, in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _transformer(checkpoint: Checkpoint, subfolder: str) -> Any:  # noqa: ANN401 - a diffusers module
    config = WanTransformer3DModel.load_config(str(checkpoint.path), subfolder=subfolder)
    module = WanTransformer3DModel.from_config(config).eval()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtype_of(module, name, parameter.dtype))
    return module


@torch.no_grad()
def _fill(module: Any, device: torch.device) -> None:  # noqa: ANN401 - a module of either library
    """Set norms to 1, biases to 0 and all else to normal numbers, whose deviation is one over the root of the number of
    inputs. Each module has a generator of its own, so it gets the same numbers when it is drawn alone."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if max(parameter.shape) < parameter.numel():
            parameter.normal_(0.0, (parameter.numel() // parameter.shape[0]) ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
