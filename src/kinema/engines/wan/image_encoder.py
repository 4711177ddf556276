"""CLIP's vision tower (arXiv 2103.00020), with which Wan 2.1's image-to-video models look at given frames.

It is transformers' ``CLIPVisionModel`` up to its last layer but one, whose states the transformer reads; and
``to_pixels`` is its ``CLIPImageProcessor`` by Pillow. The operations and their order are those of transformers, so that
every bit of a result is too.

Axis letters: b pictures, t tokens of a picture (the first is of the whole, the others are of its patches), d width, n
heads, k width of a head, h and w rows and columns of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from kinema.engines.base import UInt8Array
from kinema.engines.wan.configs import ImageEncoderConfig, ImageProcessorConfig
from kinema.engines.wan.device_memory import bytes_of
from kinema.engines.wan.streaming import BlockStream, Layers, StreamedBlocks, move

_PREFIX = "vision_model."
_CLASS, _PATCHES = f"{_PREFIX}embeddings.class_embedding", f"{_PREFIX}embeddings.patch_embedding.weight"
_POSITIONS = f"{_PREFIX}embeddings.position_embedding.weight"
# What files may have besides, and no state comes from: CLIP's projection beside texts, and the numbers of positions.
UNUSED = frozenset(("visual_projection.weight", f"{_PREFIX}embeddings.position_ids", "embeddings.position_ids"))
# The spelling is that of the files.
_FIRST_NORM, _LAST_NORM = f"{_PREFIX}pre_layrnorm", f"{_PREFIX}post_layernorm"


def shapes(config: ImageEncoderConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight, as published files have them."""
    width, hidden, patch = config.hidden_size, config.intermediate_size, config.patch_size
    found: dict[str, tuple[int, ...]] = {
        _CLASS: (width,),
        _PATCHES: (width, config.num_channels, patch, patch),
        _POSITIONS: (config.num_tokens, width),
    }

    def add(name: str, out: int, *inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, *inputs), (out,)

    add(_FIRST_NORM, width)
    for layer in map(_layer_name, range(config.num_hidden_layers)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}.self_attn.{name}", width, width)
        add(f"{layer}.layer_norm1", width)
        add(f"{layer}.mlp.fc1", hidden, width)
        add(f"{layer}.mlp.fc2", width, hidden)
        add(f"{layer}.layer_norm2", width)
    add(_LAST_NORM, width)
    return found


def alias_of(name: str) -> str:
    """The other name of a weight: that in files which transformers has written since its version 5."""
    return name.removeprefix(_PREFIX)


def _layer_name(index: int) -> str:
    return f"{_PREFIX}encoder.layers.{index}"


