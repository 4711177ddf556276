"""The operations of the decoder, in torch; ``decoder_kernels.py`` does most of them on CUDA, by one kernel each.

Letters of the axes: t frames, h rows, w columns, c channels. Sums, norms and SiLU are float32; only what is stored is
rounded to the stream's type.

A convolution of three taps in time may compute two frames together, by Winograd's F(2, 3) in time (arXiv 1509.09308):
four convolutions of pictures in place of six. From the frames x0 to x3 and the taps g0 to g2 it makes

    m0 = (x0 - x2) g0,    m1 = (x1 + x2) (g0 + g1 + g2) / 2,    m2 = (x2 - x1) (g0 - g1 + g2) / 2,    m3 = (x1 - x3) g2

and m0 + m1 + m2 and m1 - m2 - m3 are what the taps make of x0 to x2 and of x1 to x3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.vae.pixels import to_planes

# The smallest norm that is divided by, as in torch's ``normalize``, of which diffusers' norm is made.
_LEAST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class Pairs:
    """Frames of a convolution that computes two together: the products m0 to m3, (t / 2, h, w, c) each."""

    products: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames, (t, h, w, c)."""
        pairs, height, width, channels = self.products[0].shape
        return 2 * pairs, height, width, channels

    def add_up(self) -> Tensor:
        """The frames (t, h, w, c) in float32."""
        m0, m1, m2, m3 = (product.float() for product in self.products)
        return torch.stack([m0 + m1 + m2, m1 - m2 - m3], dim=1).flatten(0, 1)


@dataclass(eq=False)
class Sum:
    """Summands (t, h, w, c) that are not added up yet: a convolution's result, its bias (c,), and what goes around it.

    The operation that reads them adds them up, so that a bias and a residual cost no pass over memory of their own.
    """

    value: Tensor | Pairs
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type that is stored."""
        return self.value.dtype if isinstance(self.value, Tensor) else self.value.products[0].dtype

    def settle(self, total: Tensor | None) -> None:
        """Let go of the summands, whose memory is free then, and have ``total`` in their place, which is the sum. None
        is for a sum that nobody reads again."""
        del self.value, self.bias, self.residual
        if total is not None:
            self.value, self.bias, self.residual = total, None, None


class DecoderOperations(Protocol):
    """The operations of one decoder, for its device and its type."""

    def convolve(self, window: Tensor, weight: Tensor) -> Tensor:
        """Convolve (1, i, 2 + t, h, w) by (o, i, 3, kh, kw) to (1, o, t, h, w), without a bias; borders are zeros."""

    def normalise(self, parts: Sum, gain: Tensor, out: Tensor, *, kept: Tensor | None, has_silu: bool = True) -> None:
        """Write the sum's RMS norm over the channels, times ``gain`` and then through SiLU, to ``out`` (t, h, w, c).

        The sum itself is written to ``kept``, which may be ``parts.value``.
        """

    def normalise_pairs(self, parts: Sum, gain: Tensor, before: Tensor, out: Tensor, *, kept: Tensor | None) -> None:
        """``normalise`` for a convolution that computes two frames together, with an even number of frames.

        Writes the four differences and sums of frames that its products are made from to ``out`` (4, t / 2, h, w, c).
        ``before`` (2, h, w, c) are the two frames before, which the last two replace.
        """

    def store(self, parts: Sum, out: Tensor) -> None:
        """Write the sum to ``out`` (t, h, w, c)."""

    def enlarge(self, parts: Sum, num_parts: int = 1) -> Tensor:
        """Twice the rows and columns, each pixel four times: (t, h, w, n * c) to (n * t, 2 * h, 2 * w, c).

        The n = ``num_parts`` parts of the channels become frames that follow each other.
        """

    def gather(self, taps: Tensor, bias: Tensor) -> Tensor:
        """Finish a convolution in space of nine taps, each computed where it was read, (t, h, w, 9 * c or more).

        Adds the taps up at the pixels that they are for: (t, h, w, c) float32.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one head over the pixels of each frame, (t, n, c) each."""

    def to_planes(self, raw: Tensor, patch_size: int) -> Tensor:
        """What ``pixels.to_planes`` makes of the decoder's numbers."""


