"""The whole forward in bfloat16 beside diffusers', and graphs beside none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from kinema.engines.wan.transformer.attention import choose_attention
from kinema.engines.wan.transformer.model import WanTransformer
from tests.integration.wan.taken import own_transformer

# In units of the error that diffusers' forward in bfloat16 has.
MAX_ERROR = 1.5
TIMESTEPS = [999, 600, 20]
# What CLIP says of a picture: so many states.
IMAGE_KEYS = 257


@pytest.fixture(scope="module")
def module() -> Any:
    """As wide as Wan 2.1 T2V-1.3B, two layers, float32 weights that bfloat16 has too."""
    torch.manual_seed(3)
    with torch.device("cuda"):
        made = WanTransformer3DModel(num_layers=2, num_attention_heads=12, ffn_dim=8960)
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made.eval()


def in_bfloat16(module: Any) -> Any:
    """As ``from_pretrained`` makes it of a checkpoint: some parts stay float32."""
    made = copy.deepcopy(module)
    for name, parameter in made.named_parameters():
        if not set(name.split(".")) & set(made._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    return made


def transformer(module: Any, *, has_graphs: bool) -> WanTransformer:
    attention = choose_attention("auto", torch.device("cuda"), torch.bfloat16, 12, 128)
    pool = torch.cuda.graph_pool_handle() if has_graphs else None
    return WanTransformer(own_transformer(in_bfloat16(module)), attention, pool)


def draw(frames: int, height: int, width: int, *used: int) -> tuple[Tensor, list[Tensor]]:
    """Latents, and text states of so many tokens each, that are the same in bfloat16."""
    latents = torch.randn(1, 16, frames, height, width, device="cuda").bfloat16().float()
    return latents, [torch.randn(1, count, 4096, device="cuda").bfloat16() for count in used]


def padded(text: Tensor) -> Tensor:
    """As diffusers has it: with zeros behind a prompt's own tokens."""
    return torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


def error(made: Tensor, exact: Tensor) -> float:
    return ((made.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("has_clean", [False, True], ids=["one time", "a clean first frame"])
@pytest.mark.parametrize("used", [(30, 131), (512,)], ids=["guided", "a full prompt"])
@pytest.mark.parametrize("frames", [5, 21], ids=["17 frames", "81 frames"])
@torch.inference_mode()
def test_velocities(module: Any, frames: int, used: tuple[int, ...], has_clean: bool) -> None:
    """Three draws; with a clean first frame each token has its own time, as diffusers wants it there."""
    torch.manual_seed(5)
    ours, stock = transformer(module, has_graphs=False), in_bfloat16(module)
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    for index in range(len(TIMESTEPS)):
        latents, texts = draw(frames, 60, 104, *used)
        time = timesteps[index].expand(1)
        if has_clean:
            time = timesteps[index].repeat(1, frames * 30 * 52)
            time[:, : 30 * 52] = 0
        exact = torch.cat([module(latents, time, padded(text).float(), return_dict=False)[0] for text in texts])
        their = torch.cat([stock(latents.bfloat16(), time, padded(text), return_dict=False)[0] for text in texts])
        prepared = ours.prepare(texts, timesteps, latents, has_clean_frame=has_clean)
        assert error(ours.velocities(prepared, latents, index), exact) <= MAX_ERROR * error(their, exact)


@pytest.fixture(scope="module", params=[1, 2], ids=["one picture", "two pictures"])
def seeing(request: pytest.FixtureRequest) -> Any:
    """The same, which attends to pictures as Wan 2.1 I2V and FLF2V do."""
    torch.manual_seed(4)
    positions = 2 * IMAGE_KEYS if request.param == 2 else None
    with torch.device("cuda"):
        made = WanTransformer3DModel(
            num_layers=2,
            num_attention_heads=12,
            ffn_dim=8960,
            image_dim=1280,
            added_kv_proj_dim=1536,
            pos_embed_seq_len=positions,
        )
    for parameter in made.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter.data)).bfloat16().float()
    return made.eval()


def draw_images(module: Any) -> Tensor:
    """The states (1, keys, 1280) of all pictures that the model takes."""
    keys = IMAGE_KEYS if module.config.pos_embed_seq_len is None else 2 * IMAGE_KEYS
    return torch.randn(1, keys, 1280, device="cuda").bfloat16()


@pytest.mark.parametrize("used", [(30, 131), (512,)], ids=["guided", "a full prompt"])
@pytest.mark.parametrize("frames", [5, 21], ids=["17 frames", "81 frames"])
@torch.inference_mode()
def test_velocities_with_pictures(seeing: Any, frames: int, used: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    ours, stock = transformer(seeing, has_graphs=False), in_bfloat16(seeing)
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    for index in range(len(TIMESTEPS)):
        (latents, texts), images = draw(frames, 60, 104, *used), draw_images(seeing)
        time, states = timesteps[index].expand(1), images.view(-1, IMAGE_KEYS, 1280)
        given = [padded(text) for text in texts]
        exact = torch.cat([seeing(latents, time, text.float(), states.float(), return_dict=False)[0] for text in given])
        their = torch.cat([stock(latents.bfloat16(), time, text, states, return_dict=False)[0] for text in given])
        prepared = ours.prepare(texts, timesteps, latents, has_clean_frame=False, images=images)
        assert error(ours.velocities(prepared, latents, index), exact) <= MAX_ERROR * error(their, exact)


@torch.inference_mode()
def test_graphs_compute_the_same_with_pictures(seeing: Any) -> None:
    """Bit for bit, for generations that take turns with pictures of their own."""
    torch.manual_seed(8)
    with_graphs, without = (transformer(seeing, has_graphs=has_graphs) for has_graphs in (True, False))
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    drawn = [(*draw(2, 32, 48, *used), draw_images(seeing)) for used in ((9, 200), (40, 3), (7,))]
    # A model that takes two pictures may get one.
    drawn.append((*drawn[0][:2], drawn[0][2][:, :IMAGE_KEYS]))
    prepared = [
        [
            model.prepare(texts, timesteps, latents, has_clean_frame=False, images=images)
            for model in (with_graphs, without)
        ]
        for latents, texts, images in drawn
    ]
    for step in range(len(TIMESTEPS)):
        made = [with_graphs.velocities(both[0], drawn[i][0], step) for i, both in enumerate(prepared)]
        for i, both in enumerate(prepared):
            assert torch.equal(made[i], without.velocities(both[1], drawn[i][0], step))


@torch.inference_mode()
def test_graphs_compute_the_same(module: Any) -> None:
    """Bit for bit, when prompts, shapes and guidance change from step to step."""
    torch.manual_seed(6)
    with_graphs, without = (transformer(module, has_graphs=has_graphs) for has_graphs in (True, False))
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    asked = [(2, 32, 48, (9, 200)), (2, 32, 48, (40, 3)), (3, 16, 16, (7,)), (2, 32, 48, (512,))]
    drawn = [draw(frames, height, width, *used) for frames, height, width, used in asked]
    prepared = [
        [model.prepare(texts, timesteps, latents, has_clean_frame=index == 1) for model in (with_graphs, without)]
        for index, (latents, texts) in enumerate(drawn)
    ]
    for step in range(len(TIMESTEPS)):
        made = [with_graphs.velocities(both[0], drawn[i][0], step) for i, both in enumerate(prepared)]
        for i, both in enumerate(prepared):
            assert torch.equal(made[i], without.velocities(both[1], drawn[i][0], step))
