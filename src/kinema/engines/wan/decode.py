"""Latents to frames, one latent frame at a time, so that the encoder can start on the first frames.

The arithmetic is in ``vae/``. A GPU is given the next latent frame before the host waits for the pictures of the last
one. Pictures are handed out when they are known to be finite, so an overflow of float16 is seen before its pictures
are. The film is then decoded again in bfloat16, from its first latent frame, because each depends on those before. What
was handed out stays as it is.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor

from kinema.engines.base import Frames
from kinema.engines.wan.outbox import Outbox, Transfer
from kinema.engines.wan.vae.autoencoder import Vae
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.errors import EngineFailed

log = logging.getLogger(__name__)

# The part of a type's range that the largest number of a trial may need.
_SHARE_OF_RANGE = 1 / 8


def decode(decoder: VaeDecoder, latents: Tensor, outbox: Outbox) -> Generator[Frames, None, None]:
    """Decode normalised latents (1, c, f, h, w), which are finite, to yuv420p frames.

    Chunks from the first one on that overflows float16 are those of a decoder in bfloat16. Raises EngineFailed when
    values are not finite in another type.
    """
    total = latents.shape[2]
    num_done = yield from _decode_finite(decoder, latents, outbox)
    cause = "its weights are damaged"
    if num_done < total and decoder.weights.dtype == torch.float16:
        log.warning("the decode left the range of float16: chunks %d to %d are of bfloat16", num_done + 1, total)
        num_done = yield from _decode_finite(decoder.in_bfloat16(), latents, outbox, num_done)
        cause += ", or too large for float16"
    if num_done < total:
        raise EngineFailed(f"The VAE's decoder gave values that are not finite: {cause}.")


def _decode_finite(
    decoder: VaeDecoder, latents: Tensor, outbox: Outbox, num_before: int = 0
) -> Generator[Frames, None, int]:
    """Yield the chunks behind the first ``num_before``, as long as they are finite; return how many are done then."""
    total, num_done = latents.shape[2], num_before
    sent: deque[Transfer] = deque()
    num_ahead = 1 if latents.is_cuda else 0
    for index, decoded in enumerate(decoder.decode(latents), start=1):
        if index > num_before:
            sent.append(outbox.send(decoded.planes, decoded.total))
        while sent and (len(sent) > num_ahead or index == total):
            planes = sent.popleft().wait()
            if planes is None:
                return num_done
            num_done += 1
            yield Frames(planes, num_done, total)
    return num_done


def make_decoder(name: str, vae: Vae, *, is_recorded: bool, max_idle_bytes: float = math.inf) -> VaeDecoder:
    """A decoder of the type with this name that has been tried out where it is on CUDA; the rest is as ``VaeDecoder``
    has it.

    ``auto`` is float32 on the CPU. On CUDA it is float16, which has the mantissa of the TF32 that float32 would be
    computed in, if the numbers of the trial leave room for larger ones, else bfloat16.
    """
    is_cuda = vae.device.type == "cuda"
    if name == "auto" and not is_cuda:
        log.info("vae_dtype auto: chose float32 on %s", vae.device.type)
    dtype = first_choice(name, vae.device)
    make = partial(VaeDecoder, vae, is_recorded=is_recorded, max_idle_bytes=max_idle_bytes)
    decoder = make(dtype)
    largest = decoder.try_out() if is_cuda else 0.0
    if name != "auto" or not is_cuda:
        return decoder
    if largest > torch.finfo(torch.float16).max * _SHARE_OF_RANGE:
        decoder = make(torch.bfloat16)
        decoder.try_out()
    chosen = decoder.weights.dtype
    log.info("vae_dtype auto: chose %s; the decoder's largest number in a trial is %.0f", chosen, largest)
    return decoder


def first_choice(name: str, device: torch.device) -> torch.dtype:
    """The type with this name; for ``auto`` the one that is tried out first."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
