"""The streaming decoder makes what diffusers' own makes of the same weights and latents, on the CPU."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import BUNDLED
from kinema.engines.wan.decode import decode, make_decoder
from kinema.engines.wan.outbox import Outbox
from kinema.engines.wan.vae import decoder as decoder_module
from kinema.engines.wan.vae.autoencoder import vae_shapes
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.engines.wan.vae.encoder import Memory
from kinema.errors import EngineFailed
from tests.integration.wan.random_checkpoints import make_vae
from tests.integration.wan.taken import own_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@pytest.fixture(scope="module", params=["2.1", "2.2", "tiny-wan"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """With every bias and gain away from what it begins as."""
    if request.param == "tiny-wan":
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan.from_pretrained(str(BUNDLED["tiny-wan"]), subfolder="vae").eval()
    torch.manual_seed(5)
    made = make_vae(is_patched=request.param == "2.2")
    for name, weights in made.named_parameters():
        if name.endswith(("gamma", "bias")):
            weights.data += 0.3 * torch.randn_like(weights)
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["frame by frame", "in pairs"])
def has_pairs(request: pytest.FixtureRequest) -> bool:
    """Whether convolutions compute two frames together, as they do on CUDA in 16 bits."""
    return bool(request.param)


@pytest.fixture(scope="module")
def decoder(vae: AutoencoderKLWan, has_pairs: bool) -> VaeDecoder:
    return VaeDecoder(own_vae(vae), torch.float32, has_pairs=has_pairs)


def noise(vae: AutoencoderKLWan, frames: int, seed: int = 0, width: int = 5) -> Tensor:
    """Latents (1, c, f, 4, w)."""
    return torch.randn(1, vae.config.z_dim, frames, 4, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def ours(decoder: VaeDecoder, latents: Tensor) -> Tensor:
    return torch.cat([decoder.to_rgb(decoded).clone() for decoded in decoder.decode(latents)])


@torch.inference_mode()
def theirs(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Colours (f, h, w, 3) in [0, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std + mean).sample[0].permute(1, 2, 3, 0) * 0.5 + 0.5


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_stream_equals_diffusers(vae: AutoencoderKLWan, decoder: VaeDecoder, frames: int) -> None:
    """A frame at a time or the whole film: to a few roundings of float32."""
    latents = noise(vae, frames)
    torch.testing.assert_close(ours(decoder, latents), theirs(vae, latents), rtol=1e-5, atol=2e-6)


def test_a_film_that_is_given_up_leaves_nothing(vae: AutoencoderKLWan, decoder: VaeDecoder, has_pairs: bool) -> None:
    """The next film of its size, and one of another, are what they are in a decoder of their own."""
    with torch.inference_mode():
        abandoned = decoder.decode(noise(vae, 5, seed=1))
        next(abandoned), next(abandoned)
        abandoned.close()
    for width in (5, 6):
        latents = noise(vae, 2, width=width)
        other = VaeDecoder(own_vae(vae), torch.float32, has_pairs=has_pairs)
        assert torch.equal(ours(decoder, latents), ours(other, latents))


@torch.inference_mode()
def test_films_that_take_turns_equal_films_alone(vae: AutoencoderKLWan, decoder: VaeDecoder) -> None:
    """Bit for bit, of one size."""
    films = [noise(vae, 3, seed) for seed in (1, 2)]
    alone = [ours(decoder, latents) for latents in films]
    turns = zip(*(decoder.decode(latents) for latents in films), strict=True)
    together = [[decoder.to_rgb(part).clone() for part in parts] for parts in turns]
    for made, expected in zip(zip(*together, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(made), expected)


@torch.inference_mode()
def test_what_are_no_numbers_is_an_error(vae: AutoencoderKLWan, decoder: VaeDecoder) -> None:
    """Instead of a black film."""
    latents = noise(vae, 2)
    latents[..., 1, :, :] = torch.nan
    frames = decode(decoder, latents, Outbox())
    assert next(frames).index == 1
    with pytest.raises(EngineFailed, match="its weights are damaged"):
        next(frames)


def test_the_cpu_decodes_in_float32(vae: AutoencoderKLWan, caplog: pytest.LogCaptureFixture) -> None:
    """And says so; a type that is named is taken."""
    with caplog.at_level("INFO"):
        assert make_decoder("auto", own_vae(vae), is_recorded=False).weights.dtype == torch.float32
    assert "chose float32 on cpu" in caplog.text
    assert make_decoder("bfloat16", own_vae(vae), is_recorded=False).weights.dtype == torch.bfloat16


@torch.inference_mode()
def _largest_by_hooks(vae: AutoencoderKLWan, latents: Tensor) -> float:
    """The largest number that a convolution or a residual block of diffusers' decoder gives."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output.abs().amax()))
        for module in vae.decoder.modules()
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d) or hasattr(module, "conv1")
    ]
    try:
        theirs(vae, latents)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).amax().item()


@pytest.fixture
def _small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_TRIAL_SIZE", (3, 4, 4))


@pytest.mark.usefixtures("_small_trial")
def test_a_trial_finds_the_largest_number(vae: AutoencoderKLWan, decoder: VaeDecoder, has_pairs: bool) -> None:
    """It misses none of those that a layer of diffusers' decoder gives for the same noise, and one without a bias, or
    in a sum of which the rest is negative, may be larger."""
    noise = torch.randn(vae.config.z_dim, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = _largest_by_hooks(vae, 2.0 * noise[None])
    assert 0.999 * expected <= decoder.try_out() <= (2.0 if has_pairs else 1.5) * expected


@pytest.mark.usefixtures("_small_trial")
@pytest.mark.parametrize("name", ["decoder.mid_block.attentions.0.to_qkv.weight", "decoder.conv_in.weight"])
def test_a_trial_notices_a_number_that_is_none(vae: AutoencoderKLWan, name: str) -> None:
    """What is too large for the type is infinite, or no number at all."""
    own = own_vae(vae)
    own.weights[name] = own.weights[name] * 1e39
    assert VaeDecoder(own, torch.float32).try_out() == math.inf


def test_names_and_shapes_are_those_of_the_module(vae: AutoencoderKLWan) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert vae_shapes(own_vae(vae).config) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_every_bit_of_an_encoded_film_is_that_of_diffusers(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    """A picture alone, and films whose frames come four at a time, by turns with another one."""
    module = copy.deepcopy(vae).to(dtype)
    encoder = own_vae(module).encoder
    pixels = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(2)).to(dtype) * 2 - 1
    memories = Memory(), Memory()
    hidden: list[list[Tensor]] = [[], []]
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        for film in range(2):
            hidden[film].append(encoder.hidden(pixels[film : film + 1, :, start:stop], memories[film]))
    for film in range(2):
        for count in (1, 3):
            frames = pixels[film : film + 1, :, : 4 * count - 3]
            expected = module.encode(frames).latent_dist.mode()
            assert torch.equal(encoder.mode(torch.cat(hidden[film][:count], dim=2)), expected)
