"""How numbers become e4m3, as Triton kernels: ``fp8_operations.py`` and ``fp8_attention.py`` say what each computes.

Everything inside is float32, and what is divided is divided as IEEE says, so the numbers are those of torch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - a kernel's arguments are Triton's pointers and numbers

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.engines.wan.transformer.fp8_operations import E4M3, LARGEST, SMALLEST, ScaledRows
from kinema.engines.wan.transformer.launch import warps_for

# Tokens of one head that a program casts.
_BLOCK_TOKENS = 64
# The tensor cores may add up in a little less than float32: a product is 1.2 to 1.3 times as fast on an H100, and its
# error, 0.027 by the rounding to e4m3, grows by less than 0.0001; by up to 0.005 where the terms of a sum are alike.
_FAST_SUMS = True


@triton.jit
def _scale_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    width: tl.constexpr,
    largest_number: tl.constexpr,
    smallest: tl.constexpr,
    has_gelu: tl.constexpr,
    block: tl.constexpr,
):
    """Each program scales a row: its largest number becomes the largest that e4m3 has."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if has_gelu:
        # x (1 + tanh(z)) / 2 is x by the sigmoid of 2 z, with z = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), smallest)
    scaled = x * tl.div_rn(largest_number, largest)
    tl.store(values_ptr + row * width + columns, scaled.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + row, tl.div_rn(largest, largest_number))


@triton.jit
def _largest_kernel(
    x_ptr,
    largest_ptr,
    batch_stride,
    token_stride,
    head_stride,
    num_tokens,
    head_width: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    """The largest absolute value of a head's numbers; ``largest`` (b, heads) begins with zeros."""
    tokens = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner = tl.arange(0, block_width)
    mask = (tokens[:, None] < num_tokens) & (inner[None, :] < head_width)
    places = tokens[:, None].to(tl.int64) * token_stride + inner[None, :]
    x = tl.load(x_ptr + batch * batch_stride + head * head_stride + places, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    tl.atomic_max(largest_ptr + batch * tl.num_programs(1) + head, largest)


@triton.jit
def _cast_heads_kernel(
    x_ptr,
    largest_ptr,
    values_ptr,
    scales_ptr,
    batch_stride,
    token_stride,
    head_stride,
    num_tokens,
    head_width: tl.constexpr,
    largest_number: tl.constexpr,
    smallest: tl.constexpr,
    has_scale: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    """Cast numbers of one head, scaled or as they are; a larger number becomes e4m3's largest."""
    part = tl.program_id(0)
    tokens = part * block_tokens + tl.arange(0, block_tokens)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    inner = tl.arange(0, block_width)
    mask = (tokens[:, None] < num_tokens) & (inner[None, :] < head_width)
    places = tokens[:, None].to(tl.int64) * token_stride + inner[None, :]
    x = tl.load(x_ptr + batch * batch_stride + head * head_stride + places, mask=mask, other=0.0).to(tl.float32)
    if has_scale:
        largest = tl.maximum(tl.load(largest_ptr + batch * heads + head), smallest)
        x = x * tl.div_rn(largest_number, largest)
        if part == 0:
            tl.store(scales_ptr + batch * heads + head, tl.div_rn(largest, largest_number))
    x = tl.minimum(tl.maximum(x, -largest_number), largest_number)
    rows = (batch * num_tokens + tokens[:, None].to(tl.int64)) * heads + head
    out = values_ptr + rows * head_width + inner[None, :]
    tl.store(out, x.to(values_ptr.dtype.element_ty), mask=mask)


class TritonFp8Operations:
    """``Fp8Operations`` on CUDA: numbers are scaled by a kernel, and multiplied by cuBLAS."""

    def quantise(self, rows: Tensor) -> ScaledRows:
        return _scale_rows(rows, has_gelu=False)

    def quantise_gelu(self, rows: Tensor) -> ScaledRows:
        return _scale_rows(rows, has_gelu=True)

    def multiply(self, rows: ScaledRows, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        return torch._scaled_mm(
            rows.values,
            weight.t(),
            scale_a=rows.scales,
            scale_b=scales,
            bias=bias,
            out_dtype=bias.dtype,
            use_fast_accum=_FAST_SUMS,
        )


def _scale_rows(x: Tensor, *, has_gelu: bool) -> ScaledRows:
    """``x`` (rows, n) in e4m3, or its GELU."""
    rows, width = x.shape
    values = torch.empty((rows, width), dtype=E4M3, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    warps = warps_for(block)
    _scale_rows_kernel[(rows,)](x, values, scales, width, LARGEST, SMALLEST, has_gelu, block, num_warps=warps)
    return ScaledRows(values, scales)


def cast_heads(x: Tensor) -> Tensor:
    """``x`` (b, tokens, heads, head_dim) in e4m3."""
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    _cast(x, values, None, None)
    return values


def scale_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (b, tokens, heads, head_dim) in e4m3 with each head scaled, and the scales (b, heads) float32."""
    size, num_tokens, heads, head_width = x.shape
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    largest = torch.zeros((size, heads), device=x.device)
    scales = torch.empty_like(largest)
    _largest_kernel[_grid(x)](
        x,
        largest,
        *x.stride()[:3],
        num_tokens,
        head_width,
        _BLOCK_TOKENS,
        triton.next_power_of_2(head_width),
        num_warps=4,
    )
    _cast(x, values, largest, scales)
    return values, scales


def _cast(x: Tensor, values: Tensor, largest: Tensor | None, scales: Tensor | None) -> None:
    _cast_heads_kernel[_grid(x)](
        x,
        values if largest is None else largest,
        values,
        values if scales is None else scales,
        *x.stride()[:3],
        x.shape[1],
        x.shape[3],
        LARGEST,
        SMALLEST,
        largest is not None,
        _BLOCK_TOKENS,
        triton.next_power_of_2(x.shape[3]),
        num_warps=4,
    )


def _grid(x: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[1], _BLOCK_TOKENS), x.shape[2], x.shape[0]
