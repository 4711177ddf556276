"""Latents to frames, one latent frame at a time, so that the encoder can start on the first frames.

The arithmetic is in ``vae/``. A GPU is given the next latent frame before the host waits for the pictures of the last
one.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kinema.engines.base import Frames
from kinema.engines.wan.outbox import Outbox, Transfer
from kinema.engines.wan.vae.decoder import VaeDecoder

log = logging.getLogger(__name__)

# The part of a type's range that the largest number of a trial may need.
_SHARE_OF_RANGE = 1 / 8
# Latent frames, rows and columns of the trial, and its noise: latents have a standard deviation of one.
_TRIAL_SIZE, _TRIAL_SCALE = (3, 32, 32), 2.0


def decode(decoder: VaeDecoder, latents: Tensor, outbox: Outbox) -> Iterator[Frames]:
    """Decode normalised latents (1, c, f, h, w) to yuv420p frames. Raises EngineFailed when a number is not finite."""
    total = latents.shape[2]
    sent: deque[Transfer] = deque()
    num_ahead = 1 if latents.is_cuda else 0
    for index, decoded in enumerate(decoder.decode(latents), start=1):
        sent.append(outbox.send(decoded.planes, decoded.total))
        if index > num_ahead:
            yield Frames(sent.popleft().wait(), index - num_ahead, total)
    while sent:
        yield Frames(sent.popleft().wait(), total - len(sent), total)


@torch.inference_mode()
def choose_vae_dtype(name: str, vae: Any) -> torch.dtype:  # noqa: ANN401 - diffusers' AutoencoderKLWan
    """The type to decode in. ``auto`` is float32 on the CPU.

    On CUDA ``auto`` is float16, which has the mantissa of TF32, in which float32 would be computed; it is bfloat16 when
    the numbers of a trial leave too little room for larger ones.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if vae.device.type != "cuda":
        log.info("vae_dtype auto: chose float32 on %s", vae.device.type)
        return torch.float32
    largest = _largest_number(vae)
    limit = torch.finfo(torch.float16).max * _SHARE_OF_RANGE
    dtype = torch.float16 if largest <= limit else torch.bfloat16
    log.info("vae_dtype auto: chose %s; the decoder's largest number in a trial is %.0f", dtype, largest)
    return dtype


def _largest_number(vae: Any) -> float:  # noqa: ANN401
    """The largest number that a module of the decoder gives for noise; infinity when one is not finite."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output.abs().amax()))
        for module in vae.decoder.modules()
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d) or hasattr(module, "conv1")
    ]
    try:
        noise = torch.randn((1, vae.config.z_dim, *_TRIAL_SIZE), generator=torch.Generator("cpu").manual_seed(0))
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        vae.decode((_TRIAL_SCALE * noise * std + mean).to(vae.device))
    finally:
        for hook in hooks:
            hook.remove()
    largest = torch.stack(found).amax().item()
    return largest if math.isfinite(largest) else math.inf
