"""The operations of a block between its matrix products as Triton kernels: one row a program, one pass over memory.

``block_operations.py`` says what each computes. Everything inside is float32; where diffusers stores a value in the
type of the hidden states, it is rounded to that type here too.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - a kernel's arguments are Triton's pointers and numbers

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.engines.wan.kernels_ahead import Launch, launch_kernel
from kinema.engines.wan.transformer.embeddings import Rotation, Text
from kinema.engines.wan.transformer.launch import warps_for
from kinema.engines.wan.transformer.layers import Linear, PlainLinear

_LOG2_E = 1.4426950408889634


@triton.jit
def _add_norm_kernel(
    hidden_ptr,
    branch_ptr,
    out_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    num_tokens,
    num_clean,
    width: tl.constexpr,
    eps: tl.constexpr,
    last_row: tl.constexpr,
    has_branch: tl.constexpr,
    has_gate: tl.constexpr,
    is_affine: tl.constexpr,
    block: tl.constexpr,
):
    """hidden += branch * gate, where these are given; out = the layer norm of hidden, modulated or affine."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    which = tl.where(row % num_tokens < num_clean, 0, last_row) * width
    x = tl.load(hidden_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if has_branch:
        branch = tl.load(branch_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        if has_gate:
            branch = branch * tl.load(gate_ptr + which + columns, mask=mask, other=0.0)
        stored = (x + branch).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * width + columns, stored, mask=mask)
        x = stored.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(mask, x - mean, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if is_affine:
        scale = tl.load(scale_ptr + columns, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + columns, mask=mask, other=0.0)
    else:
        scale = 1.0 + tl.load(scale_ptr + which + columns, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + which + columns, mask=mask, other=0.0)
    out = centred * spread * scale + shift
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    qkv_ptr,
    norms_ptr,
    cosines_ptr,
    sines_ptr,
    num_tokens,
    width: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    block: tl.constexpr,
):
    """Normalise a row's queries (part 0) or keys (1) over all heads and round; then rotate each pair and round."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pairs = tl.arange(0, block)
    mask = pairs < width // 2
    columns = tl.arange(0, 2 * block)
    place = qkv_ptr + row * (3 * width) + part * width + columns
    x = tl.load(place, mask=columns < width, other=0.0).to(tl.float32)
    weights = tl.load(norms_ptr + part * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    spread = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = (x * spread * weights).to(qkv_ptr.dtype.element_ty).to(tl.float32)
    angles = (row % num_tokens) * half + pairs % half
    cosines = tl.load(cosines_ptr + angles, mask=mask, other=0.0)
    sines = tl.load(sines_ptr + angles, mask=mask, other=0.0)
    first, second = tl.split(tl.reshape(normed, (block, 2)))
    turned = tl.interleave(first * cosines - second * sines, first * sines + second * cosines)
    tl.store(place, turned.to(qkv_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, width: tl.constexpr, eps: tl.constexpr, block: tl.constexpr):
    """The RMS norm of a row, in place."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight
    tl.store(x_ptr + row * width + columns, out.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend_text_kernel(
    query_ptr,
    keys_values_ptr,
    bias_ptr,
    counts_ptr,
    out_ptr,
    query_stride,
    text_stride,
    bias_stride,
    num_tokens,
    width: tl.constexpr,
    head_width: tl.constexpr,
    block_width: tl.constexpr,
    scale: tl.constexpr,
    block_tokens: tl.constexpr,
    block_keys: tl.constexpr,
):
    """Queries of some tokens and one head to all keys of their prompt; the softmax as it goes (arXiv 2205.14135)."""
    tokens = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner = tl.arange(0, block_width)
    is_inner = inner < head_width
    query_mask = (tokens[:, None] < num_tokens) & is_inner[None, :]
    places = tokens[:, None].to(tl.int64) * width + head * head_width + inner[None, :]
    query = tl.load(query_ptr + batch * query_stride + places, mask=query_mask, other=0.0)
    count = tl.load(counts_ptr + batch)
    best = tl.full((block_tokens,), float("-inf"), tl.float32)
    total = tl.zeros((block_tokens,), tl.float32)
    seen = tl.zeros((block_tokens, block_width), tl.float32)
    for start in range(0, count, block_keys):
        keys = start + tl.arange(0, block_keys)
        is_key = keys < count
        rows = keys_values_ptr + batch * text_stride + keys[:, None].to(tl.int64) * (2 * width) + head * head_width
        mask = is_key[:, None] & is_inner[None, :]
        key = tl.load(rows + inner[None, :], mask=mask, other=0.0)
        bias = tl.load(bias_ptr + batch * bias_stride + keys, mask=is_key, other=float("-inf"))
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + bias[None, :] * 1.4426950408889634
        higher = tl.maximum(best, tl.max(logits, axis=1))
        shares = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(shares, axis=1)
        value = tl.load(rows + width + inner[None, :], mask=mask, other=0.0)
        seen = seen * fade[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        best = higher
    out = (seen / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + batch * num_tokens * width + places, out, mask=query_mask)


class TritonBlockOperations:
    """``BlockOperations`` on CUDA: kernels, and cuBLAS for a product with GELU."""

    def __init__(self, num_heads: int, eps: float, launch: Launch = launch_kernel) -> None:
        self._num_heads = num_heads
        self._eps = eps
        self._launch = launch

    def norm(self, hidden: Tensor, shift: Tensor, scale: Tensor, num_clean: int) -> Tensor:
        return self._add_norm(hidden, None, None, shift, scale, num_clean, is_affine=False)

    def add_norm(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, num_clean: int
    ) -> Tensor:
        return self._add_norm(hidden, branch, gate, shift, scale, num_clean, is_affine=False)

    def add_norm_affine(self, hidden: Tensor, branch: Tensor, gate: Tensor, affine: Linear, num_clean: int) -> Tensor:
        return self._add_norm(hidden, branch, gate, affine.bias, affine.weight, num_clean, is_affine=True)

    def rotate(self, qkv: Tensor, norms: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        size, num_tokens, total = qkv.shape
        width = total // 3
        block = triton.next_power_of_2(width // 2)
        self._launch(
            _rotate_kernel,
            (size * num_tokens, 2),
            qkv,
            norms,
            rotation.cosines,
            rotation.sines,
            num_tokens,
            width,
            rotation.cosines.shape[1],
            self._eps,
            block,
            num_warps=warps_for(2 * block),
        )
        query, key, value = qkv.view(size, num_tokens, 3, self._num_heads, -1).unbind(2)
        return query, key, value

    def norm_query(self, query: Tensor, weight: Tensor) -> Tensor:
        width = query.shape[-1]
        block = triton.next_power_of_2(width)
        rows = query.numel() // width
        self._launch(_rms_norm_kernel, (rows,), query, weight, width, self._eps, block, num_warps=warps_for(block))
        return query

    def attend_text(self, query: Tensor, keys_values: Tensor, text: Text) -> Tensor:
        size, num_tokens, width = query.shape
        head_width = width // self._num_heads
        out = torch.empty((size, num_tokens, width), dtype=query.dtype, device=query.device)
        block_tokens = 128
        self._launch(
            _attend_text_kernel,
            (triton.cdiv(num_tokens, block_tokens), self._num_heads, size),
            query,
            keys_values,
            text.bias,
            text.counts,
            out,
            query.stride(0),
            keys_values.stride(0),
            text.bias.stride(0),
            num_tokens,
            width,
            head_width,
            max(triton.next_power_of_2(head_width), 16),
            head_width**-0.5 * _LOG2_E,
            block_tokens,
            64,
            num_warps=8,
        )
        return out

    def gelu_linear(self, x: Tensor, layer: PlainLinear) -> Tensor:
        """One product with GELU in its epilogue, which rounds once less than layer and GELU apart."""
        rows = x.flatten(0, 1)
        out: Tensor = torch.ops.aten._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)
        return out.view(*x.shape[:2], -1)

    def _add_norm(
        self,
        hidden: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        num_clean: int,
        *,
        is_affine: bool,
    ) -> Tensor:
        num_tokens, width = hidden.shape[1:]
        out = torch.empty_like(hidden)
        block = triton.next_power_of_2(width)
        self._launch(
            _add_norm_kernel,
            (hidden.shape[0] * num_tokens,),
            hidden,
            hidden if branch is None else branch,
            out,
            scale if gate is None else gate,
            shift,
            scale,
            num_tokens,
            num_clean,
            width,
            self._eps,
            1 if num_clean else 0,
            branch is not None,
            gate is not None,
            is_affine,
            block,
            num_warps=warps_for(block),
        )
        return out
