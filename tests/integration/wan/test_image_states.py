"""A transformer that attends to pictures: its velocities are those of diffusers, whoever else takes turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import WeightsDtype
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer
from kinema.engines.wan.transformer.network import TransformerWeights, dtype_of
from kinema.engines.wan.transformer.shapes import shapes

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

CPU = torch.device("cpu")
IMAGE_DIM, KEYS, TEXT_DIM = 20, 5, 16
TIMESTEPS = torch.tensor([999.0, 500.0])
LATENTS = torch.randn(1, 6, 2, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _inference(one_thread: None) -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass(frozen=True)
class Model:
    """diffusers' transformer, which takes so many pictures."""

    module: WanTransformer3DModel
    num_pictures: int

    def own(
        self,
        weights_dtype: WeightsDtype = "dtype",
        stream: BlockStream | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> WanTransformer:
        tensors = {name: tensor.to(dtype_of(name, dtype)) for name, tensor in self.module.state_dict().items()}
        weights = TransformerWeights(TransformerConfig.model_validate(dict(self.module.config)), tensors)
        return WanTransformer(weights, AttentionChoice("sdpa", "sdpa"), None, "dtype", weights_dtype, stream)

    def images(self, seed: int) -> Tensor:
        """The states (1, keys, i) of all pictures."""
        return torch.randn(1, self.num_pictures * KEYS, IMAGE_DIM, generator=torch.Generator().manual_seed(seed))

    def velocities(self, texts: list[Tensor], images: Tensor, index: int) -> Tensor:
        """diffusers' for each text, behind which it has zeros."""
        states = images.view(self.num_pictures, KEYS, IMAGE_DIM)
        made = [
            self.module(
                hidden_states=LATENTS,
                timestep=TIMESTEPS[index : index + 1],
                encoder_hidden_states=pad(text, (0, 0, 0, MAX_TEXT_TOKENS - text.shape[1])),
                encoder_hidden_states_image=states,
                return_dict=False,
            )[0]
            for text in texts
        ]
        return torch.cat(made)


def make_model(num_pictures: int) -> Model:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(5)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=6,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=24,
        pos_embed_seq_len=2 * KEYS if num_pictures == 2 else None,
    ).eval()
    for parameter in module.parameters():  # norms and positions away from what they begin as
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Model(module, num_pictures)


@pytest.fixture(scope="module", params=[1, 2], ids=["one picture", "two pictures"])
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(request.param)


def texts_of(*counts: int) -> list[Tensor]:
    """States of so many tokens."""
    return [torch.randn(1, count, TEXT_DIM, generator=torch.Generator().manual_seed(count)) for count in counts]


def prepare(own: WanTransformer, texts: list[Tensor], images: Tensor) -> PreparedRequest:
    return own.prepare(texts, TIMESTEPS, LATENTS, has_clean_frame=False, images=images)


def test_names_and_shapes_are_those_of_the_module(model: Model) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    assert shapes(TransformerConfig.model_validate(dict(model.module.config))) == expected


@pytest.mark.parametrize("counts", [(7,), (7, 3)], ids=["unguided", "guided"])
def test_velocities_are_those_of_diffusers(model: Model, counts: tuple[int, ...]) -> None:
    own, texts, images = model.own(), texts_of(*counts), model.images(1)
    prepared = prepare(own, texts, images)
    for index in range(2):
        expected = model.velocities(texts, images, index)
        torch.testing.assert_close(own.velocities(prepared, LATENTS, index), expected, rtol=1e-4, atol=1e-5)
    other = own.velocities(prepare(own, texts, model.images(2)), LATENTS, 1)
    assert (other - expected).abs().max() > 0.01


def test_generations_with_different_pictures_take_turns(model: Model) -> None:
    """And a branch of guidance alone has the same numbers."""
    own, texts = model.own(), texts_of(7, 3)
    requests = [prepare(own, texts, model.images(seed)) for seed in (1, 2)]
    alone = [model.own().velocities(prepare(model.own(), texts, model.images(seed)), LATENTS, 1) for seed in (1, 2)]
    for index in (0, 1, 0, 1):
        assert torch.equal(own.velocities(requests[index], LATENTS, 1), alone[index])
    for branch in range(2):
        one = own.velocities(requests[0].branch(branch), LATENTS, 1)
        torch.testing.assert_close(one, alone[0][branch : branch + 1], rtol=1e-5, atol=1e-6)


def test_one_of_two_pictures_has_the_first_positions() -> None:
    """As a model would that takes one and has these positions added before; also between two requests with both."""
    model = make_model(2)
    own, texts, both, alone = model.own(), texts_of(7, 3), model.images(1), model.images(2)[:, :KEYS]
    requests = [prepare(own, texts, images) for images in (both, alone)]
    module = make_model(1)
    module.module.load_state_dict(model.module.state_dict(), strict=False)
    positions = model.module.condition_embedder.image_embedder.pos_embed[:, :KEYS]
    expected = [model.velocities(texts, both, 1), module.velocities(texts, alone + positions, 1)]
    for index in (0, 1, 0):
        made = own.velocities(requests[index], LATENTS, 1)
        torch.testing.assert_close(made, expected[index], rtol=1e-4, atol=1e-5)


def test_streamed_blocks_have_the_same_bits(model: Model) -> None:
    texts, images = texts_of(7, 3), model.images(1)
    streamed, whole = model.own(stream=BlockStream(CPU, is_kept=True)), model.own()
    made, expected = (own.velocities(prepare(own, texts, images), LATENTS, 1) for own in (streamed, whole))
    assert torch.equal(made, expected)


def test_weights_kept_in_e4m3_are_about_as_good(model: Model) -> None:
    texts, images = texts_of(7, 3), model.images(1)
    exact = model.velocities(texts, images, 1)
    kept = model.own(weights_dtype="fp8")
    error = (kept.velocities(prepare(kept, texts, images), LATENTS, 1) - exact).norm() / exact.norm()
    assert 0 < error < 0.1


def test_a_bfloat16_transformer_rounds_where_diffusers_rounds(model: Model) -> None:
    texts, images = texts_of(7, 3), model.images(1)
    exact, own = model.velocities(texts, images, 1), model.own(dtype=torch.bfloat16)
    error = (own.velocities(prepare(own, texts, images), LATENTS, 1).float() - exact).norm() / exact.norm()
    assert error < 0.03
