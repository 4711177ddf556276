"""Frames from a GPU to the host: all of them, in order, while memory is used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

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
def test_an_overflow_of_float16_goes_on_in_bfloat16() -> None:
    """The chunks that were handed out stay, and the film after it is what it was."""
    decoder, outbox = VaeDecoder(own_vae(make_vae(is_patched=False).cuda()), torch.float16), Outbox()
    whole = torch.randn(1, 4, 4, 8, 8, device="cuda")
    latents = whole.clone()
    latents[:, :, 2:] *= 1e6

    def chunks(by: VaeDecoder, given: Tensor) -> list[bytes]:
        return [chunk.data.tobytes() for chunk in decode(by, given, outbox)]

    before = chunks(decoder, whole)
    assert chunks(decoder, latents) == before[:2] + chunks(decoder.in_bfloat16(), latents)[2:]
    assert chunks(decoder, whole) == before
    assert outbox.held_bytes == 0


@torch.inference_mode()
def test_what_are_no_numbers_is_an_error() -> None:
    """Instead of a black film, in the second type too."""
    decoder = VaeDecoder(own_vae(make_vae(is_patched=False).cuda()), torch.float16)
    latents = torch.full((1, 4, 2, 8, 8), torch.nan, device="cuda")
    with pytest.raises(EngineFailed, match="its weights are damaged"):
        list(decode(decoder, latents, Outbox()))


@torch.inference_mode()
def test_a_full_outbox_waits_and_goes_on() -> None:
    """Frames that nobody lets go of hold the device up for a moment each, and never for good."""
    decoder = VaeDecoder(own_vae(make_vae(is_patched=True).cuda()), torch.float16)
    outbox = Outbox(room_bytes=1, patience_s=0.01)
    latents = torch.randn(1, 4, 3, 8, 8, device="cuda")
    chunks = list(decode(decoder, latents, outbox))
    assert np.concatenate([chunk.data for chunk in chunks]).shape == (9, 96, 64)
