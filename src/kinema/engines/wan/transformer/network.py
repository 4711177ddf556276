"""A transformer's weights: by their names in diffusers' files, and in the shape in which they are multiplied.

Query, key and value of one input become one matrix, and large layers become e4m3 where that is asked for. The tensors
that were read are dropped block by block, so that no more than one block is in memory twice. Blocks are on the device,
or lie elsewhere and come when they compute (``streaming.py``). Letters: d width,
t text width, r frequencies of a time, p values of a patch, i width of image states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.streaming import BlockStream, Layers, layers_of, move
from kinema.engines.wan.transformer.fp8 import Fp8Linear, Linears, StoredLinear, WeightsDtype, choose_fp8_operations
from kinema.engines.wan.transformer.image_embedder import ImageEmbedder
from kinema.engines.wan.transformer.layers import (
    AdaptedFeedForward,
    AdaptedLinear,
    FeedForward,
    Fp8FeedForward,
    Layer,
    Linear,
    PlainLinear,
)

# What diffusers keeps in float32, whatever the type of the rest; part of a name.
_KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
_IMAGES = "condition_embedder.image_embedder"
# Of the angles by which positions turn (arXiv 2104.09864).
_THETA = 10_000.0


@dataclass(frozen=True)
class TransformerWeights:
    """The tensors of one transformer by their names, a tensor for each in ``shapes.py: shapes``; ``extract_network``
    empties them."""

    config: TransformerConfig
    tensors: dict[str, Tensor]


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the weight with this name when most are of ``dtype``."""
    return torch.float32 if any(part in _KEPT_IN_FLOAT32 for part in name.split(".")) else dtype


@dataclass(frozen=True)
class Block:
    """One block without its ``Readers``. RMS weights are over all heads together: ``norms`` (2, d) of queries and
    keys, ``cross_norm_q`` (d,) of the queries of the cross-attention. The large layers are all of one kind.
    """

    qkv: Layer
    norms: Tensor
    out: Layer
    cross_norm: Linear
    cross_q: Layer
    cross_norm_q: Tensor
    cross_out: Layer
    feed_forward: FeedForward | Fp8FeedForward | AdaptedFeedForward


@dataclass(frozen=True)
class Reader:
    """What makes a block's keys and values of prompts or of pictures, once for many steps: ``keys_values`` gives keys
    before values, and ``norm`` (d,) has the RMS weights of the keys, over all heads together.
    """

    keys_values: PlainLinear | AdaptedLinear
    norm: Tensor


@dataclass(frozen=True)
class Readers:
    """A block's reader of prompts, and that of pictures where the model attends to them."""

    text: Reader
    images: Reader | None = None


