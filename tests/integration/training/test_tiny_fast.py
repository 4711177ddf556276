"""The training forwards compute what the shipped diffusers classes compute."""

from __future__ import annotations

import numpy as np
import torch

from training.tiny import world


def test_whole_clip_autoencoder_equals_the_cached_one() -> None:
    """Encoding and decoding a clip at once gives what diffusers' frame-by-frame caches give."""
    from training.tiny.fast import FastVae
    from training.tiny.networks import make_vae

    torch.manual_seed(0)
    vae = make_vae()
    clips = world.sample_clips(np.random.default_rng(0), 2, 13)
    frames = world.render(clips, 64, 64)
    with torch.no_grad():
        expected = vae.encode(frames).latent_dist
        mean, log_variance = FastVae(vae).encode(frames)
        torch.testing.assert_close(mean, expected.mean, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(log_variance, expected.logvar, atol=2e-5, rtol=1e-4)
        decoded = FastVae(vae).decode(mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=2e-5, rtol=1e-4)


def test_fast_transformer_equals_the_shipped_class() -> None:
    """Folded pads and two times per clip give what 512 keys and a time per token give."""
    from training.tiny.fast import FastTransformer, embed_text
    from training.tiny.networks import make_transformer

    torch.manual_seed(0)
    model = make_transformer().eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    latents, timestep = torch.randn(2, 16, 3, 8, 12), torch.tensor([713.0, 250.0])
    is_given, lengths = torch.tensor([True, False]), torch.tensor([5, 11])
    hidden = torch.randn(2, 47, 128) * (torch.arange(47) < lengths[:, None])[..., None]
    per_token = timestep[:, None].repeat(1, 3 * 24)
    per_token[0, :24] = 0
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, 512 - 47))
    with torch.no_grad():
        expected = model(latents, per_token, padded).sample
        actual = FastTransformer(model)(latents, timestep, is_given, embed_text(model, hidden, lengths))
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_fast_transformer_takes_the_channels_of_given_frames() -> None:
    """With 36 channels and one time for each clip it gives what diffusers gives."""
    from training.tiny.fast import FastTransformer, embed_text
    from training.tiny.networks import IMAGE_TRANSFORMER_CONFIG, make_transformer

    torch.manual_seed(0)
    model = make_transformer(IMAGE_TRANSFORMER_CONFIG).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    read, timestep = torch.randn(2, 36, 3, 8, 12), torch.tensor([713.0, 250.0])
    hidden, lengths = torch.randn(2, 47, 128), torch.tensor([47, 47])
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, 512 - 47))
    with torch.no_grad():
        expected = model(read, timestep, padded).sample
        text = embed_text(model, hidden, lengths)
        actual = FastTransformer(model)(read, timestep, torch.tensor([False, False]), text)
    assert expected.shape == (2, 16, 3, 8, 12)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_given_frames_are_encoded_as_the_engine_encodes_them() -> None:
    """The mask and the latents of a grey film around a first frame, and around a first and a last one."""
    from diffusers import AutoencoderKLWan

    from kinema.engines.wan.checkpoint import BUNDLED, inspect
    from kinema.engines.wan.conditioning import encode_given
    from kinema.engines.wan.loading import load
    from kinema.engines.wan.placement import Placement
    from training.tiny.fast import FastVae
    from training.tiny.latents import GivenEncoder
    from training.tiny.stream import Format, batches

    torch.manual_seed(0)
    cpu, form = torch.device("cpu"), Format(9, 64, 96)
    vae = AutoencoderKLWan.from_pretrained(BUNDLED["tiny-wan"], subfolder="vae")
    encoder = GivenEncoder(FastVae(vae), vae.config.latents_mean, vae.config.latents_std, cpu)
    batch = next(batches([form], [4], True, 0, False))
    clips, given = encoder(batch, form).split([16, 20], dim=1)
    frames = world.to_uint8(encoder.render(batch, form))
    parts = load(inspect("tiny-wan"), Placement(cpu), torch.float32)
    has_last = [bool(one[3, -1].any()) for one in given]
    assert set(has_last) == {False, True}
    assert not torch.equal(clips, given[:, 4:])
    for one, film, is_last_given in zip(given, frames, has_last, strict=True):
        expected = encode_given(parts, 9, film[0], film[-1] if is_last_given else None)[0]
        torch.testing.assert_close(one, expected, atol=0.03, rtol=0.0)  # pixels are rounded to bytes in between


def test_fast_text_encoder_equals_the_shipped_class() -> None:
    """Masked padding of any length leaves the words' hidden states as transformers computes them."""
    from training.tiny.fast import FastTextEncoder
    from training.tiny.networks import make_text_encoder

    torch.manual_seed(0)
    encoder = make_text_encoder(100).eval()
    tokens = torch.randint(3, 100, (3, 20))
    lengths = torch.tensor([20, 4, 9])
    is_word = torch.arange(20) < lengths[:, None]
    tokens = tokens * is_word
    with torch.no_grad():
        expected = encoder(tokens, is_word.long()).last_hidden_state
        actual = FastTextEncoder(encoder)(tokens)
    torch.testing.assert_close(actual[is_word], expected[is_word], atol=2e-5, rtol=1e-4)
