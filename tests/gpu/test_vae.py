"""The VAE's decoder on a GPU: each kernel against what torch says, and the whole against diffusers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.decode import make_decoder
from kinema.engines.wan.vae import pixels
from kinema.engines.wan.vae.decoder import VaeDecoder, choose_decoder_operations
from kinema.engines.wan.vae.decoder_operations import (
    DecoderOperations,
    Pairs,
    Sum,
    TorchDecoderOperations,
)
from tests.integration.wan.random_checkpoints import make_vae
from tests.integration.wan.taken import own_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with CUDA is needed"),
]
HALVES = [torch.float16, torch.bfloat16]
# What the kernels are compared with: float32, on a CPU.
TORCHS = TorchDecoderOperations(torch.device("cpu"), torch.float32)


def kernels(dtype: torch.dtype = torch.float16) -> DecoderOperations:
    """The kernels, which are chosen on CUDA."""
    chosen = choose_decoder_operations(torch.device("cuda"), dtype)
    assert not isinstance(chosen, TorchDecoderOperations)
    return chosen


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(sum(size))).to("cuda", dtype)


def make_sum(channels: int, dtype: torch.dtype) -> Sum:
    """Two frames of an odd size, with a bias and a residual."""
    value = random(2, 7, 13, channels, dtype=dtype)
    return Sum(value, random(channels), value.flip(0).contiguous())


def make_pairs(channels: int, dtype: torch.dtype, *, in_pairs: bool) -> Sum:
    """Four frames of an odd size, with a bias and a residual."""
    m0, m1, m2, m3 = (random(2, 7, 13, channels, dtype=dtype).roll(number) for number in range(4))
    value = Pairs((m0, m1, m2, m3)) if in_pairs else torch.cat([m0, m1])
    return Sum(value, random(channels), torch.cat([m2, m1]))


def on_cpu(parts: Sum) -> Sum:
    residual = None if parts.residual is None else parts.residual.cpu().float()
    if isinstance(parts.value, Pairs):
        m0, m1, m2, m3 = (product.cpu().float() for product in parts.value.products)
        value: Tensor | Pairs = Pairs((m0, m1, m2, m3))
    else:
        value = parts.value.cpu().float()
    return Sum(value, None if parts.bias is None else parts.bias.cpu(), residual)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [16, 24, 96, 384, 1024])
@pytest.mark.parametrize("has_silu", [True, False])
def test_normalise_is_one_rounding_from_float32(channels: int, dtype: torch.dtype, has_silu: bool) -> None:
    """Norm and SiLU of a sum, written among wider rows, which keep what was beside it; the sum is kept bit for bit."""
    parts, gain = make_sum(channels, dtype), random(channels).abs() * channels**0.5
    rows = torch.full((2, 7, 13, channels + 64), 7.0, device="cuda", dtype=dtype)
    expected = torch.empty(2, 7, 13, channels)
    exact, kept = torch.empty_like(expected), parts.value
    assert isinstance(kept, Tensor)
    TORCHS.normalise(on_cpu(parts), gain.cpu(), expected, kept=exact, has_silu=has_silu)
    kernels(dtype).normalise(parts, gain, rows[..., :channels], kept=kept, has_silu=has_silu)
    torch.testing.assert_close(rows[..., :channels].cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.all(rows[..., channels:] == 7.0)
    assert torch.equal(kept.cpu(), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [24, 96, 384])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_pairs_are_two_roundings_from_float32(channels: int, dtype: torch.dtype, in_pairs: bool) -> None:
    """What a convolution reads that computes two frames together, and the frames that stay for the next step."""
    parts, gain = make_pairs(channels, dtype, in_pairs=in_pairs), random(channels).abs() * channels**0.5
    rows = random(2, 7, 13, channels + 32, dtype=dtype)
    before, exact_before = rows[..., :channels], rows[..., :channels].cpu().float()
    out, expected = torch.empty(4, 2, 7, 13, channels, device="cuda", dtype=dtype), torch.empty(4, 2, 7, 13, channels)
    kept, exact_kept = torch.empty(4, 7, 13, channels, device="cuda", dtype=dtype), torch.empty(4, 7, 13, channels)
    TORCHS.normalise_pairs(on_cpu(parts), gain.cpu(), exact_before, expected, kept=exact_kept)
    kernels(dtype).normalise_pairs(parts, gain, before, out, kept=kept)
    eps, largest = torch.finfo(dtype).eps, float(expected.abs().max())
    torch.testing.assert_close(out.cpu().float(), expected, rtol=eps, atol=eps * largest)
    torch.testing.assert_close(before.cpu().float(), exact_before, rtol=eps, atol=1e-6)
    torch.testing.assert_close(kept.cpu(), exact_kept.to(dtype), rtol=eps, atol=eps * float(exact_kept.abs().max()))


@pytest.mark.parametrize("dtype", HALVES)
def test_frames_of_pairs_are_added_up_everywhere(dtype: torch.dtype) -> None:
    """Where they are stored, enlarged, and normalised for a convolution that gets each frame."""
    parts = make_pairs(96, dtype, in_pairs=True)
    exact = on_cpu(parts)
    assert isinstance(exact.value, Pairs)
    whole = Sum(exact.value.add_up(), exact.bias, exact.residual)
    eps = torch.finfo(dtype).eps
    close = partial(torch.testing.assert_close, rtol=eps, atol=4 * eps)
    stored, plain = torch.empty(4, 7, 13, 96, device="cuda", dtype=dtype), torch.empty(4, 7, 13, 96)
    kernels(dtype).store(parts, stored)
    TORCHS.store(whole, plain)
    close(stored.cpu().float(), plain)
    close(kernels(dtype).enlarge(parts).cpu().float(), TORCHS.enlarge(whole))
    gain = random(96).abs() * 96**0.5
    kernels(dtype).normalise(parts, gain, stored, kept=None)
    TORCHS.normalise(whole, gain.cpu(), plain, kept=None)
    close(stored.cpu().float(), plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("has_residual", [True, False])
def test_enlarge_and_store_copy_exactly(dtype: torch.dtype, num_parts: int, has_residual: bool) -> None:
    """Every value goes to its four pixels, and to its frame, as it is."""
    parts = make_sum(96, dtype)
    if not has_residual:
        parts = Sum(parts.value, parts.bias)
    expected = TORCHS.enlarge(on_cpu(parts), num_parts).to(dtype)
    assert torch.equal(kernels(dtype).enlarge(parts, num_parts).cpu(), expected)
    stored, plain = torch.empty(parts.value.shape, device="cuda", dtype=dtype), torch.empty(parts.value.shape)
    kernels(dtype).store(parts, stored)
    TORCHS.store(on_cpu(parts), plain)
    assert torch.equal(stored.cpu(), plain.to(dtype))


@pytest.mark.parametrize("num_channels", [3, 12])
def test_gather_adds_the_nine_taps_up(num_channels: int) -> None:
    """In float32, to the pixels that they are for."""
    taps, bias = random(2, 7, 13, 9 * num_channels + 5, dtype=torch.float16), random(num_channels)
    expected = TORCHS.gather(taps.cpu().float(), bias.cpu())
    torch.testing.assert_close(kernels().gather(taps, bias).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_planes_are_those_of_the_cpu(patch_size: int) -> None:
    """But for a level where a value lies between two."""
    raw = 0.8 * random(3, 32 // patch_size, 48 // patch_size, 3 * patch_size**2)
    made, expected = kernels().to_planes(raw, patch_size).cpu(), pixels.to_planes(raw.cpu(), patch_size)
    difference = (made.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_attention_equals_torchs_own() -> None:
    """To the rounding of its weights."""
    query, key, value = (random(2, 300, channels, dtype=torch.float16) for channels in (384, 384, 384))
    exact = functional.scaled_dot_product_attention(*(x[:, None].double() for x in (query, key, value)))[:, 0]
    made = kernels().attend(query, key, value).double()
    assert (made - exact).norm() / exact.norm() < 1e-3


def wide_vae(*, is_patched: bool) -> AutoencoderKLWan:
    """With the numbers of channels that the real ones have, one block deep."""
    torch.manual_seed(3)
    common = {"z_dim": 16, "num_res_blocks": 1, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    if is_patched:
        extra = {
            "base_dim": 32,
            "decoder_base_dim": 128,
            "dim_mult": [1, 4, 4],
            "temperal_downsample": [True, True],
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "is_residual": True,
        }
    else:
        extra = {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    return AutoencoderKLWan(**common, **extra).eval().cuda()


@torch.inference_mode()
def decoded(decoder: VaeDecoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (f, h, w, 3) in [0, 1] and planes of the whole film."""
    found = [(decoder.to_rgb(part).clone(), part.planes.clone()) for part in decoder.decode(latents)]
    return torch.cat([rgb for rgb, _ in found]), torch.cat([planes for _, planes in found])


