"""Latent frames in, pixels out, one at a time: what diffusers' ``WanDecoder3d`` computes, as a stream.

A causal convolution needs the two frames before those that it gets. Each has one buffer, in which these two stand
before the frames of the moment, written there by whatever step comes before it; so nothing is joined, padded or copied
into another layout. A buffer of zeros is a film's beginning. Everything has a fixed place in memory, which is what a
recorded graph of the kernels needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.vae.decoder_operations import Sum, attend, convolve, enlarge, gather, normalise, spread, store
from kinema.engines.wan.vae.pixels import to_planes
from kinema.engines.wan.vae.weights import Attention, Convolution, DecoderWeights, Level, Residual

# Frames before its own that a convolution of three taps sees.
_NUM_BEFORE = 2


@dataclass(frozen=True, eq=False)
class Decoded:
    """One latent frame's pictures, there until the next step.

    ``raw`` (t, h, w, c) float32 are the decoder's own numbers, colours in [-1, 1] or a little over; ``planes``
    (t, h * 3/2, w) uint8 what an encoder takes. ``total`` is the sum of ``raw``: not finite, then a type was too small.
    """

    raw: Tensor
    planes: Tensor
    total: Tensor


class Stream:
    """One film at a time of latents with ``height`` rows and ``width`` columns; ``begin`` comes before each."""

    def __init__(self, weights: DecoderWeights, height: int, width: int) -> None:
        self._weights = weights
        self._size = (height, width)
        self._buffers: dict[Convolution, Tensor] = {}
        self._is_first = True

    def new_latent(self) -> Tensor:
        """(h, w, c) for ``step``, without content."""
        weight = self._weights.first.weight
        return weight.new_zeros((*self._size, weight.shape[1]))

    def begin(self) -> None:
        """Forget the film before."""
        self._is_first = True
        for buffer in self._buffers.values():
            buffer[:_NUM_BEFORE].zero_()

    def step(self, latent: Tensor) -> Decoded:
        """The next latent frame (h, w, c), scaled and through the first matrix, in the decoder's type."""
        decoded = self.compute(latent, is_first=self._is_first)
        self._is_first = False
        return decoded

    def compute(self, latent: Tensor, *, is_first: bool) -> Decoded:
        """``step`` for a film's first frame, which gives one picture, or for one of the others, which give several."""
        weights = self._weights
        frames = 1
        self._buffer(weights.first, 1, *self._size)[_NUM_BEFORE:].copy_(latent[None])
        x = Sum(self._convolve(weights.first, 1), weights.first.bias)
        head, attention, tail = weights.middle
        x = self._residual(tail, self._attention(attention, self._residual(head, x, frames)), frames)
        for level in weights.levels:
            x, frames = self._level(level, x, frames, is_first=is_first)
        buffer = self._frames(weights.last, frames, x)
        normalise(x, weights.norm, buffer, is_kept=False)
        raw = gather(self._convolve(weights.last, len(buffer)), weights.last.bias)
        return Decoded(raw, to_planes(raw, weights.patch_size), raw.sum())

    def _level(self, level: Level, x: Sum, frames: int, *, is_first: bool) -> tuple[Sum, int]:
        """``frames`` are those of a later step; the first has one."""
        around = x.value
        for residual in level.residuals:
            x = self._residual(residual, x, frames)
        if level.in_space is None:
            return x, frames
        in_time = 2 if level.in_time is not None else 1
        if level.in_time is not None and not is_first:
            store(x, self._frames(level.in_time, frames, x))
            x = Sum(self._convolve(level.in_time, len(x.value)), level.in_time.bias)
            large = enlarge(x, in_time)
        else:
            large = enlarge(x)
        value = _convolve_pictures(large, level.in_space)
        left_out = in_time - 1 if is_first else 0
        shortcut = None if level.repeat is None else spread(around, level.repeat, value.shape[-1], left_out)
        return Sum(value, level.in_space.bias, shortcut), in_time * frames

    def _residual(self, residual: Residual, x: Sum, frames: int) -> Sum:
        normalise(x, residual.norm1, self._frames(residual.conv1, frames, x), is_kept=True)
        around = x.value if residual.shortcut is None else _multiply(x.value, residual.shortcut)
        inner = Sum(self._convolve(residual.conv1, len(x.value)), residual.conv1.bias)
        normalise(inner, residual.norm2, self._frames(residual.conv2, frames, inner), is_kept=False)
        return Sum(self._convolve(residual.conv2, len(x.value)), residual.conv2.bias, around)

    def _attention(self, attention: Attention, x: Sum) -> Sum:
        normed = torch.empty_like(x.value)
        normalise(x, attention.norm, normed, is_kept=True, has_silu=False)
        query, key, value = _multiply(normed.flatten(1, 2), attention.to_qkv).chunk(3, dim=-1)
        seen = attend(query, key, value).view_as(normed)
        return Sum(_multiply(seen, attention.project), None, x.value)

    def _frames(self, convolution: Convolution, frames: int, x: Sum) -> Tensor:
        """Where to write the frames ``x`` for this convolution; it gets at most ``frames`` at a time."""
        count, height, width, channels = x.value.shape
        buffer = self._buffer(convolution, frames, height, width)
        return buffer[_NUM_BEFORE : _NUM_BEFORE + count, ..., :channels]

    def _buffer(self, convolution: Convolution, frames: int, height: int, width: int) -> Tensor:
        if convolution not in self._buffers:
            size = (_NUM_BEFORE + frames, height, width, convolution.weight.shape[1])
            self._buffers[convolution] = convolution.weight.new_zeros(size)
        return self._buffers[convolution]

    def _convolve(self, convolution: Convolution, count: int) -> Tensor:
        """Of the ``count`` frames in its buffer, without the bias; the last two stay for the next step."""
        buffer = self._buffers[convolution]
        window = buffer[: _NUM_BEFORE + count].permute(3, 0, 1, 2)[None]
        value = convolve(window, convolution.weight)
        _keep_last(buffer, count)
        return value[0].permute(1, 2, 3, 0).contiguous()


def _keep_last(buffer: Tensor, count: int) -> None:
    """Move the last two of the frames, which are two older ones and ``count``, to the front."""
    if count >= _NUM_BEFORE:
        buffer[:_NUM_BEFORE].copy_(buffer[count : count + _NUM_BEFORE])
        return
    for place in range(_NUM_BEFORE):
        buffer[place].copy_(buffer[place + count])


def _convolve_pictures(pictures: Tensor, convolution: Convolution) -> Tensor:
    """Each frame by itself, without the bias."""
    value = functional.conv2d(pictures.permute(0, 3, 1, 2), convolution.weight, padding=1)
    return value.permute(0, 2, 3, 1).contiguous()


def _multiply(x: Tensor, matrix: Convolution) -> Tensor:
    return functional.linear(x, matrix.weight, matrix.bias)
