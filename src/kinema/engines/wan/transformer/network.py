"""The weights of diffusers' WanTransformer3DModel, in the shape in which they are multiplied.

Query, key and value of one input become one matrix, and the large layers become e4m3 where that is asked for.
diffusers' own tensors are dropped block by block, so that no more than one block is in memory twice. Letters: d width,
t text width, r frequencies of a time, p values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.transformer.fp8 import Fp8Linear, Linears, choose_fp8_operations
from kinema.engines.wan.transformer.fp8_operations import Fp8Operations


@dataclass(frozen=True)
class Linear:
    """A layer with ``weight`` (out, in) and ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


# A layer and GELU of its result, in one.
GeluLinear = Callable[[Tensor, Linear], Tensor]


@dataclass(frozen=True)
class FeedForward:
    """Two layers with GELU between them, which belongs to the first one's product."""

    up: Linear
    down: Linear

    def __call__(self, x: Tensor, gelu_linear: GeluLinear) -> Tensor:
        return self.down(gelu_linear(x, self.up))


@dataclass(frozen=True)
class Fp8FeedForward:
    """The same two layers in e4m3, where GELU belongs to the scaling of the second one's input."""

    up: Fp8Linear
    down: Fp8Linear

    def __call__(self, x: Tensor, gelu_linear: GeluLinear) -> Tensor:  # noqa: ARG002 - it is that of the other kind
        return self.down.after_gelu(self.up(x))


@dataclass(frozen=True)
class Block:
    """One block. RMS weights are over all heads together: ``norms`` (2, d) of queries and keys, ``cross_norm_*`` (d,)
    of those of the cross-attention. The large layers are all of one kind; ``cross_kv``, whose keys and values are
    computed once a request, is always a ``Linear``.
    """

    qkv: Linear | Fp8Linear
    norms: Tensor
    out: Linear | Fp8Linear
    cross_norm: Linear
    cross_q: Linear | Fp8Linear
    cross_kv: Linear
    cross_norm_q: Tensor
    cross_norm_k: Tensor
    cross_out: Linear | Fp8Linear
    feed_forward: FeedForward | Fp8FeedForward


@dataclass(frozen=True)
class Network:
    """All weights of a transformer. ``patch`` reads patches (p,), ``modulation`` (layers, 6, d) and ``head_modulation``
    (2, d) are float32; ``cosines`` and ``sines`` (positions, head_dim / 2) are the angles of each position, the axes'
    side by side, ``axes`` how many belong to each.
    """

    blocks: tuple[Block, ...]
    patch: Linear
    patch_size: tuple[int, int, int]
    out_channels: int
    num_heads: int
    eps: float
    time_frequencies: Any
    time_embedder: Any
    time_projection: Linear
    text_in: Linear
    text_out: Linear
    modulation: Tensor
    head_modulation: Tensor
    head: Linear
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
def extract_network(module: Any, linears: Linears = "dtype") -> Network:  # noqa: ANN401 - a diffusers module
    """The weights of a WanTransformer3DModel, which is of no use afterwards."""
    config, embedder, rope = module.config, module.condition_embedder, module.rope
    fp8 = choose_fp8_operations(module.proj_out.weight.device) if linears == "fp8" else None
    return Network(
        modulation=torch.cat([block.scale_shift_table.float() for block in module.blocks]),
        head_modulation=module.scale_shift_table.float()[0],
        blocks=tuple(_extract_block(block, fp8) for block in module.blocks),
        patch=Linear(module.patch_embedding.weight.flatten(1), module.patch_embedding.bias.detach()),
        patch_size=tuple(config.patch_size),
        out_channels=config.out_channels,
        num_heads=config.num_attention_heads,
        eps=config.eps,
        time_frequencies=embedder.timesteps_proj,
        time_embedder=embedder.time_embedder,
        time_projection=_linear(embedder.time_proj),
        text_in=_linear(embedder.text_embedder.linear_1),
        text_out=_linear(embedder.text_embedder.linear_2),
        head=_linear(module.proj_out),
        # Every angle stands there twice, for the two halves of a pair.
        cosines=rope.freqs_cos[:, ::2].contiguous(),
        sines=rope.freqs_sin[:, 1::2].contiguous(),
        axes=(rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2),
    )


def _extract_block(block: Any, fp8: Fp8Operations | None) -> Block:  # noqa: ANN401 - a diffusers module
    own, cross = block.attn1, block.attn2

    def large(layer: Linear) -> Linear | Fp8Linear:
        return layer if fp8 is None else _quantised(layer, fp8)

    extracted = Block(
        qkv=large(_fuse(own.to_q, own.to_k, own.to_v)),
        norms=torch.stack([own.norm_q.weight, own.norm_k.weight]),
        out=large(_linear(own.to_out[0])),
        cross_norm=Linear(block.norm2.weight.detach().float(), block.norm2.bias.detach().float()),
        cross_q=large(_linear(cross.to_q)),
        cross_kv=_fuse(cross.to_k, cross.to_v),
        cross_norm_q=cross.norm_q.weight.detach(),
        cross_norm_k=cross.norm_k.weight.detach(),
        cross_out=large(_linear(cross.to_out[0])),
        feed_forward=_extract_feed_forward(block.ffn, fp8),
    )
    del block.attn1, block.attn2, block.ffn
    return extracted


def _extract_feed_forward(ffn: Any, fp8: Fp8Operations | None) -> FeedForward | Fp8FeedForward:  # noqa: ANN401 - diffusers'
    up, down = _linear(ffn.net[0].proj), _linear(ffn.net[2])
    if fp8 is None:
        return FeedForward(up, down)
    return Fp8FeedForward(_quantised(up, fp8), _quantised(down, fp8))


def _quantised(layer: Linear, fp8: Fp8Operations) -> Fp8Linear:
    return Fp8Linear.of(layer.weight, layer.bias, fp8)


def _fuse(*layers: Any) -> Linear:  # noqa: ANN401 - torch's modules have loosely typed weights
    return Linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _linear(layer: Any) -> Linear:  # noqa: ANN401 - the same
    return Linear(layer.weight.detach(), layer.bias.detach())