@torch.inference_mode()
def theirs(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    pictures = vae.decode(latents.to(vae.dtype)).sample[0].permute(1, 2, 3, 0)
    return (pictures.double() * 0.5 + 0.5).clamp(0.0, 1.0)


@pytest.mark.parametrize("is_patched", [False, True], ids=["2.1", "2.2"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_decode_is_closer_to_float64_than_diffusers_in_the_same_type(is_patched: bool, dtype: torch.dtype) -> None:
    """Of a whole film; and recorded as graphs it is bit for bit what it is without."""
    vae, latents = wide_vae(is_patched=is_patched), random(1, 16, 3, 12, 20)
    exact = theirs(copy.deepcopy(vae).double(), latents)
    their_error = (theirs(copy.deepcopy(vae).to(dtype), latents) - exact).norm()
    made = decoded(VaeDecoder(own_vae(vae), dtype), latents)
    plain = decoded(VaeDecoder(own_vae(vae), dtype, is_recorded=False), latents)
    assert (made[0].double() - exact).norm() <= their_error
    assert all(torch.equal(one, other) for one, other in zip(made, plain, strict=True))


@pytest.mark.parametrize("is_recorded", [True, False])
def test_films_leave_each_other_alone(is_recorded: bool) -> None:
    """One that is given up, one of another size, and two that take turns: each is what it is alone."""
    decoder = VaeDecoder(own_vae(make_vae(is_patched=False).cuda()), torch.float16, is_recorded=is_recorded)
    one, other, wide = random(1, 4, 3, 8, 8), random(1, 4, 3, 8, 8) + 1, random(1, 4, 2, 8, 12)
    alone = [decoded(decoder, latents)[1] for latents in (one, other, wide)]
    with torch.inference_mode():
        abandoned = decoder.decode(other)
        next(abandoned), next(abandoned)
        abandoned.close()
        assert torch.equal(decoded(decoder, one)[1], alone[0])
        turns = [decoder.decode(latents) for latents in (one, other, wide)]
        found: list[list[Tensor]] = [[], [], []]
        for _ in range(3):
            for parts, turn in zip(found, turns, strict=True):
                if (part := next(turn, None)) is not None:
                    parts.append(part.planes.clone())
    assert all(torch.equal(torch.cat(parts), expected) for parts, expected in zip(found, alone, strict=True))


def test_the_type_is_chosen_by_a_trial() -> None:
    """float16 while the decoder's numbers leave room, bfloat16 for one whose numbers do not; what is named is taken."""
    vae = own_vae(make_vae(is_patched=False).cuda())

    def chosen(name: str) -> torch.dtype:
        return make_decoder(name, vae, is_recorded=True).weights.dtype

    assert chosen("auto") == torch.float16
    assert chosen("float32") == torch.float32
    vae.weights["decoder.conv_in.weight"] *= 1e6
    assert chosen("auto") == torch.bfloat16
