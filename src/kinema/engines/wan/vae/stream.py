"""Latent frames in, pixels out, one at a time: what diffusers' ``WanDecoder3d`` computes, as a stream.

A causal convolution needs the two frames before those that it gets. Each convolution has one buffer, in which these two
stand before the current frames; the operation before it writes them there, so nothing is joined, padded or copied into
another layout. A convolution that computes two frames together keeps the two before them alone, and what it reads is
made for it and gone afterwards. A film begins with zeros. What is kept has a fixed place in memory, as a CUDA graph
needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.vae.decoder_operations import (
    DecoderOperations,
    Pairs,
    Sum,
    add_up,
    repeat_channels,
)
from kinema.engines.wan.vae.weights import AttentionBlock, Convolution, DecoderWeights, ResidualBlock, UpBlock

# So many earlier frames a convolution of three taps sees.
_NUM_BEFORE = 2


@dataclass(frozen=True, eq=False)
class Decoded:
    """The pictures of one latent frame, which the next step overwrites.

    ``raw`` (t, h, w, c) float32 are the decoder's own numbers, colours in [-1, 1] or a little over; ``planes``
    (t, h * 3/2, w) uint8 are what an encoder takes. ``total`` is the sum of ``raw``; where it is not finite, the
    decoder's type was too small.
    """

    raw: Tensor
    planes: Tensor
    total: Tensor


class Stream:
    """Decodes latents with ``height`` rows and ``width`` columns, one film at a time; call ``begin`` before each."""

    def __init__(self, weights: DecoderWeights, operations: DecoderOperations, height: int, width: int) -> None:
        self._weights = weights
        self._operations = operations
        self._size = (height, width)
        self._buffers: dict[Convolution, Tensor] = {}
        # The two frames before, for each convolution that computes two together.
        self._before: dict[Convolution, Tensor] = {}
        self._is_first = True

    def new_latent(self) -> Tensor:
        """A latent frame (h, w, c) of zeros, in the shape that ``step`` takes."""
        weight = self._weights.first.weight
        return weight.new_zeros((*self._size, weight.shape[1]))

    def begin(self) -> None:
        """Forget the film before."""
        self._is_first = True
        for buffer in (*self._buffers.values(), *self._before.values()):
            buffer[:_NUM_BEFORE].zero_()

    def step(self, latent: Tensor) -> Decoded:
        """Decode the next latent frame (h, w, c), scaled and through the first matrix, in the decoder's type."""
        decoded = self.compute(latent, is_first=self._is_first)
        self._is_first = False
        return decoded

    def compute(self, latent: Tensor, *, is_first: bool) -> Decoded:
        """``step`` for a film's first frame, which becomes one picture, or for a later one, which becomes several."""
        weights = self._weights
        frames = 1
        self._buffer(weights.first, 1, *self._size)[_NUM_BEFORE:].copy_(latent[None])
        x = Sum(self._convolve(weights.first, 1), weights.first.bias)
        head, attention, tail = weights.middle
        x = self._residual(tail, self._attention(attention, self._residual(head, x, frames)), frames)
        for up_block in weights.up_blocks:
            x, frames = self._up_block(up_block, x, frames, is_first=is_first)
        buffer = self._frames(weights.last, frames, x)
        self._operations.normalise(x, weights.norm, buffer, kept=None)
        raw = self._operations.gather(self._convolve(weights.last, len(buffer)), weights.last.bias)
        return Decoded(raw, self._operations.to_planes(raw, weights.patch_size), raw.sum())

    def _up_block(self, up_block: UpBlock, x: Sum, frames: int, *, is_first: bool) -> tuple[Sum, int]:
        """``frames`` is the number of frames in a later step; the first step has one."""
        start = x
        for residual in up_block.residuals:
            x = self._residual(residual, x, frames)
        if up_block.in_space is None:
            return x, frames
        in_time = 2 if up_block.in_time is not None else 1
        if up_block.in_time is not None and not is_first:
            self._operations.store(x, self._frames(up_block.in_time, frames, x))
            x = Sum(self._convolve(up_block.in_time, x.value.shape[0]), up_block.in_time.bias)
            large = self._operations.enlarge(x, in_time)
        else:
            large = self._operations.enlarge(x)
        del x  # ``large`` is all that is needed of it
        value = _convolve_pictures(large, up_block.in_space.weight)
        del large
        shortcut = None
        if up_block.repeat is not None:
            assert isinstance(start.value, Tensor), "the first residual block settled it"
            left_out = in_time - 1 if is_first else 0
            shortcut = repeat_channels(start.value, up_block.repeat, value.shape[-1], left_out)
        return Sum(value, up_block.in_space.bias, shortcut), in_time * frames

    def _residual(self, residual: ResidualBlock, x: Sum, frames: int) -> Sum:
        """``x`` is settled."""
        inner = self._convolve_normalised(x, residual.norm1, residual.conv1, frames, is_kept=True)
        assert isinstance(x.value, Tensor), "it is settled"
        around = x.value if residual.shortcut is None else self._multiply(x.value, residual.shortcut)
        value = self._convolve_normalised(inner, residual.norm2, residual.conv2, frames, is_kept=False).value
        return Sum(value, residual.conv2.bias, around)

    def _convolve_normalised(
        self, x: Sum, gain: Tensor, convolution: Convolution, frames: int, *, is_kept: bool
    ) -> Sum:
        """The convolution of the sum, normalised and through SiLU. ``frames`` is as in ``_frames``.

        With ``is_kept`` ``x`` is settled, else it is used up: a convolution's result is large, and the next one finds
        its memory free.
        """
        count, kept = x.value.shape[0], _place_of(x) if is_kept else None
        if convolution.in_pairs is None:
            self._operations.normalise(x, gain, self._frames(convolution, frames, x), kept=kept)
            x.settle(kept)
            return Sum(self._convolve(convolution, count), convolution.bias)
        before = self._before_of(convolution, x)
        if count % 2:
            window = _window_of(convolution, before, count)
            self._operations.normalise(x, gain, window[_NUM_BEFORE:, ..., : before.shape[-1]], kept=kept)
            x.settle(kept)
            before.copy_(window[count:, ..., : before.shape[-1]])
            return Sum(self._convolve_window(window, convolution), convolution.bias)
        pairs = before.new_empty((4, count // 2, *before.shape[1:]))
        self._operations.normalise_pairs(x, gain, before, pairs, kept=kept)
        x.settle(kept)
        return Sum(self._convolve_pairs(pairs, convolution.in_pairs), convolution.bias)

    def _attention(self, attention: AttentionBlock, x: Sum) -> Sum:
        around = _place_of(x)
        normed = torch.empty_like(around)
        self._operations.normalise(x, attention.norm, normed, kept=around, has_silu=False)
        query, key, value = self._multiply(normed.flatten(1, 2), attention.to_qkv).chunk(3, dim=-1)
        seen = self._operations.attend(query, key, value).view_as(normed)
        return Sum(self._multiply(seen, attention.project), None, around)

    def _frames(self, convolution: Convolution, frames: int, x: Sum) -> Tensor:
        """The part of the convolution's buffer for the frames ``x``; it never gets more than ``frames`` at a time."""
        count, height, width, channels = x.value.shape
        buffer = self._buffer(convolution, frames, height, width)
        return buffer[_NUM_BEFORE : _NUM_BEFORE + count, ..., :channels]

    def _buffer(self, convolution: Convolution, frames: int, height: int, width: int) -> Tensor:
        if convolution not in self._buffers:
            size = (_NUM_BEFORE + frames, height, width, convolution.weight.shape[1])
            self._buffers[convolution] = convolution.weight.new_zeros(size)
        return self._buffers[convolution]

    def _before_of(self, convolution: Convolution, x: Sum) -> Tensor:
        if convolution not in self._before:
            self._before[convolution] = convolution.weight.new_zeros((_NUM_BEFORE, *x.value.shape[1:]))
        return self._before[convolution]

    def _convolve(self, convolution: Convolution, count: int) -> Tensor:
        """Convolve the ``count`` frames in the buffer, without the bias; the last two stay there for the next step."""
        buffer = self._buffers[convolution]
        value = self._convolve_window(buffer[: _NUM_BEFORE + count], convolution)
        _keep_last(buffer, count)
        return value

    def _convolve_window(self, window: Tensor, convolution: Convolution) -> Tensor:
        value = self._operations.convolve(window.permute(3, 0, 1, 2)[None], convolution.weight)
        return value[0].permute(1, 2, 3, 0).contiguous()

    def _convolve_pairs(self, pairs: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        m0, m1, m2, m3 = map(_convolve_pictures, pairs, weights)
        return Pairs((m0, m1, m2, m3))

    def _multiply(self, x: Tensor, matrix: Convolution) -> Tensor:
        return functional.linear(x, matrix.weight, matrix.bias)


def _window_of(convolution: Convolution, before: Tensor, count: int) -> Tensor:
    """The two frames before and room for ``count``, as the convolution reads them."""
    window = before.new_zeros((_NUM_BEFORE + count, *before.shape[1:3], convolution.weight.shape[1]))
    window[:_NUM_BEFORE, ..., : before.shape[-1]].copy_(before)
    return window


def _place_of(x: Sum) -> Tensor:
    """Where the sum can be kept."""
    return x.value if isinstance(x.value, Tensor) else x.value.products[0].new_empty(x.value.shape)


def _keep_last(buffer: Tensor, count: int) -> None:
    """Move the last two of the two older and ``count`` new frames to the front."""
    if count >= _NUM_BEFORE:
        buffer[:_NUM_BEFORE].copy_(buffer[count : count + _NUM_BEFORE])
        return
    for place in range(_NUM_BEFORE):
        buffer[place].copy_(buffer[place + count])


def _convolve_pictures(pictures: Tensor, weight: Tensor) -> Tensor:
    """Convolve each frame by itself, without a bias."""
    value = functional.conv2d(pictures.permute(0, 3, 1, 2), weight, padding=1)
    return value.permute(0, 2, 3, 1).contiguous()


class WatchedStream(Stream):
    """A stream that notes how large its numbers get: sums in float32, the rest in the type that it computes in."""

    def __init__(self, weights: DecoderWeights, operations: DecoderOperations, height: int, width: int) -> None:
        super().__init__(weights, operations, height, width)
        self._found: list[Tensor] = []

    def largest(self) -> float:
        """The largest number of all frames so far; infinity when one was no number. Waits for the device."""
        largest = torch.stack(self._found).amax().item()
        return largest if math.isfinite(largest) else math.inf

    def step(self, latent: Tensor) -> Decoded:
        """See ``Stream.step``."""
        decoded = super().step(latent)
        self._note(decoded.raw)
        return decoded

    def _frames(self, convolution: Convolution, frames: int, x: Sum) -> Tensor:
        self._note(add_up(x))
        return super()._frames(convolution, frames, x)

    def _convolve_normalised(
        self, x: Sum, gain: Tensor, convolution: Convolution, frames: int, *, is_kept: bool
    ) -> Sum:
        self._note(add_up(x))
        return super()._convolve_normalised(x, gain, convolution, frames, is_kept=is_kept)

    def _attention(self, attention: AttentionBlock, x: Sum) -> Sum:
        self._note(add_up(x))
        return super()._attention(attention, x)

    def _convolve_window(self, window: Tensor, convolution: Convolution) -> Tensor:
        value = super()._convolve_window(window, convolution)
        self._note(value)
        return value

    def _convolve_pairs(self, pairs: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        value = super()._convolve_pairs(pairs, weights)
        for one in (pairs, *value.products):
            self._note(one)
        return value

    def _multiply(self, x: Tensor, matrix: Convolution) -> Tensor:
        value = super()._multiply(x, matrix)
        self._note(value)
        return value

    def _note(self, value: Tensor) -> None:
        self._found.append(value.abs().amax().float())
