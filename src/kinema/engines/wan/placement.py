"""Where the weights of a model lie: on the device, or in the host's memory, from which they come when they compute."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.empty_weights import size_of_weights
from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.streaming import NUM_SLOTS
from kinema.request.capabilities import Preset

log = logging.getLogger(__name__)

# What stays in the host's memory: nothing, the encoders of texts and pictures, or also the blocks of the transformers.
Offload = Literal["none", "text", "blocks"]
OffloadSetting = Literal["auto", "none", "text", "blocks"]

# What each pixel of a frame takes of the device while a film is decoded in 16 bits, by the VAEs of Wan 2.1 and 2.2:
# measured on an H200 at two sizes each, and the larger taken.
DECODE_BYTES = {"2.1": 13_200, "2.2": 10_900}
# What each pixel takes while given frames are encoded in float32 beside grey ones, by the sizes of Wan 2.1's tensors.
_ENCODE_BYTES = 15_700
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """``device`` computes. ``offload`` names what it does not hold all the time. The blocks of the transformers are
    split among ``num_parts`` devices."""

    device: torch.device
    offload: Offload = "none"
    num_parts: int = 1

    @property
    def has_text_offloaded(self) -> bool:
        return self.offload != "none"

    @property
    def has_blocks_offloaded(self) -> bool:
        return self.offload == "blocks"

    @property
    def of_encoders(self) -> torch.device:
        """Where the weights of the encoders of texts and pictures are read to."""
        return _HOST if self.has_text_offloaded else self.device

    @property
    def of_transformers(self) -> torch.device:
        """Where the transformers' weights are read to."""
        return _HOST if self.has_blocks_offloaded or self.num_parts > 1 else self.device


def place(
    setting: OffloadSetting,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    limit_bytes: int | None,
    num_parts: int = 1,
) -> Placement:
    """The placement that keeps most on the device with which the model's usual video fits into ``limit_bytes`` of it;
    that which keeps least where none fits. None is a device whose memory is the host's. A ``setting`` other than
    ``auto`` is kept, and blocks that are split into ``num_parts`` are not offloaded.
    """
    possible: tuple[Offload, ...] = ("none", "text", "blocks") if num_parts == 1 else ("none", "text")
    offloads = possible if setting == "auto" else (setting,)
    placements = [Placement(device, offload, num_parts) for offload in offloads]
    if limit_bytes is None:
        return placements[0]
    wanted = [bytes_wanted(checkpoint, placement, dtype) for placement in placements]
    fitting = [placement for placement, size in zip(placements, wanted, strict=True) if size <= limit_bytes]
    chosen = fitting[0] if fitting else placements[-1]
    if chosen is not placements[0]:
        log.info(
            "%.1f GB of memory, %.1f GB without offload: chose offload %s",
            *(limit_bytes / 1e9, wanted[0] / 1e9, chosen.offload),
        )
    return chosen


def encoders_of(checkpoint: Checkpoint) -> list[str]:
    """The components that encode what comes with a request, beside the VAE."""
    return ["text_encoder"] if checkpoint.image_encoder is None else ["text_encoder", "image_encoder"]


def bytes_wanted(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> int:
    """What the model's usual video takes of the device, from the sizes of its tensors."""
    encoders = [size_of_weights(checkpoint, name, dtype) for name in encoders_of(checkpoint)]
    held = transformer_bytes(checkpoint, placement, dtype)
    # Encoder and decoder; the first is float32.
    vae = size_of_weights(checkpoint, "vae", torch.float32)
    preset = checkpoint.capabilities().preset
    is_wide = checkpoint.vae.is_residual
    decode = DECODE_BYTES["2.2" if is_wide else "2.1"] * preset.size.pixels
    encode = _ENCODE_BYTES * preset.size.pixels if checkpoint.has_image_channels else 0
    working = max(_step_bytes(checkpoint, preset, dtype), decode * dtype.itemsize // 2, encode)
    if placement.has_text_offloaded:  # a layer of the text encoder is larger than one of the image encoder
        return held + vae + max(working, encoders[0] * NUM_SLOTS // checkpoint.text_encoder.num_layers)
    return held + vae + sum(encoders) + working


def transformer_bytes(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> int:
    """What the transformers take of the device, with the blocks that pass by where it does not hold all of them."""
    whole = [size_of_weights(checkpoint, name, dtype) for name in checkpoint.transformers]
    blocks = [size_of_weights(checkpoint, name, dtype, "blocks.") for name in checkpoint.transformers]
    if not placement.has_blocks_offloaded and placement.num_parts == 1:
        return sum(whole)
    passing = max(blocks) * NUM_SLOTS // checkpoint.transformer.num_layers
    held = 0 if placement.has_blocks_offloaded else sum(blocks) // placement.num_parts
    return sum(whole) - sum(blocks) + held + passing


def _step_bytes(checkpoint: Checkpoint, preset: Preset, dtype: torch.dtype) -> int:
    """What a step of this video takes, with keys and values of its prompts."""
    config, (in_space, in_time) = checkpoint.transformer, checkpoint.vae.factors
    latent_frames = (preset.num_frames - 1) // in_time + 1
    tokens = latent_frames * preset.size.pixels // in_space**2 // math.prod(config.patch_size)
    # Two branches have hidden states and what is added to them next. One of them is in its attention (a norm, queries,
    # keys, values, the result and its product), or in its feed-forward (a norm, the hidden layer, the result).
    rows = 4 + max(6.0, 2 + config.ffn_dim / config.width)
    keys = 2 * MAX_TEXT_TOKENS + checkpoint.num_image_keys
    return int((rows * tokens + config.num_layers * 2 * keys) * config.width) * dtype.itemsize
