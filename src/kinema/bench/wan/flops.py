"""How many floating-point operations a video needs, from its model's configs; a multiplication and an addition are two.

Counted is what any implementation has to do: products of matrices, convolutions and attention, as the published models
define them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from kinema.request.shapes import Size

Config = Mapping[str, Any]

# The transformer's text is padded to this length, with tokens that are attended to.
_TEXT_TOKENS = 512
# Taps of a causal 3x3x3 convolution, of a convolution in time alone, and of one within a frame.
_CUBE, _TIME, _SQUARE = 27, 3, 9


@dataclass(frozen=True)
class Work:
    """FLOPs in products of matrices and convolutions, and in self-attention, which devices run at another rate."""

    products: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.products, times * self.attention)


def count_tokens(transformer: Config, vae: Config, size: Size, num_frames: int) -> int:
    """The number of video tokens: the patches of all latent frames."""
    frames, rows, columns = _latent_shape(vae, size, num_frames)
    patch: int = prod(transformer["patch_size"])
    return frames * rows * columns // patch


def forward_work(transformer: Config, num_tokens: int, image_keys: int = 0) -> Work:
    """One pass of the transformer over one video and its text, and over the states of its pictures, of which there are
    ``image_keys``; a guided step has two passes."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, hidden, text = transformer["num_layers"], transformer["ffn_dim"], transformer["text_dim"]
    channels = transformer["in_channels"] + transformer["out_channels"]
    ends = 2 * num_tokens * prod(transformer["patch_size"]) * channels * width
    linear = 2 * num_tokens * layers * (6 * width**2 + 2 * width * hidden)
    cross = 4 * num_tokens * _TEXT_TOKENS * width * layers
    keys_values = 4 * _TEXT_TOKENS * width**2 * layers
    text_in = 2 * _TEXT_TOKENS * (text * width + width**2)
    time = 2 * (transformer["freq_dim"] * width + 7 * width**2)
    images = _image_work(transformer, num_tokens, image_keys) if image_keys else 0.0
    return Work(ends + linear + cross + keys_values + text_in + time + images, 4 * num_tokens**2 * width * layers)


def _image_work(transformer: Config, num_tokens: int, image_keys: int) -> float:
    """The states of pictures are embedded once; in each layer all tokens attend to them."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    states, added = transformer["image_dim"], transformer["added_kv_proj_dim"]
    embedded = 2 * image_keys * (states**2 + states * width)
    return float(embedded + transformer["num_layers"] * 4 * image_keys * width * (added + num_tokens))


def text_work(text_encoder: Config, num_tokens: int) -> Work:
    """One prompt through UMT5's encoder, whose feed-forward is gated."""
    width, inner = text_encoder["d_model"], text_encoder["num_heads"] * text_encoder["d_kv"]
    layers = text_encoder["num_layers"]
    linear = 2 * num_tokens * layers * (4 * width * inner + 3 * width * text_encoder["d_ff"])
    return Work(linear, 4 * num_tokens**2 * inner * layers)


def decode_work(vae: Config, size: Size, num_frames: int) -> Work:
    """All latent frames through the VAE's decoder; the first one becomes one frame and is not upsampled in time."""
    frames, rows, columns = _latent_shape(vae, size, num_frames)
    first, later = (_decode_one(vae, rows * columns, is_first=is_first) for is_first in (True, False))
    return Work(2 * (first + (frames - 1) * later))


def _decode_one(vae: Config, pixels: int, *, is_first: bool) -> float:
    """The multiplications of one latent frame of ``pixels`` pixels."""
    channels, factors = vae["z_dim"], vae["dim_mult"][::-1]
    base = vae.get("decoder_base_dim") or vae["base_dim"]
    is_upsampled_in_time = [is_doubled and not is_first for is_doubled in vae["temperal_downsample"][::-1]]
    width = base * factors[0]
    count = pixels * (channels**2 + _CUBE * channels * width) + _middle(pixels, width)
    for stage, factor in enumerate(factors):
        out = base * factor
        count += pixels * _residual(width, out, vae["num_res_blocks"] + 1)
        width = out
        if stage < len(factors) - 1:
            if is_upsampled_in_time[stage]:
                count += pixels * _TIME * width * 2 * width
                pixels *= 2
            pixels *= 4
            narrowed = width if vae.get("is_residual") else width // 2
            count += pixels * _SQUARE * width * narrowed
            width = narrowed
    return float(count + pixels * _CUBE * width * vae.get("out_channels", 3))


def _middle(pixels: int, width: int) -> int:
    """Two residual blocks, and attention within the frame between them."""
    return pixels * (_residual(width, width, 2) + 4 * width**2 + 2 * pixels * width)


def _residual(before: int, after: int, blocks: int) -> int:
    """The multiplications of one pixel: two convolutions a block, and a shortcut where the width changes."""
    count = _CUBE * (before * after + (2 * blocks - 1) * after**2)
    return count + (before * after if before != after else 0)


def _latent_shape(vae: Config, size: Size, num_frames: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns."""
    space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    return (num_frames - 1) // time + 1, size.height // space, size.width // space
