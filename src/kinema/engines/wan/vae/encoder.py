"""The encoder of Wan's VAE: what diffusers' ``WanEncoder3d`` computes, bit for bit, frames by frames.

A causal convolution needs the two frames before those that it gets. They are in the ``Memory`` of one film, so that
films that are encoded by turns cannot touch each other. Axis letters: b batch (always 1), c channels, t frames, h rows,
w columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.vae.names import Spec, attention_shapes, convolution_shapes, residual_shapes

# Frames before its own that a convolution of three taps sees.
_NUM_BEFORE = 2

# Of one film: what each convolution in time keeps of the frames before.
Memory = dict["CausalConvolution", Tensor]
Weights = Mapping[str, Tensor]


def encoder_shapes(config: VaeConfig) -> Spec:
    """The name and shape of every weight, as diffusers' files have them."""
    widths = config.encoder_widths
    found = convolution_shapes("encoder.conv_in", config.in_channels, widths[0], (3, 3, 3))
    for kind, name, before, after in _down(config):
        if kind == "residual":
            found |= residual_shapes(name, before, after)
        else:
            found |= convolution_shapes(f"{name}.resample.1", after, after, (3, 3))
        if kind == "time":
            found |= convolution_shapes(f"{name}.time_conv", after, after, (3, 1, 1))
    width = widths[-1]
    found |= residual_shapes("encoder.mid_block.resnets.0", width, width)
    found |= attention_shapes("encoder.mid_block.attentions.0", width)
    found |= residual_shapes("encoder.mid_block.resnets.1", width, width)
    found["encoder.norm_out.gamma"] = (width, 1, 1, 1)
    found |= convolution_shapes("encoder.conv_out", width, 2 * config.z_dim, (3, 3, 3))
    return found | convolution_shapes("quant_conv", 2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))


def _down(config: VaeConfig) -> list[tuple[str, str, int, int]]:
    """The steps downwards as (kind, name, channels in, channels out): residual, space, and time, which is both."""
    found: list[tuple[str, str, int, int]] = []
    widths, last = config.encoder_widths, len(config.dim_mult) - 1
    for level, (before, after) in enumerate(pairwise(widths)):
        num_before = len(found)
        for index in range(config.num_res_blocks):
            name = f"{level}.resnets.{index}" if config.is_residual else str(num_before + index)
            found.append(("residual", f"encoder.down_blocks.{name}", before, after))
            before = after  # noqa: PLW2901 - the next block begins with what this one gives
        if level < last:
            name = f"{level}.downsampler" if config.is_residual else str(len(found))
            kind = "time" if config.temperal_downsample[level] else "space"
            found.append((kind, f"encoder.down_blocks.{name}", after, after))
    return found


class VaeEncoder:
    """The encoder with its weights, which stay where they are."""

    def __init__(self, config: VaeConfig, weights: Weights) -> None:
        """``weights`` has a tensor for each name in ``encoder_shapes(config)``."""
        self._config = config
        self._weights = weights
        self._layers: list[Layer] = [
            CausalConvolution(weights, "encoder.conv_in"),
            *_levels(config, weights),
            Residual(weights, "encoder.mid_block.resnets.0"),
            PixelAttention(weights, "encoder.mid_block.attentions.0"),
            Residual(weights, "encoder.mid_block.resnets.1"),
            Head(weights),
        ]

    def hidden(self, pixels: Tensor, memory: Memory) -> Tensor:
        """What is left of pixels (1, c, t, h, w): first one frame, with an empty memory, and then four at a time."""
        x = _patched(pixels, self._config.patch_size or 1)
        for layer in self._layers:
            x = layer(x, memory)
        return x

    def repeat(self, pixels: Tensor, memory: Memory, count: int) -> Iterator[Tensor]:
        """What ``hidden`` returns of the same pixels, ``count`` times one after another.

        A layer gives the same again once it gets the same and its memory stays the same; from then on neither it nor
        the layers before it are computed. The first layers are soon there, and have most of the work.
        """
        same, num_same = _patched(pixels, self._config.patch_size or 1), 0
        for _ in range(count):
            x, is_same = same, True
            for layer in self._layers[num_same:]:
                before = dict(memory)
                x = layer(x, memory)
                is_same = is_same and _is_unchanged(before, memory)
                if is_same:
                    same, num_same = x, num_same + 1
            yield x

    def mode(self, hidden: Tensor) -> Tensor:
        """The latents (1, c, f, h, w) that are most likely, of what is left of all frames."""
        matrix, bias = self._weights["quant_conv.weight"], self._weights["quant_conv.bias"]
        return functional.conv3d(hidden, matrix, bias).chunk(2, dim=1)[0]


Layer = Callable[[Tensor, Memory], Tensor]


