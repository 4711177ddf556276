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

log = logging.getLogger(__name__)

# What stays in the host's memory: nothing, the text encoder, or also the blocks of the transformers.
Offload = Literal["none", "text", "blocks"]
OffloadSetting = Literal["auto", "none", "text", "blocks"]

# Of the device for each pixel of a frame while it is decoded: what ``kinema bench memory`` measured.
_DECODE_BYTES = 6000
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """``device`` computes. ``offload`` names what it does not hold all the time."""

    device: torch.device
    offload: Offload = "none"

    @property
    def has_text_offloaded(self) -> bool:
        return self.offload != "none"

    @property
    def has_blocks_offloaded(self) -> bool:
        return self.offload == "blocks"

    @property
    def of_text_encoder(self) -> torch.device:
        """Where the text encoder's weights are read to."""
        return _HOST if self.has_text_offloaded else self.device

    @property
    def of_transformers(self) -> torch.device:
        """Where the transformers' weights are read to."""
        return _HOST if self.has_blocks_offloaded else self.device


def choose_offload(
    setting: OffloadSetting, checkpoint: Checkpoint, dtype: torch.dtype, limit_bytes: int | None
) -> Offload:
    """What stays in the host's memory. ``auto`` is the least with which the model's usual video fits into
    ``limit_bytes`` of the device; None is a device whose memory is the host's.
    """
    if setting != "auto":
        return setting
    if limit_bytes is None:
        return "none"
    working = working_bytes(checkpoint, dtype)
    blocks = sum(size_of_weights(checkpoint, name, dtype) for name in checkpoint.transformers)
    all_bytes = working + blocks + size_of_weights(checkpoint, "text_encoder", dtype)
    if all_bytes <= limit_bytes:
        return "none"
    chosen: Offload = "text" if working + blocks <= limit_bytes else "blocks"
    log.info("offload auto: chose %s; %s of %s GB", chosen, f"{all_bytes / 1e9:.1f}", f"{limit_bytes / 1e9:.1f}")
    return chosen


def working_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What the usual video takes beside the transformers and the text encoder, from the sizes of its tensors."""
    preset, config, vae = checkpoint.capabilities().preset, checkpoint.transformer, checkpoint.vae
    in_space, in_time = vae.factors
    latent_frames = (preset.num_frames - 1) // in_time + 1
    tokens = latent_frames * preset.size.pixels // in_space**2 // math.prod(config.patch_size)
    # Two branches have hidden states and what is added to them next. One of them is in its attention (a norm, queries,
    # keys, values, the result and its product), or in its feed-forward (a norm, the hidden layer, the result).
    rows = 4 + max(6.0, 2 + config.ffn_dim / config.width)
    step = int(rows * config.width * tokens) * dtype.itemsize
    prompts = config.num_layers * 2 * MAX_TEXT_TOKENS * 2 * config.width * dtype.itemsize
    weights = 2 * size_of_weights(checkpoint, "vae", dtype)
    return weights + prompts + max(step, int(_DECODE_BYTES * preset.size.pixels))
