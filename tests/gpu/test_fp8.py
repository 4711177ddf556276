"""FP8 on CUDA: kernels beside what they compute in torch, and a forward beside float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from kinema.engines.wan.transformer.attention import choose_attention
from kinema.engines.wan.transformer.fp8 import Fp8Linear, check_linears, choose_fp8_operations
from kinema.engines.wan.transformer.fp8_attention import attend_fp8_plainly
from kinema.engines.wan.transformer.fp8_operations import TorchFp8Operations
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.errors import ConfigError
from tests.gpu.test_transformer import draw, error, in_bfloat16, module
from tests.integration.wan.taken import own_transformer

__all__ = ["module"]
DEVICE = torch.device("cuda")
TORCHS = TorchFp8Operations()


@pytest.fixture(autouse=True)
def _has_fp8() -> None:
    try:
        check_linears("fp8", DEVICE, torch.bfloat16, 1536, 8960)
    except ConfigError as exc:
        pytest.skip(exc.message)


def rows(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("width", [1536, 8960, 5120, 13824])
@torch.inference_mode()
def test_rows_are_scaled_as_by_torch(width: int) -> None:
    """Scales to the bit as on a CPU, where a division is one, and numbers but for some that lie between two; a row of
    zeros too."""
    x = rows(1000, width)
    x[7] = 0
    chosen = choose_fp8_operations(DEVICE)
    assert not isinstance(chosen, TorchFp8Operations)
    made, expected = chosen.quantise(x), TORCHS.quantise(x.cpu())
    assert torch.equal(made.scales.cpu(), expected.scales)
    assert error(made.restored().cpu(), expected.restored()) < 0.005


@torch.inference_mode()
def test_products_are_those_of_the_reference() -> None:
    """But for the sums, which are less than float32, and for GELU's own rounding."""
    x, weight = rows(1001, 1536), rows(8960, 1536) * 1536**-0.5
    layer = Fp8Linear.of(weight, rows(8960), choose_fp8_operations(DEVICE))

    def exact(x: Tensor) -> Tensor:
        return TORCHS.multiply(TORCHS.quantise(x), layer.weight, layer.scales, layer.bias).float()

    assert error(layer(x), exact(x)) < 0.01
    assert error(layer.after_gelu(x), exact(gelu(x.float(), approximate="tanh"))) < 0.01


@torch.inference_mode()
def test_attention_is_that_of_the_reference() -> None:
    """Views of one tensor, as the blocks have them."""
    try:
        kernel = choose_attention("fa3-fp8", DEVICE, torch.bfloat16, 12, 128)
    except ConfigError as exc:
        pytest.skip(exc.message)
    query, key, value = rows(2, 1500, 3, 12, 128).unbind(2)
    assert error(kernel(query, key, value), attend_fp8_plainly(query, key, value).float()) < 0.05


@torch.inference_mode()
def test_a_forward_is_near_float32(module: Any) -> None:
    """Beside what bfloat16 is; with graphs the same bits as without."""
    torch.manual_seed(5)
    attention = choose_attention("auto", DEVICE, torch.bfloat16, 12, 128)
    latents, texts = draw(5, 60, 104, 30, 131)
    timesteps = torch.tensor([999, 600, 20], device="cuda")
    made: list[Tensor] = []
    for linears, pool in (("dtype", None), ("fp8", None), ("fp8", torch.cuda.graph_pool_handle())):
        one = WanTransformer(own_transformer(in_bfloat16(module)), attention, pool, linears)  # type: ignore[arg-type]
        made.append(one.velocities(one.prepare(texts, timesteps, latents, has_clean_frame=False), latents, 1))
    exact = torch.cat([module(latents, timesteps[1:2], text.float(), return_dict=False)[0] for text in texts])
    errors = [error(one, exact) for one in made]
    print(f"relative error: bfloat16 {errors[0]:.4f}, fp8 {errors[1]:.4f}")
    assert errors[1] < 0.15
    assert torch.equal(made[1], made[2])
