"""The decoder's numbers as pictures: colours for people, and the planes that an encoder takes.

The planes are BT.709 in its limited range, with the colour at half the rows and columns as the mean of four pixels.
``media/mp4.py`` makes the same of RGB; here it is computed from the decoder's numbers in one go, not from rounded RGB.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R BT.709-6, 3.2: the luma of red, green and blue; and 3.3: the range of blue and red less luma.
RED, GREEN, BLUE = 0.2126, 0.7152, 0.0722
BLUE_RANGE, RED_RANGE = 1.8556, 1.5748


def to_rgb(raw: Tensor, patch_size: int) -> Tensor:
    """The decoder's numbers (t, h, w, c) float32 as colours (t, h, w, 3) float32 in [0, 1]."""
    frames, height, width, _ = raw.shape
    # As in diffusers' ``unpatchify``: a channel is a colour, then a column and a row of the patch.
    patches = raw.view(frames, height, width, 3, patch_size, patch_size)
    unfolded = patches.permute(0, 1, 5, 2, 4, 3).reshape(frames, height * patch_size, width * patch_size, 3)
    return (unfolded * 0.5 + 0.5).clamp(0.0, 1.0)


def to_planes(raw: Tensor, patch_size: int) -> Tensor:
    """The decoder's numbers (t, h, w, c) float32 as yuv420p (t, h * 3/2, w) uint8: luma, then blue and red, a quarter
    of the pixels each.
    """
    frames, height, width = raw.shape[0], raw.shape[1] * patch_size, raw.shape[2] * patch_size
    planes = raw.new_empty((frames, height * 3 // 2, width), dtype=torch.uint8)
    rgb = to_rgb(raw, patch_size)
    luma = rgb @ rgb.new_tensor([RED, GREEN, BLUE])
    quarter = rgb.view(frames, height // 2, 2, width // 2, 2, 3).mean(dim=(2, 4))
    mean_luma = quarter @ rgb.new_tensor([RED, GREEN, BLUE])
    blue = 128.0 + 224.0 * (quarter[..., 2] - mean_luma) / BLUE_RANGE
    red = 128.0 + 224.0 * (quarter[..., 0] - mean_luma) / RED_RANGE
    levels = [16.0 + 219.0 * luma, blue, red]
    flat = torch.cat([plane.flatten(1) for plane in levels], dim=1)
    return planes.copy_((flat + 0.5).floor().view_as(planes))
