"""The counts of ``kinema bench engine`` are those that were worked out by hand for the published models."""

from __future__ import annotations

import pytest

from kinema.bench.wan.architectures import ARCHITECTURES, UMT5_XXL
from kinema.bench.wan.flops import Work, count_tokens, decode_work, forward_work, text_work
from kinema.request.shapes import Size


@pytest.mark.parametrize(
    ("name", "size", "num_frames", "num_tokens", "tera", "attention_share"),
    [
        ("wan2.1-t2v-1.3b", "832x480", 17, 7_800, 31.6, 0.35),
        ("wan2.1-t2v-1.3b", "832x480", 81, 32_760, 283.0, 0.70),
        ("wan2.1-t2v-14b", "832x480", 81, 32_760, 1678, 0.52),
        ("wan2.1-t2v-14b", "1280x720", 81, 75_600, 6523, 0.72),
        ("wan2.2-ti2v-5b", "1280x704", 121, 27_280, 517, 0.53),
    ],
)
def test_a_forward_pass_has_its_operations(
    name: str, size: str, num_frames: int, num_tokens: int, tera: float, attention_share: float
) -> None:
    """Tokens, TFLOP and the part of self-attention, at the published sizes."""
    architecture = ARCHITECTURES[name]
    assert count_tokens(architecture.transformer, architecture.vae, Size.parse(size), num_frames) == num_tokens
    work = forward_work(architecture.transformer, num_tokens)
    assert work.total / 1e12 == pytest.approx(tera, rel=2e-3)
    assert work.attention / work.total == pytest.approx(attention_share, abs=0.01)


@pytest.mark.parametrize(
    ("name", "size", "num_frames", "tera"),
    [
        ("wan2.1-t2v-1.3b", "832x480", 17, 58.6),
        ("wan2.1-t2v-1.3b", "832x480", 81, 275),
        ("wan2.1-t2v-14b", "1280x720", 81, 639),
        ("wan2.2-ti2v-5b", "1280x704", 121, 2011),
    ],
)
def test_a_decode_has_its_operations(name: str, size: str, num_frames: int, tera: float) -> None:
    """The TFLOP of both VAEs."""
    work = decode_work(ARCHITECTURES[name].vae, Size.parse(size), num_frames)
    assert work.total / 1e12 == pytest.approx(tera, rel=5e-3)


def test_a_prompt_has_its_operations() -> None:
    """UMT5-XXL, padded to 512 tokens and at a usual length."""
    assert text_work(UMT5_XXL, 512).total / 1e12 == pytest.approx(4.84, rel=2e-3)
    assert text_work(UMT5_XXL, 64).total / 1e12 == pytest.approx(0.6, rel=0.02)


def test_work_adds_up() -> None:
    """Each kind by itself."""
    assert Work(1, 2) * 3 + Work(4, 5) == Work(7, 11)
