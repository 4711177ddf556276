"""The decoder's weights, by their names in diffusers' files, and laid out for the convolutions that read them.

Activations are (t, h, w, c) throughout, so the weights of convolutions are in the channels-last layout of torch. Biases
and the gains of norms stay float32: they are used where sums are float32 anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.vae.names import Spec, attention_shapes, convolution_shapes, residual_shapes

Weights = Mapping[str, Tensor]

# cuDNN's kernels for 16-bit types want multiples of these. Input channels: 96 in a buffer for 128 take 1.9 ms where 96
# alone take 2.9 ms (832x480, four frames, on an H200). Output channels: tensor cores compute no fewer.
_INPUT_STEP = 64
_OUTPUT_STEP = 8


@dataclass(frozen=True, eq=False)
class Convolution:
    """Weight (o, i, kt, kh, kw), or (o, i, kh, kw) for single frames; bias (o,) float32.

    ``i`` may be larger than the number of input channels; the weight is zero for the channels beyond. ``in_pairs`` are
    the four weights (o, i, kh, kw) that compute two frames together (``decoder_operations.py``), without such channels.
    """

    weight: Tensor
    bias: Tensor
    in_pairs: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """Norm, SiLU, convolution, twice; ``shortcut`` is a matrix where the number of channels changes."""

    norm1: Tensor
    conv1: Convolution
    norm2: Tensor
    conv2: Convolution
    shortcut: Convolution | None


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One head over the pixels of a frame."""

    norm: Tensor
    to_qkv: Convolution
    project: Convolution


