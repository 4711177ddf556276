"""Random weights for a checkpoint that has configs and a tokenizer alone, drawn on the device.

A device takes the same time for them as for trained ones. A layer's outputs are about as large as its inputs, so no
number overflows, and one kind of device draws the same weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.empty_weights import (
    EmptyWeights,
    empty_image_encoder,
    empty_text_encoder,
    empty_transformers,
    empty_vae,
    transformer_weights,
)
from kinema.engines.wan.loading import Components, image_encoder_of
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.text_encoder import TextEncoder
from kinema.engines.wan.tokenizer import Tokenizer
from kinema.engines.wan.transformer.network import TransformerWeights
from kinema.engines.wan.vae.autoencoder import Vae
from kinema.errors import ConfigError


def draw(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> Components:
    """Do as ``loading.load``, types included. Raises ConfigError when they do not fit into the device's memory."""
    device = placement.device
    transformer, *others = _draw_transformers(checkpoint, placement.of_transformers, dtype, device)
    try:
        text_encoder = empty_text_encoder(checkpoint, placement.of_encoders, dtype)
        image_encoder = empty_image_encoder(checkpoint, placement.of_encoders, dtype)
        vae = empty_vae(checkpoint, device)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    for empty in (text_encoder, image_encoder, vae):
        if empty is not None:
            fill(empty, device)
    return Components(
        tokenizer=Tokenizer.load(checkpoint.root_of("tokenizer") / "tokenizer"),
        text_encoder=TextEncoder(checkpoint.text_encoder, text_encoder.targets),
        transformer=transformer,
        transformer_2=others[0] if others else None,
        vae=Vae(checkpoint.vae, vae.targets),
        device=device,
        image_encoder=image_encoder_of(checkpoint, image_encoder),
    )


def draw_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[TransformerWeights]:
    """Do as ``loading.load_transformers``. Raises as ``draw``."""
    return _draw_transformers(checkpoint, device, dtype, drawing_device(device))


def drawing_device(device: torch.device) -> torch.device:
    """What draws weights for this device. Those that stay in the host's memory are drawn by its GPU, if it has one, so
    that they are the same as on the GPU."""
    return torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device


def _draw_transformers(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, drawn_on: torch.device
) -> list[TransformerWeights]:
    try:
        transformers = empty_transformers(checkpoint, device, dtype)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{checkpoint.name} does not fit into the memory of {device}") from exc
    for empty in transformers:
        fill(empty, drawn_on)
    return [transformer_weights(checkpoint, empty) for empty in transformers]


def fill(empty: EmptyWeights, device: torch.device) -> None:
    """Draw a component's weights; ``device`` draws them."""
    fill_tensors(empty.targets, device)


@torch.no_grad()
def fill_tensors(targets: Mapping[str, Tensor], device: torch.device) -> None:
    """Set norms to 1, biases to 0 and all else to normal numbers, whose deviation is one over the root of the number of
    inputs; ``device`` draws them.

    Each component has a generator of its own, so it gets the same numbers when it is drawn alone; names give the order.
    """
    generator: torch.Generator | None = None
    for name, target in sorted(targets.items()):
        generator = generator or torch.Generator(device).manual_seed(0)
        if max(target.shape) < target.numel():
            drawn = target if target.device.type == device.type else torch.empty_like(target, device=device)
            drawn.normal_(0.0, (target.numel() // target.shape[0]) ** -0.5, generator=generator)
            target.copy_(drawn)
        else:
            target.fill_(0.0 if name.endswith("bias") else 1.0)
