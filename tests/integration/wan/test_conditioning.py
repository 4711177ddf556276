"""Prompts: encoded at their own length, kept for a while, and the same to the bit when they are found again.

Given frames: the film around them is encoded with the bits of one that is encoded as a whole, and with less work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kinema.engines.base import Frames
from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.engines.wan.conditioning import PromptCache, encode_given, encode_text, latent_statistics
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.loading import Components, load
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.vae.encoder import CausalConvolution, Memory
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_ti2v, save_wan21

PROMPTS = ["a red circle moving right", "", "a &amp; b  c", "green " * 600]


@pytest.fixture(scope="module")
def parts() -> Components:
    return load(inspect("tiny-wan"), Placement(torch.device("cpu")), torch.float32)


class Counted:
    """A text encoder that counts what it is asked for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.lengths: list[int] = []

    def __call__(self, tokens: list[int]) -> Any:
        self.lengths.append(len(tokens))
        return self._inner(tokens)


@pytest.fixture
def counted(parts: Components) -> Components:
    return replace(parts, text_encoder=Counted(parts.text_encoder))


@torch.inference_mode()
def test_the_same_as_encoding_with_padding(parts: Components) -> None:
    """diffusers encodes 512 tokens with a mask and puts zeros over the padding; we encode the prompt's own alone."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(str(BUNDLED["tiny-wan"]), dtype=torch.float32)
    for prompt in PROMPTS:
        theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        own = encode_text(parts, prompt)
        padded = torch.nn.functional.pad(own, (0, 0, 0, 512 - own.shape[1]))
        torch.testing.assert_close(padded, theirs, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_found_again_to_the_bit(counted: Components) -> None:
    """A prompt that was kept is not encoded again, and its tensor is the one that encoding gives."""
    cache = PromptCache(counted, pinned="")
    first = [cache.encode(prompt) for prompt in PROMPTS]
    num_encoded = len(counted.text_encoder.lengths)
    again = [cache.encode(prompt) for prompt in PROMPTS]
    assert len(counted.text_encoder.lengths) == num_encoded == len(PROMPTS)
    assert max(counted.text_encoder.lengths) == 512
    for one, other, prompt in zip(first, again, PROMPTS, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, encode_text(counted, prompt))


@torch.inference_mode()
def test_what_is_read_is_the_readers_own(parts: Components) -> None:
    """Whoever changes what it got changes nothing for others, whatever the prompt's length."""
    cache = PromptCache(parts, pinned="bad")
    for prompt in ("bad", *PROMPTS):
        cache.encode(prompt).fill_(7.0)
        assert torch.equal(cache.encode(prompt), encode_text(parts, prompt))


@torch.inference_mode()
def test_bounded_by_entries(counted: Components) -> None:
    """The prompt that was used longest ago goes first; the pinned one stays without counting."""
    cache = PromptCache(counted, pinned="bad", max_entries=2)
    for prompt in ("bad", "a", "b", "a", "c"):
        cache.encode(prompt)
    assert len(cache) == 2
    num_encoded = len(counted.text_encoder.lengths)
    for prompt in ("a", "c", "bad"):
        cache.encode(prompt)
    assert len(counted.text_encoder.lengths) == num_encoded
    cache.encode("b")
    assert len(counted.text_encoder.lengths) == num_encoded + 1


@torch.inference_mode()
def test_bounded_by_bytes(parts: Components) -> None:
    """Kept are a prompt's own tokens, and no more bytes of them than allowed, not even for one prompt."""
    cache = PromptCache(parts, pinned="", max_bytes=20 * 128 * 4)
    for prompt in ("one two three", "four five six", "seven eight nine", "ten eleven twelve"):
        cache.encode(prompt)
        assert 0 < cache.size_bytes <= 20 * 128 * 4
    cache.encode("green " * 600)
    assert len(cache) == 0


def test_a_film_is_the_same_with_its_prompt_kept() -> None:
    """The first video of an engine and the second have the same bytes, guided by the usual negative prompt or not."""
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    engine.load()
    for guidance_scale in (1.0, 4.0):
        options = GenerationOptions(
            prompt="a blue square", size="64x64", num_frames=5, seed=1, num_inference_steps=2
        ).model_copy(update={"guidance_scale": guidance_scale})
        request = resolve(options, engine.capabilities).request
        first, second = (
            np.concatenate([output.data for output in engine.generate(request) if isinstance(output, Frames)])
            for _ in range(2)
        )
        assert np.array_equal(first, second)


@pytest.fixture(scope="module", params=["wan21", "ti2v"])
def either_vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Components:
    """With the VAE of Wan 2.1 or that of Wan 2.2."""
    save = {"wan21": save_wan21, "ti2v": save_ti2v}[request.param]
    checkpoint = inspect(str(save(tmp_path_factory.mktemp("checkpoints") / request.param)))
    return load(checkpoint, Placement(torch.device("cpu")), torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize("has_last_frame", [False, True], ids=["first", "first and last"])
def test_a_film_that_is_mostly_grey_has_the_bits_of_any_film(
    has_last_frame: bool, either_vae: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though layers that give the same again are not computed: of 30 groups of grey frames the first convolution sees
    the first few alone.
    """
    encoder, num_later = either_vae.vae.encoder, 30
    first, last = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    film = torch.zeros(1, 3, 1 + 4 * num_later, 32, 32)
    film[:, :, 0] = as_pixels(first)
    if has_last_frame:
        film[:, :, -1] = as_pixels(last)
    memory: Memory = {}
    groups = [film[:, :, :1], *film[:, :, 1:].split(4, dim=2)]
    mode = encoder.mode(torch.cat([encoder.hidden(group, memory) for group in groups], dim=2))
    mean, std = latent_statistics(either_vae)
    calls = []
    compute = CausalConvolution.__call__

    def count(layer: CausalConvolution, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        calls.append(layer)
        return compute(layer, x, memory)

    monkeypatch.setattr(CausalConvolution, "__call__", count)
    given = encode_given(either_vae, 1 + 4 * num_later, first, last if has_last_frame else None)
    assert torch.equal(given[:, 4:], (mode - mean) / std)
    assert calls.count(calls[0]) < 10
    mask = torch.zeros(1, 4, 1 + num_later, *given.shape[3:])
    mask[:, :, 0] = 1
    mask[:, 3, -1] = float(has_last_frame)
    assert torch.equal(given[:, :4], mask)


def as_pixels(picture: np.ndarray) -> torch.Tensor:
    return 2.0 * (torch.from_numpy(picture).permute(2, 0, 1) / 255.0) - 1.0
