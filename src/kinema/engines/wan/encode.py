"""Pixels to latents, for a first frame that is given and for a film that is edited.

diffusers' ``AutoencoderKLWan._encode`` runs the same loop over the same causal caches but keeps the caches on the
module and wants all pixels on the device; here they belong to the call, and four frames are on the device at a time.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor

from kinema.engines.base import UInt8Array
from kinema.engines.wan.conditioning import latent_statistics
from kinema.engines.wan.weights import Components


def encode(parts: Components, frames: UInt8Array) -> Tensor:
    """Frames (4k+1, h, w, 3) uint8 as normalised latents (1, c, k+1, h, w) float32: the mode of their posterior.

    4 is the VAE's temporal factor. The first frame gives one latent frame, each four later ones another.
    """
    vae = parts.vae
    factor = vae.config.scale_factor_temporal
    cache: list[Tensor | str | None] = [None] * vae._cached_conv_counts["encoder"]
    starts = [0, *range(1, len(frames), factor)]
    hidden = [
        vae.encoder(_pixels(parts, frames[start:stop]), feat_cache=cache, feat_idx=[0])
        for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True)
    ]
    mode: Tensor = vae.quant_conv(torch.cat(hidden, dim=2)).chunk(2, dim=1)[0]
    mean, std = latent_statistics(parts)
    return (mode.float() - mean) / std


def _pixels(parts: Components, frames: UInt8Array) -> Tensor:
    """(1, 3, f, h, w) in [-1, 1], or what the VAE makes of it when it works on patches."""
    scaled = torch.from_numpy(frames).to(parts.device, parts.vae.dtype).permute(3, 0, 1, 2)[None] / 255.0
    pixels = 2.0 * scaled - 1.0
    patch_size = parts.vae.config.patch_size
    return pixels if patch_size is None else patchify(pixels, patch_size=patch_size)