class CausalConvolution:
    """A convolution that sees no later frame; ``stride`` is that in time, and with two it pads nothing."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weight, self._bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        self._border = self._weight.shape[-1] // 2

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        before = memory.get(self)
        memory[self] = _last_frames(before, x)
        if before is not None:
            x = torch.cat([before, x], dim=2)
        num_missing = _NUM_BEFORE - (0 if before is None else before.shape[2])
        x = functional.pad(x, (*[self._border] * 4, num_missing, 0))  # the other one's memory is free now
        return functional.conv3d(x, self._weight, self._bias)

    def halve(self, x: Tensor, memory: Memory) -> Tensor:
        """Every second frame; the first of a film is as it is."""
        before = memory.get(self)
        memory[self] = x[:, :, -1:].clone()
        if before is None:
            return x
        return functional.conv3d(torch.cat([before, x], dim=2), self._weight, self._bias, stride=(2, 1, 1))


def _is_unchanged(before: Memory, memory: Memory) -> bool:
    """Whether what a layer wrote into the memory is what was there."""
    written = ((before.get(key), frames) for key, frames in memory.items() if before.get(key) is not frames)
    return all(old is not None and torch.equal(old, new) for old, new in written)


def _last_frames(before: Tensor | None, x: Tensor) -> Tensor:
    """The last two frames, one of which may be an older one."""
    last = x[:, :, -_NUM_BEFORE:].clone()
    if last.shape[2] < _NUM_BEFORE and before is not None:
        last = torch.cat([before[:, :, -1:], last], dim=2)
    return last


class Residual:
    """Norm, SiLU, convolution, twice, added to what came in."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._gains = weights[f"{name}.norm1.gamma"], weights[f"{name}.norm2.gamma"]
        self._convolutions = CausalConvolution(weights, f"{name}.conv1"), CausalConvolution(weights, f"{name}.conv2")
        shortcut = f"{name}.conv_shortcut"
        has_shortcut = f"{shortcut}.weight" in weights
        self._shortcut = (weights[f"{shortcut}.weight"], weights[f"{shortcut}.bias"]) if has_shortcut else None

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        around = x if self._shortcut is None else functional.conv3d(x, *self._shortcut)
        for gain, convolution in zip(self._gains, self._convolutions, strict=True):
            x = convolution(functional.silu(_norm(x, gain)), memory)
        return x + around


class PixelAttention:
    """One head over the pixels of a frame."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._gain = weights[f"{name}.norm.gamma"]
        self._to_qkv = weights[f"{name}.to_qkv.weight"], weights[f"{name}.to_qkv.bias"]
        self._project = weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"]

    def __call__(self, x: Tensor, _memory: Memory) -> Tensor:
        pictures = _pictures(x)
        qkv = functional.conv2d(_norm(pictures, self._gain), *self._to_qkv)
        query, key, value = qkv.flatten(2)[:, None].permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(query, key, value)
        seen = seen.squeeze(1).permute(0, 2, 1).reshape(pictures.shape)
        return _film(functional.conv2d(seen, *self._project)) + x


class Halving:
    """Half the rows and columns, and where there is a convolution for it half the frames."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._space = weights[f"{name}.resample.1.weight"], weights[f"{name}.resample.1.bias"]
        is_in_time = f"{name}.time_conv.weight" in weights
        self._time = CausalConvolution(weights, f"{name}.time_conv") if is_in_time else None

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        x = _film(functional.conv2d(functional.pad(_pictures(x), (0, 1, 0, 1)), *self._space, stride=2))
        return x if self._time is None else self._time.halve(x, memory)


class Head:
    """Norm, SiLU and the last convolution."""

    def __init__(self, weights: Weights) -> None:
        self._gain = weights["encoder.norm_out.gamma"]
        self._convolution = CausalConvolution(weights, "encoder.conv_out")

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        return self._convolution(functional.silu(_norm(x, self._gain)), memory)


@dataclass(frozen=True, eq=False)
class DownBlock:
    """The steps of one size of Wan 2.2; ``shortcut`` is what it puts around them: channels out, factor in time and in
    space."""

    steps: list[Layer]
    shortcut: tuple[int, int, int]

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        around = x
        for step in self.steps:
            x = step(x, memory)
        return x + _mean_down(around, *self.shortcut)


def _levels(config: VaeConfig, weights: Weights) -> list[Layer]:
    steps: list[Layer] = [
        (Residual(weights, name) if kind == "residual" else Halving(weights, name)) for kind, name, *_ in _down(config)
    ]
    if not config.is_residual:
        return steps
    levels: list[Layer] = []
    for index, width in enumerate(config.encoder_widths[1:]):
        is_last = index == len(config.dim_mult) - 1
        count = config.num_res_blocks + (0 if is_last else 1)
        in_time = 2 if not is_last and config.temperal_downsample[index] else 1
        own, steps = steps[:count], steps[count:]
        levels.append(DownBlock(own, (width, in_time, 1 if is_last else 2)))
    return levels


def _pictures(x: Tensor) -> Tensor:
    """Each frame of a film (1, c, t, h, w) by itself: (t, c, h, w)."""
    return x[0].transpose(0, 1)


def _film(pictures: Tensor) -> Tensor:
    """The way back."""
    return pictures.transpose(0, 1)[None]


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm over the channels, axis 1; ``gain`` is (c, 1, 1, ..). In 16 bits the norm itself is float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed: Tensor = functional.normalize(wide, dim=1).to(x.dtype)
    return normed * math.sqrt(len(gain)) * gain


def _mean_down(x: Tensor, num_channels: int, in_time: int, in_space: int) -> Tensor:
    """Frames and pixels as channels, and the mean of those that belong together: diffusers' ``AvgDown3D``."""
    x = functional.pad(x, (0, 0, 0, 0, -x.shape[2] % in_time, 0))
    _, channels, frames, height, width = x.shape
    cut = x.view(
        1, channels, frames // in_time, in_time, height // in_space, in_space, width // in_space, in_space
    ).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return cut.reshape(1, num_channels, -1, frames // in_time, height // in_space, width // in_space).mean(dim=2)


def _patched(pixels: Tensor, size: int) -> Tensor:
    """Patches of ``size`` rows and columns as channels, a colour's together, as diffusers' ``patchify``."""
    if size == 1:
        return pixels
    _, channels, frames, height, width = pixels.shape
    cut = pixels.view(1, channels, frames, height // size, size, width // size, size)
    return cut.permute(0, 1, 6, 4, 2, 3, 5).reshape(1, -1, frames, height // size, width // size)
