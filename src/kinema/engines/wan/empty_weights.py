"""The memory of a component's weights, before anything is read or drawn into it.

A component's config says which tensors it has, by the names that diffusers and transformers give them in their files,
and of which shapes. Each gets memory in the type in which these libraries would load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinema.engines.wan import text_encoder
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.configs import TextEncoderConfig, TransformerConfig, read_json, validated
from kinema.engines.wan.transformer import network
from kinema.engines.wan.vae.autoencoder import vae_shapes


@dataclass(frozen=True)
class EmptyWeights:
    """``targets`` is the memory of each weight, by its name in the files; ``aliases`` has the other names that a weight
    may have there."""

    component: str
    targets: dict[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def names_of(self, name: str) -> list[str]:
        """All names of one weight, its own first."""
        return [name, *([self.aliases[name]] if name in self.aliases else [])]


def empty_text_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> EmptyWeights:
    """UMT5's encoder, with every weight in this type. Raises ConfigError for a config of another encoder."""
    shapes = text_encoder.shapes(text_encoder_config(checkpoint))
    targets = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return EmptyWeights("text_encoder", targets, text_encoder.ALIASES)


def empty_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[EmptyWeights]:
    """The transformer, or the two experts; what diffusers keeps in float32 is float32 here too. Raises ConfigError."""
    names = ["transformer", "transformer_2"] if checkpoint.has_two_experts else ["transformer"]
    return [_empty_transformer(checkpoint, name, device, dtype) for name in names]


def _empty_transformer(
    checkpoint: Checkpoint, component: str, device: torch.device, dtype: torch.dtype
) -> EmptyWeights:
    shapes = network.shapes(transformer_config(checkpoint, component))
    return EmptyWeights(
        component,
        {
            name: torch.empty(shape, dtype=network.dtype_of(name, dtype), device=device)
            for name, shape in shapes.items()
        },
    )


def empty_vae(checkpoint: Checkpoint, device: torch.device) -> EmptyWeights:
    """The VAE in float32, as it is published."""
    shapes = vae_shapes(checkpoint.vae)
    targets = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
    return EmptyWeights("vae", targets)


def text_encoder_config(checkpoint: Checkpoint) -> TextEncoderConfig:
    """The checkpoint's ``text_encoder/config.json``. Raises ConfigError for another encoder than UMT5's."""
    name = "text_encoder/config.json"
    return validated(TextEncoderConfig, read_json(checkpoint.path, name), checkpoint.path, name)


def transformer_config(checkpoint: Checkpoint, component: str) -> TransformerConfig:
    """The config of ``transformer`` or ``transformer_2``. Raises ConfigError."""
    name = f"{component}/config.json"
    return validated(TransformerConfig, read_json(checkpoint.path, name), checkpoint.path, name)


def transformer_weights(checkpoint: Checkpoint, empty: EmptyWeights) -> network.TransformerWeights:
    """The weights as a transformer takes them, with their config."""
    return network.TransformerWeights(transformer_config(checkpoint, empty.component), dict(empty.targets))
