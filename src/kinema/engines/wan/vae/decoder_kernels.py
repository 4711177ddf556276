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
from kinema.engines.wan.vae.decoder_operations import Pairs, Sum, attend, convolve

# Elements that a program holds at a time: 32 for each of its threads, which keeps enough loads in flight.
_PROGRAM_SIZE = 4096
# The same for the kernel that holds four frames of each element.
_PAIRS_PROGRAM_SIZE = 1024
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

    def normalise(self, parts: Sum, gain: Tensor, out: Tensor, *, kept: Tensor | None, has_silu: bool = True) -> None:
        _pass(self._launch, parts, gain, out, kept, has_silu=has_silu)

    def normalise_pairs(self, parts: Sum, gain: Tensor, before: Tensor, out: Tensor, *, kept: Tensor | None) -> None:
        _pass_in_pairs(self._launch, parts, gain, before, out, kept)

    def store(self, parts: Sum, out: Tensor) -> None:
        _pass(self._launch, parts, None, out, None, has_silu=False)

    def enlarge(self, parts: Sum, num_parts: int = 1) -> Tensor:
        frames, height, width, channels = parts.value.shape
        size = (num_parts * frames, 2 * height, 2 * width, channels // num_parts)
        out = _products(parts.value)[0].new_empty(size)
        return _enlarge_into(self._launch, out, parts, num_parts)

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


def _pass(launch: Launch, parts: Sum, gain: Tensor | None, out: Tensor, kept: Tensor | None, *, has_silu: bool) -> None:
    frames, height, width, num_channels = parts.value.shape
    rows = frames * height * width
    block_channels = triton.next_power_of_2(num_channels)
    block_rows = max(_PROGRAM_SIZE // block_channels, 1)
    launch(
        _add_up_and_normalise,
        (triton.cdiv(rows, block_rows),),
        *_products(parts.value),
        parts.bias,
        None if parts.residual is None else _contiguous(parts.residual),
        gain,
        out,
        None if kept is None else _contiguous(kept),
        rows,
        height * width,
        _row_stride(out),
        num_channels,
        block_channels,
        block_rows,
        in_pairs=isinstance(parts.value, Pairs),
        has_bias=parts.bias is not None,
        has_residual=parts.residual is not None,
        has_norm=gain is not None,
        is_kept=kept is not None,
        has_silu=has_silu,
        num_warps=_NUM_WARPS,
    )


def _pass_in_pairs(launch: Launch, parts: Sum, gain: Tensor, before: Tensor, out: Tensor, kept: Tensor | None) -> None:
    frames, height, width, num_channels = parts.value.shape
    block_channels = triton.next_power_of_2(num_channels)
    block_pixels = max(_PAIRS_PROGRAM_SIZE // block_channels, 1)
    launch(
        _add_up_and_normalise_pairs,
        (triton.cdiv(height * width, block_pixels),),
        *_products(parts.value),
        parts.bias,
        None if parts.residual is None else _contiguous(parts.residual),
        gain,
        before,
        _contiguous(out),
        None if kept is None else _contiguous(kept),
        height * width,
        _row_stride(before),
        num_channels,
        frames // 2,
        block_channels,
        block_pixels,
        in_pairs=isinstance(parts.value, Pairs),
        has_bias=parts.bias is not None,
        has_residual=parts.residual is not None,
        is_kept=kept is not None,
        num_warps=_NUM_WARPS,
    )


def _products(value: Tensor | Pairs) -> tuple[Tensor, ...]:
    """The four products of pairs; frames as they are stand in for all four."""
    products = (value,) * 4 if isinstance(value, Tensor) else value.products
    return tuple(_contiguous(product) for product in products)


def _enlarge_into(launch: Launch, out: Tensor, parts: Sum, num_parts: int) -> Tensor:
    """Write the enlarged sum to ``out``, which is returned."""
    bias, residual = parts.bias, parts.residual
    frames, height, width, channels = parts.value.shape
    num_channels = channels // num_parts
    rows = frames * height * width
    block_channels = triton.next_power_of_2(num_channels)
    block_rows = max(_PROGRAM_SIZE // block_channels, 1)
    launch(
        _enlarge,
        (triton.cdiv(rows, block_rows), num_parts),
        *_products(parts.value),
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
        in_pairs=isinstance(parts.value, Pairs),
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
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _summed(
    m0,
    m1,
    m2,
    m3,
    bias,
    residual,
    row,
    channel,
    mask,
    num_pixels,
    num_channels: tl.constexpr,
    in_pairs: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
):
    at = row * num_channels + channel
    if in_pairs:
        frame, pixel = row // num_pixels, row % num_pixels
        is_second = frame % 2 == 1
        from_product = (frame // 2 * num_pixels + pixel) * num_channels + channel
        first = _load(m0, from_product, mask & (frame % 2 == 0))
        last = _load(m3, from_product, mask & is_second)
        middle = _load(m2, from_product, mask)
        total = _load(m1, from_product, mask) + tl.where(is_second, -middle - last, middle + first)
    else:
        total = _load(m0, at, mask)
    if has_bias:
        total += _load(bias, channel, mask)
    if has_residual:
        total += _load(residual, at, mask)
    return total


@triton.jit
def _normalised(x, gain, channel, num_channels: tl.constexpr):
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    return x / norm[:, None] * tl.load(gain + channel, mask=channel < num_channels, other=0.0)


@triton.jit(do_not_specialize=["rows", "num_pixels"])
def _add_up_and_normalise(
    m0,
    m1,
    m2,
    m3,
    bias,
    residual,
    gain,
    out,
    kept,
    rows,
    num_pixels,
    out_stride: tl.constexpr,
    num_channels: tl.constexpr,
    block_channels: tl.constexpr,
    block_rows: tl.constexpr,
    in_pairs: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    has_norm: tl.constexpr,
    is_kept: tl.constexpr,
    has_silu: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    channel = tl.arange(0, block_channels)[None, :]
    mask = (row < rows) & (channel < num_channels)
    x = _summed(
        m0, m1, m2, m3, bias, residual, row, channel, mask, num_pixels, num_channels, in_pairs, has_bias, has_residual
    )
    if is_kept:
        tl.store(kept + row * num_channels + channel, x.to(kept.dtype.element_ty), mask=mask)
    if has_norm:
        x = _normalised(x, gain, channel, num_channels)
    if has_silu:
        x = x * tl.sigmoid(x)
    tl.store(out + row * out_stride + channel, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normalised_frame(
    x,
    bias,
    residual,
    gain,
    kept,
    at,
    channel,
    mask,
    num_channels: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    is_kept: tl.constexpr,
    kind: tl.constexpr,
):
    if has_bias:
        x += _load(bias, channel, mask)
    if has_residual:
        x += _load(residual, at, mask)
    if is_kept:
        tl.store(kept + at, x.to(kind), mask=mask)
    x = _normalised(x, gain, channel, num_channels)
    return (x * tl.sigmoid(x)).to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["num_pixels"])
def _add_up_and_normalise_pairs(
    m0,
    m1,
    m2,
    m3,
    bias,
    residual,
    gain,
    before,
    out,
    kept,
    num_pixels,
    before_stride: tl.constexpr,
    num_channels: tl.constexpr,
    num_pairs: tl.constexpr,
    block_channels: tl.constexpr,
    block_pixels: tl.constexpr,
    in_pairs: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    is_kept: tl.constexpr,
):
    """A program goes through all frames of its pixels, and has the last two of them at hand."""
    kind: tl.constexpr = out.dtype.element_ty
    pixel = tl.program_id(0).to(tl.int64) * block_pixels + tl.arange(0, block_pixels)[:, None]
    channel = tl.arange(0, block_channels)[None, :]
    mask = (pixel < num_pixels) & (channel < num_channels)
    at = pixel * num_channels + channel
    frame_size = num_pixels.to(tl.int64) * num_channels
    first_before = before + pixel * before_stride + channel
    second_before = first_before + num_pixels.to(tl.int64) * before_stride
    x0, x1 = _load(first_before, 0, mask), _load(second_before, 0, mask)
    for pair in tl.static_range(num_pairs):
        if in_pairs:
            place = at + pair * frame_size
            middle, other = _load(m1, place, mask), _load(m2, place, mask)
            x2 = _load(m0, place, mask) + middle + other
            x3 = middle - other - _load(m3, place, mask)
        else:
            x2 = _load(m0, at + 2 * pair * frame_size, mask)
            x3 = _load(m0, at + (2 * pair + 1) * frame_size, mask)
        for_x2, for_x3 = at + 2 * pair * frame_size, at + (2 * pair + 1) * frame_size
        x2 = _normalised_frame(
            x2, bias, residual, gain, kept, for_x2, channel, mask, num_channels, has_bias, has_residual, is_kept, kind
        )
        x3 = _normalised_frame(
            x3, bias, residual, gain, kept, for_x3, channel, mask, num_channels, has_bias, has_residual, is_kept, kind
        )
        to = out + at + pair * frame_size
        tl.store(to, (x0 - x2).to(kind), mask=mask)
        tl.store(to + num_pairs * frame_size, (x1 + x2).to(kind), mask=mask)
        tl.store(to + 2 * num_pairs * frame_size, (x2 - x1).to(kind), mask=mask)
        tl.store(to + 3 * num_pairs * frame_size, (x1 - x3).to(kind), mask=mask)
        x0, x1 = x2, x3
    tl.store(first_before, x0.to(kind), mask=mask)
    tl.store(second_before, x1.to(kind), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _enlarge(
    m0,
    m1,
    m2,
    m3,
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
    in_pairs: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    part = tl.program_id(1)
    channel = tl.arange(0, block_channels)[None, :]
    mask = (row < rows) & (channel < num_channels)
    x = _summed(
        m0,
        m1,
        m2,
        m3,
        bias,
        residual,
        row,
        part * num_channels + channel,
        mask,
        height * width,
        num_channels * num_parts,
        in_pairs,
        has_bias,
        has_residual,
    ).to(out.dtype.element_ty)
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
