"""What is compiled ahead is all that the first video needs: its kernels are looked up, and none is compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.kernels_ahead import compile_side_by_side
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.block_warmup import compile_blocks
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.engines.wan.transformer.network import TransformerWeights, dtype_of
from kinema.engines.wan.transformer.shapes import shapes
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.engines.wan.vae.decoder_warmup import compile_decoder
from tests.integration.wan.random_checkpoints import make_vae
from tests.integration.wan.taken import own_vae

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def num_compiled(*kernels: Any) -> int:
    """The specialisations of these kernels that the process has."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.parametrize("is_patched", [False, True], ids=["2.1", "2.2"])
@torch.inference_mode()
def test_of_the_decoder(is_patched: bool) -> None:
    from kinema.engines.wan.vae import decoder_kernels as own

    kernels = own._add_up_and_normalise, own._enlarge, own._gather, own._to_planes
    vae = own_vae(make_vae(is_patched=is_patched).cuda())
    compile_side_by_side([partial(compile_decoder, vae.config, CUDA, torch.float16)])
    before = num_compiled(*kernels)
    VaeDecoder(vae, torch.float16).try_out()
    assert num_compiled(*kernels) == before > 0


@pytest.mark.parametrize("columns", [16, 12], ids=["a multiple of 16 tokens", "another number"])
@torch.inference_mode()
def test_of_the_transformer(columns: int) -> None:
    from kinema.engines.wan.transformer import block_kernels as own

    kernels = own._add_norm_kernel, own._rotate_kernel, own._rms_norm_kernel, own._attend_text_kernel
    config = TransformerConfig(
        num_attention_heads=4,
        attention_head_dim=64,
        ffn_dim=512,
        num_layers=3,
        in_channels=16,
        out_channels=16,
        patch_size=(1, 2, 2),
        text_dim=64,
    )
    attention = AttentionChoice("sdpa", "sdpa")
    compile_side_by_side([partial(compile_blocks, config, CUDA, torch.bfloat16, attention, "dtype")])
    before = num_compiled(*kernels)
    tensors = {
        name: torch.zeros(shape, dtype=dtype_of(name, torch.bfloat16), device=CUDA)
        for name, shape in shapes(config).items()
    }
    transformer = WanTransformer(TransformerWeights(config, tensors), attention, torch.cuda.graph_pool_handle())
    latents = torch.zeros(1, 16, 3, 8, columns, device=CUDA)
    texts = [torch.zeros(1, 9, 64, dtype=torch.bfloat16, device=CUDA) for _ in range(2)]
    times = torch.tensor([999, 500], device=CUDA)
    prepared = transformer.prepare(texts, times, latents, has_clean_frame=False)
    transformer.velocities(prepared, latents, 0)
    assert num_compiled(*kernels) == before > 0
