"""LoRAs on a transformer: its velocities are those of one whose weights were changed, for whoever has the turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.transformer.adapters import MAX_LAYOUTS
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer
from kinema.engines.wan.transformer.network import TransformerWeights, dtype_of
from kinema.engines.wan.transformer.shapes import shapes
from tests.integration.wan.loras import RandomLoras

CPU = torch.device("cpu")
CONFIG = TransformerConfig.model_validate(
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
        "eps": 1e-6,
        # It attends to two pictures, so it has all modules that any model has.
        "image_dim": 20,
        "added_kv_proj_dim": 32,
        "pos_embed_seq_len": 6,
    }
)
SHAPES = shapes(CONFIG)
LATENTS = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(3))
TIMESTEPS = torch.tensor([999.0, 500.0])
LORAS = RandomLoras(SHAPES)
lora, added = LORAS.draw, LORAS.added


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def weights(changes: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> TransformerWeights:
    """Random ones, with these added."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
    for name, change in (changes or {}).items():
        tensors[name] += change.view(tensors[name].shape)
    return TransformerWeights(CONFIG, {name: tensor.to(dtype_of(name, dtype)) for name, tensor in tensors.items()})


def transformer(
    changes: Mapping[str, Tensor] | None = None,
    linears: Linears = "dtype",
    weights_dtype: WeightsDtype = "dtype",
    stream: BlockStream | None = None,
    dtype: torch.dtype = torch.float32,
) -> WanTransformer:
    kernels = AttentionChoice("sdpa", "sdpa")
    return WanTransformer(weights(changes, dtype), kernels, None, linears, weights_dtype, stream, LORAS.read)


def prepare(own: WanTransformer, *loras: LoraRef) -> PreparedRequest:
    texts = [torch.randn(1, count, 32, generator=torch.Generator().manual_seed(count)) for count in (3, 4)]
    return own.prepare(texts, TIMESTEPS, LATENTS, has_clean_frame=False, loras=loras, images=IMAGES)


def velocities(own: WanTransformer, *loras: LoraRef) -> Tensor:
    return own.velocities(prepare(own, *loras), LATENTS, 1)


ATTENTION = {"to_q": 3, "to_k": 4, "to_v": 5, "to_out.0": 2}
PICTURES = {"add_k_proj": 3, "add_v_proj": 5, "ff.net.0.proj": 2, "ff.net.2": 6}
EVERY = {
    **ATTENTION,
    **PICTURES,
    "ffn.net.0.proj": 17,
    "ffn.net.2": 4,
    "embedder.linear_1": 3,
    "time_proj": 2,
    "proj_out": 1,
}
STYLE, FACE = lora(1, ATTENTION, strength=0.7), lora(2, EVERY, strength=-1.3)
DISTILL, QUERY = lora(3, {"ffn.net.2": 4}, others=True), lora(4, {"attn1.to_v": 2})
PICTURE = lora(6, PICTURES, strength=1.5)


@pytest.mark.parametrize(
    "loras",
    [(STYLE,), (FACE,), (DISTILL,), (QUERY,), (PICTURE,), (STYLE, FACE), (STYLE, FACE, DISTILL, QUERY)],
    ids=["attention", "every layer", "whole weights", "one part", "pictures", "two", "four"],
)
def test_the_velocities_are_those_of_changed_weights(loras: tuple[LoraRef, ...]) -> None:
    made, changed = velocities(transformer(), *loras), velocities(transformer(added(*loras)))
    torch.testing.assert_close(made, changed, rtol=1e-4, atol=1e-4)
    assert (made - velocities(transformer())).abs().max() > 0.01


def test_generations_with_different_loras_take_turns() -> None:
    """Also when another one is prepared between two steps, and when there are more kinds than are kept."""
    own = transformer()
    kinds = [(), (STYLE,), (FACE,), (DISTILL,), (QUERY,), (STYLE, FACE), (lora(5, ATTENTION),)]
    assert len(kinds) - 1 > MAX_LAYOUTS
    alone = [velocities(transformer(), *loras) for loras in kinds]
    prepared = [prepare(own, *loras) for loras in kinds]
    for order in (range(len(kinds)), reversed(range(len(kinds)))):
        for index in order:
            assert torch.equal(own.velocities(prepared[index], LATENTS, 1), alone[index]), index
            prepare(own, *kinds[index - 1])
            assert torch.equal(own.velocities(prepared[index], LATENTS, 1), alone[index]), index


def test_without_a_lora_a_bit_of_nothing_changes() -> None:
    own = transformer()
    before = velocities(own)
    velocities(own, FACE)
    assert torch.equal(velocities(own), before)
    own.drop_prompts()
    own.drop_adapters()
    assert own.adapter_bytes == 0
    assert torch.equal(velocities(own), before)


def test_two_generations_of_the_same_loras_have_them_once() -> None:
    own = transformer()
    first = prepare(own, STYLE, FACE)
    held = own.adapter_bytes
    assert prepare(own, STYLE, FACE).adaptation is first.adaptation
    assert own.adapter_bytes == held
    second = prepare(own, STYLE)
    assert own.adapter_bytes > held
    own.velocities(second, LATENTS, 0)
    own.drop_prompts()
    own.drop_adapters()
    assert 0 < own.adapter_bytes < held
    assert torch.equal(own.velocities(first, LATENTS, 1), velocities(transformer(), STYLE, FACE))


def test_streamed_blocks_take_loras_bit_for_bit() -> None:
    streamed = transformer(stream=BlockStream(CPU, is_kept=True))
    for loras in ((STYLE,), (), (DISTILL, FACE), (STYLE,)):
        assert torch.equal(velocities(streamed, *loras), velocities(transformer(), *loras))


@pytest.mark.parametrize(("linears", "weights_dtype"), [("fp8", "dtype"), ("dtype", "fp8")])
def test_layers_in_e4m3_take_loras(linears: Linears, weights_dtype: WeightsDtype) -> None:
    """As far from the exact ones as without a LoRA."""

    def error(*loras: LoraRef) -> float:
        exact = velocities(transformer(), *loras)
        made = velocities(transformer(linears=linears, weights_dtype=weights_dtype), *loras)
        return ((made - exact).norm() / exact.norm()).item()

    assert 0 < error(STYLE, FACE) < 2 * error()
    assert 0 < error(DISTILL) < 2 * error()


def test_a_bfloat16_transformer_takes_loras() -> None:
    own = transformer(dtype=torch.bfloat16)
    made, exact = velocities(own, STYLE, DISTILL).float(), velocities(transformer(), STYLE, DISTILL)
    assert ((made - exact).norm() / exact.norm()).item() < 0.03
