"""LoRAs on CUDA: graphs read the numbers of whoever has the turn, and results are those of changed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.transformer.attention import choose_attention
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.engines.wan.transformer.network import TransformerWeights, dtype_of
from kinema.engines.wan.transformer.shapes import shapes
from tests.integration.wan.loras import RandomLoras

CUDA = torch.device("cuda")
# As wide as Wan 2.1 T2V-1.3B, two layers.
CONFIG = TransformerConfig.model_validate(
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "eps": 1e-6,
    }
)
LORAS = RandomLoras(shapes(CONFIG), size=0.02)
EVERY = {
    "to_q": 32,
    "to_k": 32,
    "to_v": 32,
    "to_out.0": 32,
    "net.0.proj": 32,
    "net.2": 32,
    "linear_1": 16,
    "proj_out": 8,
}
STYLE, FACE = LORAS.draw(1, EVERY), LORAS.draw(2, {"to_q": 16, "to_k": 8, "net.2": 64}, strength=1.5)
DISTILL = LORAS.draw(3, {"to_v": 64}, others=True, strength=0.1)
KINDS: list[tuple[Any, ...]] = [(), (STYLE,), (FACE,), (STYLE, FACE), (DISTILL,)]
TIMESTEPS = torch.tensor([999.0, 500.0, 20.0])


def transformer(
    changes: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    linears: Linears = "dtype",
    stream: BlockStream | None = None,
    *,
    has_graphs: bool = False,
) -> WanTransformer:
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, shape in shapes(CONFIG).items():
        drawn = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "norm" in name and "weight" in name else 0.0)
        if changes is not None and name in changes:
            drawn += changes[name]
        tensors[name] = drawn.to(CUDA, dtype_of(name, dtype))
    attention = choose_attention("auto", CUDA, dtype, 12, 128)
    pool = torch.cuda.graph_pool_handle() if has_graphs else None
    weights = TransformerWeights(CONFIG, tensors)
    return WanTransformer(weights, attention, pool, linears, stream=stream, read_deltas=LORAS.read)


def draw() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 3, 32, 48, generator=generator).cuda()
    return latents, [torch.randn(1, count, 4096, generator=generator).cuda().bfloat16() for count in (30, 131)]


def velocities(own: WanTransformer, *loras: Any) -> Tensor:
    latents, texts = draw()
    prepared = own.prepare(texts, TIMESTEPS.cuda(), latents, has_clean_frame=False, loras=loras)
    return own.velocities(prepared, latents, 1)


def error(made: Tensor, exact: Tensor) -> float:
    return ((made.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("loras", KINDS[1:], ids=["style", "face", "two", "whole weights"])
@torch.inference_mode()
def test_the_velocities_are_those_of_changed_weights(loras: tuple[Any, ...]) -> None:
    """As near as bfloat16 is without a LoRA, and far from the velocities without it."""
    exact = velocities(transformer(LORAS.added(*loras), torch.float32))
    plain = error(velocities(transformer()), velocities(transformer(dtype=torch.float32)))
    made = error(velocities(transformer(), *loras), exact)
    assert made <= 1.6 * plain
    assert error(velocities(transformer()), exact) > 5 * made


@pytest.mark.parametrize("linears", ["dtype", "fp8"])
@torch.inference_mode()
def test_graphs_and_streamed_blocks_compute_the_same(linears: Linears) -> None:
    """Bit for bit, when LoRAs change from step to step, and after everything that saves time has left."""
    plain, with_graphs = transformer(linears=linears), transformer(linears=linears, has_graphs=True)
    streamed = transformer(linears=linears, stream=BlockStream(CUDA, is_kept=True))
    latents, texts = draw()
    for own in (with_graphs, streamed):
        prepared = [
            own.prepare(texts, TIMESTEPS.cuda(), latents, has_clean_frame=False, loras=loras) for loras in KINDS
        ]
        for turn in range(4):
            for one, loras in zip(prepared, KINDS, strict=True):
                assert torch.equal(own.velocities(one, latents, 1), velocities(plain, *loras)), (turn, loras)
            if turn == 2:
                own.drop_graphs(torch.cuda.graph_pool_handle() if own is with_graphs else None)
                own.drop_prompts()
                own.drop_adapters()
