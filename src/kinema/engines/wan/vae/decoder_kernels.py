# Triton reads the kernels' source, where types would say nothing.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""``decoder_operations.py`` and ``pixels.py: to_planes`` as Triton kernels: one pass over memory each.

Tensors are contiguous, so a picture element is a row of channels and its place the number of that row. Nothing is
compiled for a picture's size, so that pictures of any size compile everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.engines.wan.kernels_ahead import Launch, launch_kernel
from kinema.engines.wan.vae import pixels
from kinema.engines.wan.vae.decoder_operations import Sum, attend, convolve

# Elements that a program holds at a time: 32 for each of its threads, which keeps enough loads in flight.
_PROGRAM_SIZE = 4096
_NUM_WARPS = 4
# 2x2 cells of pixels of a program; each has 12 numbers.
_CELLS = 256
_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in (pixels.RED, pixels.GREEN, pixels.BLUE))
_BLUE_RANGE, _RED_RANGE = tl.constexpr(pixels.BLUE_RANGE), tl.constexpr(pixels.RED_RANGE)


class TritonDecoderOperations:
    """``DecoderOperations`` on CUDA, for a decoder of the type ``dtype``."""

    def __init__(self, dtype: torch.dtype, launch: Launch = launch_kernel) -> None:
        self._attend = attend if dtype == torch.float32 else _attend_by_products
        self._launch = launch

    def convolve(self, window: Tensor, weight: Tensor) -> Tensor:
        return convolve(window, weight)

    def normalise(self, parts: Sum, gain: Tensor, out: Tensor, *, is_kept: bool, has_silu: bool = True) -> None:
        _pass(self._launch, parts.value, parts.bias, parts.residual, gain, out, is_kept=is_kept, has_silu=has_silu)

    def store(self, parts: Sum, out: Tensor) -> None:
        _pass(self._launch, parts.value, parts.bias, parts.residual, None, out, is_kept=False, has_silu=False)

    def enlarge(self, parts: Sum, num_parts: int = 1) -> Tensor:
        frames, height, width, channels = parts.value.shape
        size = (num_parts * frames, 2 * height, 2 * width, channels // num_parts)
        return _enlarge_into(self._launch, parts.value.new_empty(size), parts, num_parts)

    def gather(self, taps: Tensor, bias: Tensor) -> Tensor:
        return _gather_into(self._launch, taps.new_empty((*taps.shape[:3], len(bias)), dtype=torch.float32), taps, bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(query, key, value)

    def to_planes(self, raw: Tensor, patch_size: int) -> Tensor:
        frames, height, width = raw.shape[0], raw.shape[1] * patch_size, raw.shape[2] * patch_size
        planes = raw.new_empty((frames, height * 3 // 2, width), dtype=torch.uint8)
        return _write_planes(self._launch, planes, raw, patch_size)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """No attention kernel takes so wide a head, so the scores (float32) and the weighted mean are matrix products."""
    frames = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = torch.mm(q, k.T, out_dtype=torch.float32)
        weights = torch.softmax(scores.mul_(q.shape[-1] ** -0.5), dim=-1).to(v.dtype)
        frames.append(weights @ v)
    return torch.stack(frames)


def _pass(
    launch: Launch,
    value: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    out: Tensor,
    *,
    is_kept: bool,
    has_silu: bool,
) -> None:
    num_channels = value.shape[-1]
    rows = value.numel() // num_channels
    block_channels = triton.next_power_of_2(num_channels)
    block_rows = max(_PROGRAM_SIZE // block_channels, 1)
    launch(
        _add_up_and_normalise,
        (triton.cdiv(rows, block_rows),),
        _contiguous(value),
        bias,
        None if residual is None else _contiguous(residual),
        gain,
        out,
        rows,
        _row_stride(out),
        num_channels,
        block_channels,
        block_rows,
        has_bias=bias is not None,
        has_residual=residual is not None,
        has_norm=gain is not None,
        is_kept=is_kept,
        has_silu=has_silu,
        num_warps=_NUM_WARPS,
    )


def _enlarge_into(launch: Launch, out: Tensor, parts: Sum, num_parts: int) -> Tensor:
    """Write the enlarged sum to ``out``, which is returned."""
    value, bias, residual = parts.value, parts.bias, parts.residual
    frames, height, width, channels = value.shape
    num_channels = channels // num_parts
    rows = frames * height * width
    block_channels = triton.next_power_of_2(num_channels)
    block_rows = max(_PROGRAM_SIZE // block_channels, 1)
    launch(
        _enlarge,
        (triton.cdiv(rows, block_rows), num_parts),
        _contiguous(value),
        bias,
        None if residual is None else _contiguous(residual),
        out,
        rows,
        height,
        width,
        num_channels,
        num_parts,
        block_channels,
        block_rows,
        has_bias=bias is not None,
        has_residual=residual is not None,
        num_warps=_NUM_WARPS,
    )
    return out


def _gather_into(launch: Launch, out: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Write the sums of the taps to ``out``, which is returned."""
    frames, height, width, num_channels = out.shape
    block_channels = triton.next_power_of_2(num_channels)
    block_pixels = _PROGRAM_SIZE // 4 // block_channels
    launch(
        _gather,
        (triton.cdiv(height * width, block_pixels), frames),
        _contiguous(taps),
        bias,
        out,
        height,
        width,
        taps.shape[-1],
        num_channels,
        block_channels,
        block_pixels,
        num_warps=_NUM_WARPS,
    )
    return out


def _write_planes(launch: Launch, out: Tensor, raw: Tensor, patch_size: int) -> Tensor:
    """Write the planes to ``out``, which is returned. Patches are of one pixel or of four."""
    frames, height, width = out.shape[0], out.shape[1] * 2 // 3, out.shape[2]
    num_cells = (height // 2) * (width // 2)
    launch(
        _to_planes,
        (triton.cdiv(num_cells, _CELLS), frames),
        _contiguous(raw),
        out,
        num_cells,
        height,
        width,
        raw.shape[-1],
        patch_size,
        _CELLS,
        num_warps=_NUM_WARPS,
    )
    return out


def _row_stride(x: Tensor) -> int:
    """The distance of two rows of channels, which may lie in longer rows."""
    stride = x.stride(2)
    assert x.stride() == (x.shape[1] * x.shape[2] * stride, x.shape[2] * stride, stride, 1), x.stride()
    return stride


def _contiguous(x: Tensor) -> Tensor:
    """The same tensor. A kernel would read one with other strides at wrong places."""
    assert x.is_contiguous(), f"a kernel got strides {x.stride()} for {tuple(x.shape)}"
    return x


@triton.jit
def _summed(value, bias, residual, at, channel, mask, has_bias: tl.constexpr, has_residual: tl.constexpr):
    total = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        total += tl.load(bias + channel, mask=mask, other=0.0)
    if has_residual:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rows"])
def _add_up_and_normalise(
    value,
    bias,
    residual,
    gain,
    out,
    rows,
    out_stride: tl.constexpr,
    num_channels: tl.constexpr,
    block_channels: tl.constexpr,
    block_rows: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    has_norm: tl.constexpr,
    is_kept: tl.constexpr,
    has_silu: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    channel = tl.arange(0, block_channels)[None, :]
    mask = (row < rows) & (channel < num_channels)
    at = row * num_channels + channel
    x = _summed(value, bias, residual, at, channel, mask, has_bias, has_residual)
    if is_kept:
        tl.store(value + at, x.to(value.dtype.element_ty), mask=mask)
    if has_norm:
        norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
        x = x / norm[:, None] * tl.load(gain + channel, mask=channel < num_channels, other=0.0)
    if has_silu:
        x = x * tl.sigmoid(x)
    tl.store(out + row * out_stride + channel, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _enlarge(
    value,
    bias,
    residual,
    out,
    rows,
    height,
    width,
    num_channels: tl.constexpr,
    num_parts: tl.constexpr,
    block_channels: tl.constexpr,
    block_rows: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    part = tl.program_id(1)
    channel = tl.arange(0, block_channels)[None, :]
    mask = (row < rows) & (channel < num_channels)
    from_channel = part * num_channels + channel
    at = row * (num_channels * num_parts) + from_channel
    x = _summed(value, bias, residual, at, from_channel, mask, has_bias, has_residual).to(out.dtype.element_ty)
    frame = row // (height * width) * num_parts + part
    y = row // width % height
    corner = ((frame * 2 * height + 2 * y) * 2 * width + 2 * (row % width)) * num_channels + channel
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(out + corner + (down * 2 * width + right) * num_channels, x, mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def _gather(
    taps,
    bias,
    out,
    height,
    width,
    tap_stride: tl.constexpr,
    num_channels: tl.constexpr,
    block_channels: tl.constexpr,
    block_pixels: tl.constexpr,
):
    pixel = tl.program_id(0) * block_pixels + tl.arange(0, block_pixels)[:, None]
    first = tl.program_id(1).to(tl.int64) * height * width
    channel = tl.arange(0, block_channels)[None, :]
    is_there = (pixel < height * width) & (channel < num_channels)
    y, x = pixel // width, pixel % width
    total = tl.zeros((block_pixels, block_channels), tl.float32) + tl.load(
        bias + channel, mask=channel < num_channels, other=0.0
    )
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            row, column = y + down - 1, x + right - 1
            mask = is_there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = (first + row * width + column) * tap_stride + (3 * down + right) * num_channels + channel
            total += tl.load(taps + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (first + pixel) * num_channels + channel, total, mask=is_there)


@triton.jit
def _colour(raw, at, mask):
    x = tl.load(raw + at, mask=mask, other=0.0)
    return tl.minimum(tl.maximum(x * 0.5 + 0.5, 0.0), 1.0)


@triton.jit
def _level(x):
    return tl.floor(x + 0.5).to(tl.uint8)


@triton.jit(do_not_specialize=["num_cells", "height", "width"])
def _to_planes(
    raw,
    out,
    num_cells,
    height,
    width,
    num_channels: tl.constexpr,
    patch_size: tl.constexpr,
    block: tl.constexpr,
):
    cell = tl.program_id(0) * block + tl.arange(0, block)
    frame = tl.program_id(1).to(tl.int64)
    mask = cell < num_cells
    row, column = cell // (width // 2), cell % (width // 2)
    plane = out + frame * (6 * num_cells)
    red_sum = tl.zeros((block,), tl.float32)
    green_sum = tl.zeros((block,), tl.float32)
    blue_sum = tl.zeros((block,), tl.float32)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            y, x = 2 * row + down, 2 * column + right
            if patch_size == 1:
                at = ((frame * height + y) * width + x) * num_channels
                red, green, blue = 0, 1, 2
            else:
                at = (frame * num_cells + cell) * num_channels
                red, green, blue = 2 * right + down, 4 + 2 * right + down, 8 + 2 * right + down
            r = _colour(raw, at + red, mask)
            g = _colour(raw, at + green, mask)
            b = _colour(raw, at + blue, mask)
            luma = _RED * r + _GREEN * g + _BLUE * b
            tl.store(plane + y * width + x, _level(16.0 + 219.0 * luma), mask=mask)
            red_sum += r
            green_sum += g
            blue_sum += b
    red_mean, green_mean, blue_mean = red_sum * 0.25, green_sum * 0.25, blue_sum * 0.25
    mean_luma = _RED * red_mean + _GREEN * green_mean + _BLUE * blue_mean
    colours = plane + 4 * num_cells + cell
    tl.store(colours, _level(128.0 + 224.0 * (blue_mean - mean_luma) / _BLUE_RANGE), mask=mask)
    tl.store(colours + num_cells, _level(128.0 + 224.0 * (red_mean - mean_luma) / _RED_RANGE), mask=mask)