@dataclass(frozen=True)
class Network:
    """All weights of a transformer. ``blocks`` and ``readers``, one for each block, may lie elsewhere.
    ``images`` is an ``ImageEmbedder``, or does as one, and has positions for ``num_image_positions`` states, None where
    states need none; both are None where the model attends to prompts alone.
    ``patch`` reads patches (p,), ``modulation`` (layers, 6, d) and ``head_modulation`` (2, d) are float32, and
    so are ``time_in`` and ``time_out``; ``cosines`` and ``sines`` (positions, head_dim / 2) are the angles of
    each position, the axes' side by side, ``axes`` how many belong to each.
    """

    blocks: Layers[Block]
    readers: Layers[Readers]
    patch: Linear | AdaptedLinear
    patch_size: tuple[int, int, int]
    out_channels: int
    num_heads: int
    eps: float
    time_in: Linear | AdaptedLinear
    time_out: Linear | AdaptedLinear
    time_projection: Linear | AdaptedLinear
    text_in: Linear | AdaptedLinear
    text_out: Linear | AdaptedLinear
    images: Callable[[Tensor], Tensor] | None
    num_image_positions: int | None
    modulation: Tensor
    head_modulation: Tensor
    head: Linear | AdaptedLinear
    cosines: Tensor
    sines: Tensor
    axes: tuple[int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def width(self) -> int:
        return self.head.weight.shape[1]


@torch.inference_mode()
def extract_network(
    weights: TransformerWeights,
    linears: Linears = "dtype",
    weights_dtype: WeightsDtype = "dtype",
    stream: BlockStream | None = None,
) -> Network:
    """The network that computes, on the device of its weights, of which none is left in ``weights``.

    With a ``stream`` it computes on that one's device. Its blocks stay where the stream keeps them, and its readers in
    the host's memory.
    """
    config, tensors = weights.config, weights.tensors
    count, embedder = config.num_layers, "condition_embedder"
    cosines, sines = _angles(config)
    device = tensors["proj_out.weight"].device if stream is None else stream.device
    kinds = _Kinds(linears, weights_dtype, device)
    readers_stream = None if stream is None else BlockStream(device, is_kept=False)
    network = Network(
        modulation=torch.cat([tensors.pop(f"blocks.{index}.scale_shift_table").float() for index in range(count)]),
        head_modulation=tensors.pop("scale_shift_table").float()[0],
        blocks=(),
        readers=(),
        patch=Linear(tensors.pop("patch_embedding.weight").flatten(1), tensors.pop("patch_embedding.bias")),
        patch_size=config.patch_size,
        out_channels=config.out_channels,
        num_heads=config.num_attention_heads,
        eps=config.eps,
        time_in=_linear(tensors, f"{embedder}.time_embedder.linear_1"),
        time_out=_linear(tensors, f"{embedder}.time_embedder.linear_2"),
        time_projection=_linear(tensors, f"{embedder}.time_proj"),
        text_in=_linear(tensors, f"{embedder}.text_embedder.linear_1"),
        text_out=_linear(tensors, f"{embedder}.text_embedder.linear_2"),
        images=None if config.image_dim is None else _extract_images(tensors),
        num_image_positions=config.pos_embed_seq_len,
        head=_linear(tensors, "proj_out"),
        cosines=cosines,
        sines=sines,
        axes=_axes(config),
    )
    blocks = (_extract_block(tensors, f"blocks.{index}", kinds) for index in range(count))
    readers = (_extract_readers(tensors, f"blocks.{index}.attn2", kinds) for index in range(count))
    return replace(
        move(network, device),
        blocks=layers_of(blocks, count, stream, device),
        readers=layers_of(readers, count, readers_stream, device),
    )


def _axes(config: TransformerConfig) -> tuple[int, int, int]:
    """How many of a head's pairs of channels turn with time, height and width."""
    pairs, of_space = config.attention_head_dim // 2, config.attention_head_dim // 6
    return pairs - 2 * of_space, of_space, of_space


def _angles(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, head_dim / 2) float32, computed in float64 as diffusers does."""
    positions = torch.arange(config.rope_max_seq_len)
    angles = [
        torch.outer(positions, 1.0 / _THETA ** (torch.arange(0, 2 * count, 2, dtype=torch.float64) / (2 * count)))
        for count in _axes(config)
    ]
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


@dataclass(frozen=True)
class _Kinds:
    """What becomes of the layers of a checkpoint, on the device that computes."""

    linears: Linears
    weights_dtype: WeightsDtype
    device: torch.device

    def plain(self, layer: Linear) -> PlainLinear:
        """A layer that never multiplies in e4m3."""
        return layer if self.weights_dtype == "dtype" else StoredLinear.of(*self._moved(layer))

    def large(self, layer: Linear) -> PlainLinear | Fp8Linear:
        return self.plain(layer) if self.linears == "dtype" else self._quantised(layer)

    def feed_forward(self, up: Linear, down: Linear) -> FeedForward | Fp8FeedForward:
        if self.linears == "dtype":
            return FeedForward(self.plain(up), self.plain(down))
        return Fp8FeedForward(self._quantised(up), self._quantised(down))

    def _quantised(self, layer: Linear) -> Fp8Linear:
        return Fp8Linear.of(*self._moved(layer), choose_fp8_operations(self.device))

    def _moved(self, layer: Linear) -> tuple[Tensor, Tensor]:
        return layer.weight.to(self.device), layer.bias.to(self.device)


def _extract_block(tensors: dict[str, Tensor], name: str, kinds: _Kinds) -> Block:
    own, cross = f"{name}.attn1", f"{name}.attn2"
    affine = _linear(tensors, f"{name}.norm2")
    return Block(
        qkv=kinds.large(_fuse(tensors, f"{own}.to_q", f"{own}.to_k", f"{own}.to_v")),
        norms=torch.stack([tensors.pop(f"{own}.norm_q.weight"), tensors.pop(f"{own}.norm_k.weight")]),
        out=kinds.large(_linear(tensors, f"{own}.to_out.0")),
        cross_norm=Linear(affine.weight.float(), affine.bias.float()),
        cross_q=kinds.large(_linear(tensors, f"{cross}.to_q")),
        cross_norm_q=tensors.pop(f"{cross}.norm_q.weight"),
        cross_out=kinds.large(_linear(tensors, f"{cross}.to_out.0")),
        feed_forward=kinds.feed_forward(
            _linear(tensors, f"{name}.ffn.net.0.proj"), _linear(tensors, f"{name}.ffn.net.2")
        ),
    )


def _extract_readers(tensors: dict[str, Tensor], name: str, kinds: _Kinds) -> Readers:
    def extract(key: str, value: str, norm: str) -> Reader:
        keys_values = kinds.plain(_fuse(tensors, f"{name}.{key}", f"{name}.{value}"))
        return Reader(keys_values, tensors.pop(f"{name}.{norm}.weight"))

    has_images = f"{name}.norm_added_k.weight" in tensors
    text = extract("to_k", "to_v", "norm_k")
    return Readers(text, extract("add_k_proj", "add_v_proj", "norm_added_k") if has_images else None)


def _extract_images(tensors: dict[str, Tensor]) -> ImageEmbedder:
    positions = tensors.pop(f"{_IMAGES}.pos_embed", None)
    return ImageEmbedder(
        positions=None if positions is None else positions[0],
        norm_in=_linear(tensors, f"{_IMAGES}.norm1"),
        up=_linear(tensors, f"{_IMAGES}.ff.net.0.proj"),
        down=_linear(tensors, f"{_IMAGES}.ff.net.2"),
        norm_out=_linear(tensors, f"{_IMAGES}.norm2"),
    )


def _fuse(tensors: dict[str, Tensor], *names: str) -> Linear:
    layers = [_linear(tensors, name) for name in names]
    return Linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _linear(tensors: dict[str, Tensor], name: str) -> Linear:
    return Linear(tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias"))
