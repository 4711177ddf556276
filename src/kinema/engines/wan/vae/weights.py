"""The decoder's weights, taken out of diffusers' modules and laid out for the convolutions that read them.

Activations are (t, h, w, c) throughout, so the weights of convolutions are in the channels-last layout of torch. Biases
and the gains of norms stay float32: they are used where sums are float32 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# cuDNN's kernels for 16-bit types want multiples of these. Input channels: 96 in a buffer for 128 take 1.9 ms where 96
# alone take 2.9 ms (832x480, four frames, on an H200). Output channels: tensor cores compute no fewer.
_INPUT_STEP = 64
_OUTPUT_STEP = 8


@dataclass(frozen=True, eq=False)
class Convolution:
    """Weight (o, i, kt, kh, kw), or (o, i, kh, kw) for single frames; bias (o,) float32.

    ``i`` may be larger than the number of input channels; the weight is zero for the channels beyond.
    """

    weight: Tensor
    bias: Tensor


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


def extract_weights(vae: Any, dtype: torch.dtype) -> DecoderWeights:  # noqa: ANN401 - diffusers' AutoencoderKLWan
    """The weights of diffusers' modules, which stay as they are: copied where type or layout differ."""
    decoder = vae.decoder
    head, attention, tail = decoder.mid_block.resnets[0], decoder.mid_block.attentions[0], decoder.mid_block.resnets[1]
    return DecoderWeights(
        quantised=_matrix(vae.post_quant_conv, torch.float32),
        first=_convolution(decoder.conv_in, dtype),
        middle=(_residual(head, dtype), _attention(attention, dtype), _residual(tail, dtype)),
        up_blocks=tuple(_up_block(block, dtype) for block in decoder.up_blocks),
        norm=_gain(decoder.norm_out),
        last=_tap_by_tap(decoder.conv_out, dtype),
        patch_size=vae.config.patch_size or 1,
    )


def _convolution(module: Any, dtype: torch.dtype) -> Convolution:  # noqa: ANN401
    weight = module.weight.detach()
    is_wide = weight.ndim == 5 and weight.shape[1] > _INPUT_STEP
    filled = _filled(weight, 1, _INPUT_STEP) if is_wide and dtype.itemsize == 2 else weight
    return Convolution(_laid_out(filled, dtype), module.bias.detach().float())


def _tap_by_tap(module: Any, dtype: torch.dtype) -> Convolution:  # noqa: ANN401
    """The nine taps in space as output channels (9 * o, i, 3, 1, 1), tap by tap; ``DecoderOperations.gather`` adds them
    up.

    A convolution to three channels keeps a matrix unit waiting for its inputs: read once instead of nine times, they
    cost a quarter.
    """
    weight = module.weight.detach()
    taps = weight.permute(3, 4, 0, 1, 2).flatten(0, 2)[..., None, None]
    return Convolution(_laid_out(_filled(taps, 0, _OUTPUT_STEP), dtype), module.bias.detach().float())


def _filled(weight: Tensor, axis: int, step: int) -> Tensor:
    """The weight with zeros along the axis, up to a multiple of ``step``."""
    size = list(weight.shape)
    size[axis] = -size[axis] % step
    return torch.cat([weight, weight.new_zeros(size)], dim=axis)


def _laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    return weight.to(dtype).contiguous(memory_format=layout)


def _matrix(module: Any, dtype: torch.dtype) -> Convolution:  # noqa: ANN401
    """A convolution of one tap, as (o, i)."""
    return Convolution(module.weight.detach().flatten(1).to(dtype), module.bias.detach().to(dtype))


def _gain(module: Any) -> Tensor:  # noqa: ANN401
    """A norm's gain (c,) float32, times the norm's own scale, the root of the number of channels."""
    gamma: Tensor = module.gamma.detach().float().flatten() * module.scale
    return gamma


def _residual(module: Any, dtype: torch.dtype) -> ResidualBlock:  # noqa: ANN401
    has_shortcut = not isinstance(module.conv_shortcut, torch.nn.Identity)
    return ResidualBlock(
        norm1=_gain(module.norm1),
        conv1=_convolution(module.conv1, dtype),
        norm2=_gain(module.norm2),
        conv2=_convolution(module.conv2, dtype),
        shortcut=_matrix(module.conv_shortcut, dtype) if has_shortcut else None,
    )


def _attention(module: Any, dtype: torch.dtype) -> AttentionBlock:  # noqa: ANN401
    return AttentionBlock(_gain(module.norm), _matrix(module.to_qkv, dtype), _matrix(module.proj, dtype))


def _up_block(block: Any, dtype: torch.dtype) -> UpBlock:  # noqa: ANN401
    shortcut = getattr(block, "avg_shortcut", None)
    if hasattr(block, "upsampler"):
        up = block.upsampler
    else:
        up = block.upsamplers[0] if block.upsamplers is not None else None
    is_in_time = up is not None and up.mode == "upsample3d"
    return UpBlock(
        residuals=tuple(_residual(module, dtype) for module in block.resnets),
        in_time=_convolution(up.time_conv, dtype) if is_in_time else None,
        in_space=_convolution(up.resample[1], dtype) if up is not None else None,
        repeat=shortcut.repeats if shortcut is not None else None,
    )
