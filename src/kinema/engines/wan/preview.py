"""Latents as a small picture, without the VAE: the colour of a latent pixel is a linear function of its channels.

Previews are commonly made like that, with a table of numbers fitted to one VAE. Here the numbers are fitted to the
loaded VAE itself, by pictures whose colours are known, so any checkpoint has its own.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kinema.engines.base import UInt8Array
from kinema.engines.wan.conditioning import encode_frames
from kinema.engines.wan.loading import Components

# Latent rows and columns of an example: two examples have ten times as many latent pixels as a VAE has channels, and a
# CPU encodes them in a moment.
_SIDE = 16
# Cells of one colour in a row: few for slow changes, which most of a picture is, and many for edges.
_SMOOTH, _CHECKED = 4, 8


class LatentPreview:
    """The previews of one VAE. To make one encodes two examples, in tens of milliseconds."""

    @torch.inference_mode()
    def __init__(self, parts: Components) -> None:
        latents, colours = zip(*(_example(parts, cells) for cells in (_SMOOTH, _CHECKED)), strict=True)
        solution = torch.linalg.lstsq(_with_one(torch.cat(latents)), torch.cat(colours)).solution
        self._to_rgb = solution.to(parts.device)

    @torch.inference_mode()
    def picture(self, latents: Tensor) -> UInt8Array:
        """The middle frame of normalised latents (1, c, f, h, w) as (h, w, 3) uint8 RGB; waits for the device."""
        middle = latents[0, :, latents.shape[2] // 2].permute(1, 2, 0).float()
        rgb = (_with_one(middle) @ self._to_rgb).clamp(0.0, 1.0)
        pixels: UInt8Array = (rgb * 255.0).round().to(torch.uint8).cpu().numpy()
        return pixels


def _example(parts: Components, cells: int) -> tuple[Tensor, Tensor]:
    """Latent pixels (n, c) of a still film of random colours, and those colours (n, 3) in [0, 1], float32."""
    # This beta distribution has more dark, light and pure colours than even chances give.
    colours = np.random.default_rng(cells).beta(0.5, 0.5, (cells, cells, 3))
    side = _SIDE * parts.vae.config.scale_factor_spatial
    resampling = Image.Resampling.BILINEAR if cells == _SMOOTH else Image.Resampling.NEAREST
    picture = Image.fromarray(np.rint(255 * colours).astype(np.uint8)).resize((side, side), resampling)
    # The second latent frame stands for four frames, as all later ones do, and the first for one.
    latents = encode_frames(parts, np.repeat(np.asarray(picture)[None], 5, axis=0))[0, :, 1].permute(1, 2, 0).cpu()
    height, width = latents.shape[:2]
    small = np.asarray(picture.resize((width, height), Image.Resampling.BOX), np.float32) / 255.0
    return latents.flatten(0, 1), torch.from_numpy(small).flatten(0, 1)


def _with_one(values: Tensor) -> Tensor:
    """The channels (..., c) and a constant behind them, for the colour of latents that are zero."""
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
