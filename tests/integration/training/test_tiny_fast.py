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
