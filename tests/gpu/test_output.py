"""Frames from a GPU to the host: all of them, in order, while memory is used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinema.engines.wan.decode import decode
from kinema.engines.wan.outbox import Outbox
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.errors import EngineFailed
from tests.integration.wan.random_checkpoints import make_vae
from tests.integration.wan.taken import own_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with CUDA is needed"),
]


@torch.inference_mode()
def test_frames_stay_as_they_were() -> None:
    """Held to the end or dropped at once, the same bytes come; and nothing is held when all let go."""
    decoder, outbox = VaeDecoder(own_vae(make_vae(is_patched=True).cuda()), torch.float16), Outbox()
    latents = torch.randn(1, 4, 6, 8, 8, device="cuda")
    held = list(decode(decoder, latents, outbox))
    dropped = [chunk.data.tobytes() for chunk in decode(decoder, latents, outbox)]
    assert [chunk.data.tobytes() for chunk in held] == dropped
    assert [(chunk.index, chunk.total, len(chunk.data)) for chunk in held] == [(1, 6, 1)] + [
        (i, 6, 4) for i in range(2, 7)
    ]
    held.clear()
    assert outbox.held_bytes == 0


@torch.inference_mode()
def test_numbers_out_of_range_are_an_error() -> None:
    """Whoever gets no picture is told which setting would give one."""
    decoder = VaeDecoder(own_vae(make_vae(is_patched=False).cuda()), torch.float16)
    latents = torch.full((1, 4, 2, 8, 8), 1e30, device="cuda")
    with pytest.raises(EngineFailed, match="vae_dtype"):
        list(decode(decoder, latents, Outbox()))


@torch.inference_mode()
def test_a_full_outbox_waits_and_goes_on() -> None:
    """Frames that nobody lets go of hold the device up for a moment each, and never for good."""
    decoder = VaeDecoder(own_vae(make_vae(is_patched=True).cuda()), torch.float16)
    outbox = Outbox(room_bytes=1, patience_s=0.01)
    latents = torch.randn(1, 4, 3, 8, 8, device="cuda")
    chunks = list(decode(decoder, latents, outbox))
    assert np.concatenate([chunk.data for chunk in chunks]).shape == (9, 96, 64)