def to_pixels(config: ImageProcessorConfig, picture: UInt8Array) -> Tensor:
    """The middle of a picture (h, w, 3) uint8 RGB, in the size that the encoder sees and normalised (3, h, w)
    float32."""
    height, width = picture.shape[:2]
    edge, crop = config.size.shortest_edge, config.crop_size
    # The longer side is rounded down.
    size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - crop.height) // 2, (resized.shape[1] - crop.width) // 2
    cropped = resized[top : top + crop.height, left : left + crop.width]
    scaled = (cropped.astype(np.float64) * config.rescale_factor).astype(np.float32)
    mean, deviation = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
    return torch.from_numpy((scaled - mean) / deviation).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class _Affine:
    """``weight`` (out, in) of a layer or (d,) of a norm, and ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Layer:
    """One layer."""

    norm: _Affine
    query: _Affine
    key: _Affine
    value: _Affine
    out: _Affine
    norm_forward: _Affine
    up: _Affine
    down: _Affine


@dataclass(frozen=True)
class _Embedding:
    """What makes tokens of a picture: of the ``whole`` (d,), and of ``patches`` (d, 3, h, w). Tokens have ``positions``
    (t, d), and a norm."""

    whole: Tensor
    patches: Tensor
    positions: Tensor
    norm: _Affine


class ImageEncoder:
    """The encoder, which takes its weights out of ``weights``; that of the last layer is dropped."""

    def __init__(self, config: ImageEncoderConfig, processor: ImageProcessorConfig, weights: dict[str, Tensor]) -> None:
        """``weights`` has a tensor for each name in ``shapes(config)``."""
        self.config = config
        self.processor = processor
        self.device = weights[_POSITIONS].device
        self._embedding = _Embedding(
            weights[_CLASS], weights[_PATCHES], weights[_POSITIONS], _affine(weights, _FIRST_NORM)
        )
        self._layers: Layers[_Layer] = [_layer(weights, index) for index in range(config.num_hidden_layers - 1)]
        weights.clear()

    @property
    def device_bytes(self) -> int:
        """What the weights take of the device that computes, without layers that only pass by."""
        return bytes_of(self._embedding, self._layers, device=self.device)

    def keep_in_host(self, stream: BlockStream) -> None:
        """Compute on the device of the ``stream`` from now on, with layers that were read into the host's memory and
        stay there."""
        self.device = stream.device
        self._embedding = move(self._embedding, self.device)
        left, self._layers = list(self._layers), ()
        count = len(left)
        left.reverse()
        self._layers = StreamedBlocks((left.pop() for _ in range(count)), count, stream)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[UInt8Array]) -> Tensor:
        """The states (1, b t, d) of pictures (h, w, 3) uint8 RGB of any size, in the weights' type: those of the first
        picture, then those of the next."""
        pixels = torch.stack([to_pixels(self.processor, picture) for picture in pictures])
        return self.states(pixels.to(self.device)).flatten(0, 1)[None]

    def states(self, pixels: Tensor) -> Tensor:
        """The states (b, t, d) before the last layer, of normalised pixels (b, 3, h, w)."""
        hidden = self._embed(pixels)
        for layer in self._layers:
            hidden = hidden + self._attend(layer, self._norm(hidden, layer.norm))
            hidden = hidden + self._feed_forward(layer, self._norm(hidden, layer.norm_forward))
        return hidden

    def _embed(self, pixels: Tensor) -> Tensor:
        own = self._embedding
        patches = functional.conv2d(pixels.to(own.patches.dtype), own.patches, stride=self.config.patch_size)
        tokens = [own.whole.expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)]
        return self._norm(torch.cat(tokens, dim=1) + own.positions, own.norm)

    def _norm(self, hidden: Tensor, norm: _Affine) -> Tensor:
        return functional.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, self.config.layer_norm_eps)

    def _attend(self, layer: _Layer, normed: Tensor) -> Tensor:
        query, key, value = (self._heads(_multiply(normed, one)) for one in (layer.query, layer.key, layer.value))
        seen = functional.scaled_dot_product_attention(query, key, value)
        return _multiply(seen.transpose(1, 2).flatten(2), layer.out)

    def _heads(self, x: Tensor) -> Tensor:
        """(b, n, t, k)."""
        return x.view(*x.shape[:2], self.config.num_attention_heads, -1).transpose(1, 2)

    def _feed_forward(self, layer: _Layer, normed: Tensor) -> Tensor:
        return _multiply(_ACTIVATIONS[self.config.hidden_act](_multiply(normed, layer.up)), layer.down)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "quick_gelu": _quick_gelu}


def _multiply(x: Tensor, layer: _Affine) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _affine(weights: Mapping[str, Tensor], name: str) -> _Affine:
    return _Affine(weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer(weights: Mapping[str, Tensor], index: int) -> _Layer:
    name = _layer_name(index)
    return _Layer(
        norm=_affine(weights, f"{name}.layer_norm1"),
        query=_affine(weights, f"{name}.self_attn.q_proj"),
        key=_affine(weights, f"{name}.self_attn.k_proj"),
        value=_affine(weights, f"{name}.self_attn.v_proj"),
        out=_affine(weights, f"{name}.self_attn.out_proj"),
        norm_forward=_affine(weights, f"{name}.layer_norm2"),
        up=_affine(weights, f"{name}.mlp.fc1"),
        down=_affine(weights, f"{name}.mlp.fc2"),
    )
