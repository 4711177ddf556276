"""Latents to pixels, one latent frame at a time, so that the encoder can start on the first frames.

diffusers' ``AutoencoderKLWan._decode`` runs the same loop over the same causal caches but keeps the caches on the
module and returns all frames at once; here they belong to the generator, so decodes may take turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from kinema.engines.base import UInt8Array
from kinema.engines.wan.conditioning import latent_statistics
from kinema.engines.wan.weights import Components


def decode(parts: Components, latents: Tensor) -> Iterator[Tensor]:
    """Normalised latents (1, c, f, h, w) to chunks of pixels (f, h, w, 3) float in [0, 1].

    The first latent frame gives one frame, each later one as many as the VAE's temporal factor.
    """
    vae = parts.vae
    mean, std = latent_statistics(parts)
    hidden = vae.post_quant_conv((latents * std + mean).to(vae.dtype))
    cache: list[Tensor | str | None] = [None] * vae._cached_conv_counts["decoder"]
    for index in range(hidden.shape[2]):
        chunk = vae.decoder(hidden[:, :, index : index + 1], feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        if vae.config.patch_size is not None:
            chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
        yield (chunk[0].permute(1, 2, 3, 0).float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_uint8(pixels: Tensor) -> UInt8Array:
    """Pixels in [0, 1] to the nearest of 256 levels, on the host.

    diffusers' ``export_to_video`` truncates instead, which darkens every pixel by half a level.
    """
    return (pixels * 255.0).round().to(torch.uint8).cpu().contiguous().numpy()
