"""The counts of ``kinema bench engine`` are those of torch's own counter, on small models of each published style."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinema.bench.wan.flops import count_tokens, decode_work, forward_work, text_work
from kinema.request.shapes import Size
from tests.integration.wan.random_checkpoints import Z_DIM, save_flf2v, save_i2v21, save_ti2v, save_wan21

SIZE, NUM_FRAMES = Size.parse("64x32"), 9


@pytest.fixture(scope="module", params=[save_wan21, save_ti2v], ids=["wan21", "ti2v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one style."""
    return request.param(tmp_path_factory.mktemp("checkpoint"))  # type: ignore[no-any-return]


def config(folder: Path, component: str) -> dict[str, Any]:
    return json.loads((folder / component / "config.json").read_text())  # type: ignore[no-any-return]


@torch.inference_mode()
def counted(work: Callable[[], object]) -> int:
    """By torch, which counts attention where it is made of products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def latents(folder: Path) -> torch.Tensor:
    vae = config(folder, "vae")
    space = vae["scale_factor_spatial"]
    return torch.randn(1, Z_DIM, (NUM_FRAMES - 1) // 4 + 1, SIZE.height // space, SIZE.width // space)


def test_a_forward_pass_is_counted_as_torch_counts_it(folder: Path) -> None:
    """With all that is made of the text and the time."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    transformer = config(folder, "transformer")
    num_tokens = count_tokens(transformer, config(folder, "vae"), SIZE, NUM_FRAMES)
    text = torch.randn(1, 512, transformer["text_dim"])
    expected = counted(lambda: model(latents(folder), torch.tensor([500]), text))
    assert forward_work(transformer, num_tokens).total == expected


@pytest.mark.parametrize("save", [save_i2v21, save_flf2v])
def test_attention_to_pictures_is_counted_as_torch_counts_it(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """To one, and to two."""
    from diffusers import WanTransformer3DModel

    folder = save(tmp_path / "checkpoint")
    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    transformer = config(folder, "transformer")
    num_pictures = 2 if transformer["pos_embed_seq_len"] else 1
    num_tokens = count_tokens(transformer, config(folder, "vae"), SIZE, NUM_FRAMES)
    text, images = torch.randn(1, 512, transformer["text_dim"]), torch.randn(num_pictures, 5, transformer["image_dim"])
    read = torch.randn(1, transformer["in_channels"], *latents(folder).shape[2:])
    expected = counted(lambda: model(read, torch.tensor([500]), text, images))
    assert forward_work(transformer, num_tokens, image_keys=5 * num_pictures).total == expected


def test_a_decode_is_counted_as_torch_counts_it(folder: Path) -> None:
    """The counts of the first latent frame and of the others are equal to torch's."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    assert decode_work(config(folder, "vae"), SIZE, NUM_FRAMES).total == counted(lambda: vae.decode(latents(folder)))


def test_a_prompt_is_counted_as_torch_counts_it(folder: Path) -> None:
    """At its own length."""
    from transformers import UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    ids = torch.ones(1, 11, dtype=torch.int64)
    assert text_work(config(folder, "text_encoder"), 11).total == counted(lambda: encoder(ids, torch.ones_like(ids)))