@dataclass(frozen=True, eq=False)
class UpBlock:
    """Residual blocks at one size, then upsampling to the next: twice the rows and columns, with ``in_time`` the
    frames.

    ``repeat`` belongs to the shortcut of Wan 2.2 around the whole block: how often each channel is repeated, over the
    pixels (and frames) that one pixel becomes.
    """

    residuals: tuple[ResidualBlock, ...]
    in_time: Convolution | None
    in_space: Convolution | None
    repeat: int | None


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All weights of a decoder. ``quantised`` is applied before the stream and stays float32."""

    quantised: Convolution
    first: Convolution
    middle: tuple[ResidualBlock, AttentionBlock, ResidualBlock]
    up_blocks: tuple[UpBlock, ...]
    norm: Tensor
    last: Convolution
    patch_size: int

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.first.weight.device


def decoder_shapes(config: VaeConfig) -> Spec:
    """The name and shape of every weight, as diffusers' files have them."""
    widths = config.decoder_widths
    found = convolution_shapes("post_quant_conv", config.z_dim, config.z_dim, (1, 1, 1))
    found |= convolution_shapes("decoder.conv_in", config.z_dim, widths[0], (3, 3, 3))
    found |= residual_shapes("decoder.mid_block.resnets.0", widths[0], widths[0])
    found |= attention_shapes("decoder.mid_block.attentions.0", widths[0])
    found |= residual_shapes("decoder.mid_block.resnets.1", widths[0], widths[0])
    for up in _ups(config):
        for index in range(config.num_res_blocks + 1):
            found |= residual_shapes(f"{up.name}.resnets.{index}", up.after if index else up.before, up.after)
        if up.upsampler is not None:
            left = up.after if config.is_residual else up.after // 2
            found |= convolution_shapes(f"{up.upsampler}.resample.1", up.after, left, (3, 3))
        if up.upsampler is not None and up.is_in_time:
            found |= convolution_shapes(f"{up.upsampler}.time_conv", up.after, 2 * up.after, (3, 1, 1))
    found["decoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
    return found | convolution_shapes("decoder.conv_out", widths[-1], config.out_channels, (3, 3, 3))


@dataclass(frozen=True)
class _Up:
    """A block as it is named in a file: channels before and after its residual blocks, and what enlarges it, if any."""

    name: str
    before: int
    after: int
    upsampler: str | None
    is_in_time: bool


def _ups(config: VaeConfig) -> list[_Up]:
    found: list[_Up] = []
    widths, last = config.decoder_widths, len(config.dim_mult) - 1
    for index, (before, after) in enumerate(pairwise(widths)):
        name = f"decoder.up_blocks.{index}"
        upsampler = f"{name}.{'upsampler' if config.is_residual else 'upsamplers.0'}"
        found.append(
            _Up(
                name,
                before // 2 if index and not config.is_residual else before,
                after,
                upsampler if index < last else None,
                is_in_time=index < last and config.temperal_downsample[::-1][index],
            )
        )
    return found


def extract_weights(
    config: VaeConfig, weights: Weights, dtype: torch.dtype, *, has_pairs: bool = False
) -> DecoderWeights:
    """The weights of a tensor for each name in ``decoder_shapes(config)``: copied where type or layout differ.

    With ``has_pairs`` the convolutions that get an even number of frames can compute two together.
    """
    middle = "decoder.mid_block"
    ups = _ups(config)
    # Frames are doubled by blocks; those behind the first one of these have an even number.
    num_odd = next((index for index, up in enumerate(ups, start=1) if up.is_in_time), len(ups))
    return DecoderWeights(
        quantised=_matrix(weights, "post_quant_conv", torch.float32),
        first=_convolution(weights, "decoder.conv_in", dtype),
        middle=(
            _residual(weights, f"{middle}.resnets.0", dtype),
            _attention(weights, f"{middle}.attentions.0", dtype),
            _residual(weights, f"{middle}.resnets.1", dtype),
        ),
        up_blocks=tuple(
            _up_block(config, weights, up, dtype, has_pairs=has_pairs and index >= num_odd)
            for index, up in enumerate(ups)
        ),
        norm=_gain(weights, "decoder.norm_out"),
        last=_tap_by_tap(weights, "decoder.conv_out", dtype),
        patch_size=config.patch_size or 1,
    )


def pairs_pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions are to compute two frames together: on matrix units, whose type rounds as much anyway."""
    return device.type == "cuda" and dtype.itemsize == 2


def convert_weights(weights: DecoderWeights, dtype: torch.dtype) -> DecoderWeights:
    """The weights in another type of the same size, in the same layout; what is float32 in all types is shared."""
    converted: DecoderWeights = _converted(weights, weights.dtype, dtype)
    return converted


def _converted(part: Any, before: torch.dtype, dtype: torch.dtype) -> Any:  # noqa: ANN401 - a part of the weights
    if isinstance(part, Tensor):
        return part.to(dtype) if part.dtype == before else part
    if isinstance(part, tuple):
        return tuple(_converted(one, before, dtype) for one in part)
    if not is_dataclass(part):
        return part
    made: Any = type(part)
    return made(**{field.name: _converted(getattr(part, field.name), before, dtype) for field in fields(part)})


def _convolution(weights: Weights, name: str, dtype: torch.dtype) -> Convolution:
    weight = weights[f"{name}.weight"]
    is_wide = weight.ndim == 5 and weight.shape[1] > _INPUT_STEP
    filled = _filled(weight, 1, _INPUT_STEP) if is_wide and dtype.itemsize == 2 else weight
    return Convolution(_laid_out(filled, dtype), weights[f"{name}.bias"].float())


def _convolution_in_pairs(weights: Weights, name: str, dtype: torch.dtype) -> Convolution:
    first, second, third = weights[f"{name}.weight"].float().unbind(2)
    ends = first + third
    in_pairs = (first, (ends + second) / 2, (ends - second) / 2, third)
    return replace(_convolution(weights, name, dtype), in_pairs=tuple(_laid_out(one, dtype) for one in in_pairs))


def _tap_by_tap(weights: Weights, name: str, dtype: torch.dtype) -> Convolution:
    """The nine taps in space as output channels (9 * o, i, 3, 1, 1), tap by tap; ``DecoderOperations.gather``
    adds them up.

    A convolution to three channels keeps a matrix unit waiting for its inputs: read once instead of nine times, they
    cost a quarter.
    """
    taps = weights[f"{name}.weight"].permute(3, 4, 0, 1, 2).flatten(0, 2)[..., None, None]
    return Convolution(_laid_out(_filled(taps, 0, _OUTPUT_STEP), dtype), weights[f"{name}.bias"].float())


def _filled(weight: Tensor, axis: int, step: int) -> Tensor:
    """With zeros up to a multiple of ``step``."""
    size = list(weight.shape)
    size[axis] = -size[axis] % step
    return torch.cat([weight, weight.new_zeros(size)], dim=axis)


def _laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    return weight.to(dtype).contiguous(memory_format=layout)


def _matrix(weights: Weights, name: str, dtype: torch.dtype) -> Convolution:
    """A convolution of one tap, as (o, i)."""
    return Convolution(weights[f"{name}.weight"].flatten(1).to(dtype), weights[f"{name}.bias"].to(dtype))


def _gain(weights: Weights, name: str) -> Tensor:
    """(c,) float32: the norm's own scale, the root of the number of channels, is in it."""
    gamma = weights[f"{name}.gamma"].float().flatten()
    return gamma * math.sqrt(len(gamma))


def _residual(weights: Weights, name: str, dtype: torch.dtype, *, has_pairs: bool = False) -> ResidualBlock:
    shortcut = f"{name}.conv_shortcut"
    convolution = _convolution_in_pairs if has_pairs else _convolution
    return ResidualBlock(
        norm1=_gain(weights, f"{name}.norm1"),
        conv1=convolution(weights, f"{name}.conv1", dtype),
        norm2=_gain(weights, f"{name}.norm2"),
        conv2=convolution(weights, f"{name}.conv2", dtype),
        shortcut=_matrix(weights, shortcut, dtype) if f"{shortcut}.weight" in weights else None,
    )


def _attention(weights: Weights, name: str, dtype: torch.dtype) -> AttentionBlock:
    return AttentionBlock(
        _gain(weights, f"{name}.norm"),
        _matrix(weights, f"{name}.to_qkv", dtype),
        _matrix(weights, f"{name}.proj", dtype),
    )


def _up_block(config: VaeConfig, weights: Weights, up: _Up, dtype: torch.dtype, *, has_pairs: bool) -> UpBlock:
    residuals = [
        _residual(weights, f"{up.name}.resnets.{index}", dtype, has_pairs=has_pairs)
        for index in range(config.num_res_blocks + 1)
    ]
    if up.upsampler is None:
        return UpBlock(tuple(residuals), None, None, None)
    pixels_of_one = 8 if up.is_in_time else 4
    return UpBlock(
        tuple(residuals),
        in_time=_convolution(weights, f"{up.upsampler}.time_conv", dtype) if up.is_in_time else None,
        in_space=_convolution(weights, f"{up.upsampler}.resample.1", dtype),
        repeat=up.after * pixels_of_one // up.before if config.is_residual else None,
    )