class TorchDecoderOperations:
    """``DecoderOperations`` in torch, for any device but CUDA."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        # For float32 on a CPU torch's own choice for a batch of one is often a plain loop, and oneDNN several times as
        # fast.
        self._is_by_onednn = has_onednn and device.type == "cpu" and dtype == torch.float32

    def convolve(self, window: Tensor, weight: Tensor) -> Tensor:
        if not self._is_by_onednn:
            return convolve(window, weight)
        border, ones = weight.shape[-1] // 2, (1, 1, 1)
        value: Tensor = torch.ops.aten.mkldnn_convolution(window, weight, None, (0, border, border), ones, ones, 1)
        return value

    def normalise(self, parts: Sum, gain: Tensor, out: Tensor, *, kept: Tensor | None, has_silu: bool = True) -> None:
        total = add_up(parts)
        if kept is not None:
            kept.copy_(total)
        normed = functional.normalize(total, dim=-1, eps=_LEAST_NORM) * gain
        out.copy_(functional.silu(normed) if has_silu else normed)

    def normalise_pairs(self, parts: Sum, gain: Tensor, before: Tensor, out: Tensor, *, kept: Tensor | None) -> None:
        normed = before.new_empty(parts.value.shape)
        self.normalise(parts, gain, normed, kept=kept)
        frames = torch.cat([before, normed]).float()
        x0, x1, x2, x3 = frames[:-2:2], frames[1:-2:2], frames[2::2], frames[3::2]
        for place, value in zip(out, (x0 - x2, x1 + x2, x2 - x1, x1 - x3), strict=True):
            place.copy_(value)
        before.copy_(frames[-2:])

    def store(self, parts: Sum, out: Tensor) -> None:
        out.copy_(add_up(parts))

    def enlarge(self, parts: Sum, num_parts: int = 1) -> Tensor:
        frames, height, width, channels = parts.value.shape
        size = (num_parts * frames, 2 * height, 2 * width, channels // num_parts)
        total = add_up(parts).to(parts.dtype).view(frames, height, width, num_parts, -1)
        in_time = total.permute(0, 3, 1, 2, 4).reshape(num_parts * frames, height, 1, width, 1, size[3])
        return in_time.expand(-1, -1, 2, -1, 2, -1).reshape(size)

    def gather(self, taps: Tensor, bias: Tensor) -> Tensor:
        frames, height, width, _ = taps.shape
        num_channels = len(bias)
        padded = functional.pad(taps.float(), (0, 0, 1, 1, 1, 1))
        total = bias.expand(frames, height, width, -1)
        for tap in range(9):
            down, right = divmod(tap, 3)
            channels = slice(tap * num_channels, (tap + 1) * num_channels)
            total = total + padded[:, down : down + height, right : right + width, channels]
        return total

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value)

    def to_planes(self, raw: Tensor, patch_size: int) -> Tensor:
        return to_planes(raw, patch_size)


def convolve(window: Tensor, weight: Tensor) -> Tensor:
    """``DecoderOperations.convolve`` by whatever torch chooses."""
    border = weight.shape[-1] // 2
    return functional.conv3d(window, weight, padding=(0, border, border))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``DecoderOperations.attend`` by whatever torch chooses."""
    return functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def repeat_channels(value: Tensor, repeat: int, num_channels: int, first: int) -> Tensor:
    """Repeat each channel ``repeat`` times, over the pixels and frames that one becomes; drop the ``first`` frames.

    (t, h, w, i) becomes (n * t - first, 2 * h, 2 * w, o), as in diffusers' ``DupUp3D``: 4 * n * o = i * repeat.
    """
    frames, height, width, channels = value.shape
    in_time = channels * repeat // (4 * num_channels)
    places = value.view(frames, height, width, channels, 1).expand(-1, -1, -1, -1, repeat)
    places = places.reshape(frames, height, width, num_channels, in_time, 2, 2)
    laid = places.permute(0, 4, 1, 5, 2, 6, 3).reshape(in_time * frames, 2 * height, 2 * width, num_channels)
    return laid[first:]


def add_up(parts: Sum) -> Tensor:
    """The sum in float32."""
    total = parts.value.float() if isinstance(parts.value, Tensor) else parts.value.add_up()
    if parts.bias is not None:
        total = total + parts.bias
    return total if parts.residual is None else total + parts.residual.float()
