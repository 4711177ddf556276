"""Prompts through the text encoder on a GPU."""

from __future__ import annotations

import pytest
import torch

from kinema.engines.wan.configs import TextEncoderConfig
from kinema.engines.wan.text_encoder import TextEncoder, shapes
from kinema.engines.wan.text_graphs import PaddedTexts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with CUDA is needed"),
]
CONFIG = TextEncoderConfig(vocab_size=1000, d_model=256, d_kv=32, d_ff=640, num_layers=3, num_heads=8)


def random_encoder(dtype: torch.dtype) -> TextEncoder:
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = {
        name: torch.randn(shape, generator=generator).mul_(1.0 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes(CONFIG).items()
    }
    return TextEncoder(CONFIG, {name: weight.to("cuda", dtype) for name, weight in drawn.items()})


def tokens(count: int) -> list[int]:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.inference_mode()
def test_a_recorded_prompt_is_the_prompt_bit_for_bit() -> None:
    """At each use, beside prompts of other lengths, and after the graphs were dropped for somebody's sake."""
    encoder = random_encoder(torch.bfloat16)
    plain, recorded = PaddedTexts(encoder, has_graphs=False), PaddedTexts(encoder, has_graphs=True)
    counts = (1, 20, 32, 33, 100, 128, 300, 512)
    expected = {count: plain(tokens(count)) for count in counts}
    for _ in range(3):
        for count in counts:
            made = recorded(tokens(count))
            assert made.shape == (1, count, CONFIG.d_model)
            assert torch.equal(made, expected[count]), count
    assert recorded.graph_bytes > 0
    recorded.drop_graphs()
    assert recorded.graph_bytes == 0
    assert torch.equal(recorded(tokens(33)), expected[33])


@torch.inference_mode()
def test_padding_changes_a_prompt_by_rounding_alone() -> None:
    encoder = random_encoder(torch.float32)
    padded = PaddedTexts(encoder, has_graphs=True)
    for count in (1, 20, 31, 200, 31):
        torch.testing.assert_close(padded(tokens(count)), encoder(tokens(count)), rtol=2e-2, atol=2e-3)
