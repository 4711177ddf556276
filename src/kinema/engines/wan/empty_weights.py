"""The memory of a component's weights, before anything is read or drawn into it.

A component's config says which tensors it has, by the names that diffusers and transformers give them in their files,
and of which shapes. Each gets memory in the type in which these libraries would load it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan import image_encoder, text_encoder
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.transformer import network
from kinema.engines.wan.transformer.shapes import shapes as transformer_shapes
from kinema.engines.wan.vae.autoencoder import vae_shapes


@dataclass(frozen=True)
class EmptyWeights:
    """``targets`` is the memory of each weight, by its name in the files."""

    component: str
    targets: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(target.shape) for name, target in self.targets.items()}


def shapes_of(checkpoint: Checkpoint, component: str) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of every weight that the component's config asks for; no memory is taken."""
    match component:
        case "text_encoder":
            return text_encoder.shapes(checkpoint.text_encoder)
        case "image_encoder":
            assert checkpoint.image_encoder is not None, "the model has no image encoder"
            return image_encoder.shapes(checkpoint.image_encoder)
        case "vae":
            return vae_shapes(checkpoint.vae)
        case _:
            return transformer_shapes(checkpoint.transformers[component])


def size_of_weights(checkpoint: Checkpoint, component: str, dtype: torch.dtype, prefix: str = "") -> int:
    """The bytes of the component's weights whose names begin with ``prefix``, as they are loaded in a type."""
    shapes = {name: shape for name, shape in shapes_of(checkpoint, component).items() if name.startswith(prefix)}
    if component == "vae":
        dtype = torch.float32
    kept = network.dtype_of if component in checkpoint.transformers else lambda _name, chosen: chosen
    return sum(math.prod(shape) * kept(name, dtype).itemsize for name, shape in shapes.items())


def names_of(component: str, name: str) -> list[str]:
    """All names that one weight may have in the files, its own first."""
    if component == "image_encoder":
        return [name, image_encoder.alias_of(name)]
    aliases = text_encoder.ALIASES if component == "text_encoder" else {}
    return [name, *([aliases[name]] if name in aliases else [])]


def unused_of(component: str) -> frozenset[str]:
    """The names of tensors that a component's files may have and the engine does not need."""
    return image_encoder.UNUSED if component == "image_encoder" else frozenset()


def empty_text_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> EmptyWeights:
    """UMT5's encoder, with every weight in this type."""
    shapes = shapes_of(checkpoint, "text_encoder")
    targets = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return EmptyWeights("text_encoder", targets)


def empty_image_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> EmptyWeights | None:
    """CLIP's vision tower, with every weight in this type; None for a model that has none."""
    if checkpoint.image_encoder is None:
        return None
    shapes = shapes_of(checkpoint, "image_encoder")
    targets = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return EmptyWeights("image_encoder", targets)


def empty_transformers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[EmptyWeights]:
    """The transformer, or the two experts; what diffusers keeps in float32 is float32 here too."""
    return [_empty_transformer(checkpoint, name, device, dtype) for name in checkpoint.transformers]


def _empty_transformer(
    checkpoint: Checkpoint, component: str, device: torch.device, dtype: torch.dtype
) -> EmptyWeights:
    shapes = shapes_of(checkpoint, component)
    return EmptyWeights(
        component,
        {
            name: torch.empty(shape, dtype=network.dtype_of(name, dtype), device=device)
            for name, shape in shapes.items()
        },
    )


def empty_vae(checkpoint: Checkpoint, device: torch.device) -> EmptyWeights:
    """The VAE in float32, as it is published."""
    shapes = shapes_of(checkpoint, "vae")
    targets = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
    return EmptyWeights("vae", targets)


def transformer_weights(checkpoint: Checkpoint, empty: EmptyWeights) -> network.TransformerWeights:
    """The weights as a transformer takes them, with their config."""
    return network.TransformerWeights(checkpoint.transformers[empty.component], dict(empty.targets))
