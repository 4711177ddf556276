"""The decoder's steps between its convolutions: each as torch says it, and on a GPU one kernel that does the same.

Axis letters: t frames, h rows, w columns, c channels. What is rounded to the stream's type is only what is stored:
sums, norms and SiLU are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# As torch's ``normalize`` has it, which diffusers' norm is made of.
_LEAST_NORM = 1e-12
_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Sum:
    """Something not yet added up, (t, h, w, c): what a convolution gave, its bias (c,) and what goes around it.

    Whoever reads it next adds it up, so that a bias and a residual cost no pass of their own.
    """

    value: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


def convolve(window: Tensor, weight: Tensor) -> Tensor:
    """(1, i, 2 + t, h, w) by (o, i, 3, kh, kw) to (1, o, t, h, w), without a bias; the borders in space are zeros.

    Of float32 on a CPU torch's own choice for a batch of one is often a plain loop, and oneDNN several times as fast.
    """
    border = weight.shape[-1] // 2
    if window.is_cuda or window.dtype != torch.float32 or not _HAS_ONEDNN:
        return functional.conv3d(window, weight, padding=(0, border, border))
    ones = (1, 1, 1)
    value: Tensor = torch.ops.aten.mkldnn_convolution(window, weight, None, (0, border, border), ones, ones, 1)
    return value


def add_up(parts: Sum) -> Tensor:
    """float32."""
    total = parts.value.float()
    if parts.bias is not None:
        total = total + parts.bias
    return total if parts.residual is None else total + parts.residual.float()


def normalise(parts: Sum, gain: Tensor, out: Tensor, *, is_kept: bool, has_silu: bool = True) -> None:
    """RMS norm over the channels times ``gain``, then SiLU, into ``out``; if ``is_kept`` the sum itself stays in
    ``parts.value``."""
    if out.is_cuda:
        from kinema.engines.wan.vae import decoder_kernels as kernels  # noqa: PLC0415 - triton is there with CUDA only

        kernels.normalise(parts.value, parts.bias, parts.residual, gain, out, is_kept=is_kept, has_silu=has_silu)
        return
    total = add_up(parts)
    if is_kept:
        parts.value.copy_(total)
    normed = functional.normalize(total, dim=-1, eps=_LEAST_NORM) * gain
    out.copy_(functional.silu(normed) if has_silu else normed)


def store(parts: Sum, out: Tensor) -> None:
    """The sum into ``out`` (t, h, w, c)."""
    if out.is_cuda:
        from kinema.engines.wan.vae import decoder_kernels as kernels  # noqa: PLC0415

        kernels.store(parts.value, parts.bias, parts.residual, out)
        return
    out.copy_(add_up(parts))


def enlarge(parts: Sum, num_parts: int = 1) -> Tensor:
    """Twice the rows and columns, each pixel four times: (t, h, w, n * c) to (n * t, 2 * h, 2 * w, c).

    With ``num_parts`` the n parts of the channels are frames that follow each other.
    """
    value = parts.value
    frames, height, width, channels = value.shape
    size = (num_parts * frames, 2 * height, 2 * width, channels // num_parts)
    if value.is_cuda:
        from kinema.engines.wan.vae import decoder_kernels as kernels  # noqa: PLC0415

        return kernels.enlarge(value, parts.bias, parts.residual, value.new_empty(size), num_parts)
    total = add_up(parts).to(value.dtype).view(frames, height, width, num_parts, -1)
    in_time = total.permute(0, 3, 1, 2, 4).reshape(num_parts * frames, height, 1, width, 1, size[3])
    return in_time.expand(-1, -1, 2, -1, 2, -1).reshape(size)


def gather(taps: Tensor, bias: Tensor) -> Tensor:
    """The nine taps of a convolution in space (t, h, w, 9 * c or more), each where it was computed, added up at the
    pixels that they are for: (t, h, w, c) float32."""
    frames, height, width, _ = taps.shape
    num_channels = len(bias)
    if taps.is_cuda:
        from kinema.engines.wan.vae import decoder_kernels as kernels  # noqa: PLC0415

        size = (frames, height, width, num_channels)
        return kernels.gather(taps, bias, taps.new_empty(size, dtype=torch.float32))
    padded = functional.pad(taps.float(), (0, 0, 1, 1, 1, 1))
    total = bias.expand(frames, height, width, -1)
    for tap in range(9):
        down, right = divmod(tap, 3)
        part = padded[:, down : down + height, right : right + width, tap * num_channels : (tap + 1) * num_channels]
        total = total + part
    return total


def spread(value: Tensor, repeat: int, num_channels: int, first: int) -> Tensor:
    """Each channel ``repeat`` times, laid out over the pixels and frames that one becomes, without ``first`` frames.

    (t, h, w, i) to (n * t - first, 2 * h, 2 * w, o), as diffusers' ``DupUp3D``: 4 * n * o = i * repeat.
    """
    frames, height, width, channels = value.shape
    in_time = channels * repeat // (4 * num_channels)
    places = value.view(frames, height, width, channels, 1).expand(-1, -1, -1, -1, repeat)
    places = places.reshape(frames, height, width, num_channels, in_time, 2, 2)
    laid = places.permute(0, 4, 1, 5, 2, 6, 3).reshape(in_time * frames, 2 * height, 2 * width, num_channels)
    return laid[first:]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head over the pixels of each frame, (t, n, c) each.

    No attention kernel takes so wide a head, so a GPU computes the scores (float32) and the weighted mean as two
    matrix products.
    """
    if not query.is_cuda or query.dtype == torch.float32:
        return functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    frames = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = torch.mm(q, k.T, out_dtype=torch.float32)
        weights = torch.softmax(scores.mul_(q.shape[-1] ** -0.5), dim=-1).to(v.dtype)
        frames.append(weights @ v)
    return torch.stack(frames)
