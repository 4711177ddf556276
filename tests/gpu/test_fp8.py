"""FP8 on CUDA: kernels beside what they compute in torch, and a forward beside float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from kinema.engines.wan.transformer.attention import choose_attention
from kinema.engines.wan.transformer.fp8 import Fp8Linear, StoredLinear, check_linears, choose_fp8_operations
from kinema.engines.wan.transformer.fp8_attention import attend_fp8_plainly
from kinema.engines.wan.transformer.fp8_operations import TorchFp8Operations, quantise
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.errors import ConfigError
from tests.gpu.test_transformer import draw, error, in_bfloat16, module, padded
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


@pytest.mark.parametrize("width", [1536, 8960, 5120, 13824])
@torch.inference_mode()
def test_weights_are_kept_as_on_a_cpu(width: int) -> None:
    """To the bit, and so is what is restored from them."""
    x = rows(1000, width)
    x[7] = 0
    made, expected = quantise(x), quantise(x.cpu())
    assert torch.equal(made.values.view(torch.uint8).cpu(), expected.values.view(torch.uint8))
    assert torch.equal(made.scales.cpu(), expected.scales)
    assert torch.equal(made.restored(torch.bfloat16).cpu(), expected.restored(torch.bfloat16))


@torch.inference_mode()
def test_a_kept_weight_takes_one_matrix_when_it_is_restored() -> None:
    """And half the memory of bfloat16 until then."""
    layer = StoredLinear.of(rows(8960, 1536), rows(8960))
    assert layer.rows.values.nbytes == 8960 * 1536
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = layer.weight
    assert weight.nbytes == 2 * layer.rows.values.nbytes
    assert torch.cuda.max_memory_allocated() - before < 1.1 * weight.nbytes


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
    """Beside what bfloat16 is, in each of the modes; with graphs the same bits as without."""
    torch.manual_seed(5)
    attention = choose_attention("auto", DEVICE, torch.bfloat16, 12, 128)
    latents, texts = draw(5, 60, 104, 30, 131)
    timesteps = torch.tensor([999, 600, 20], device="cuda")
    made: list[Tensor] = []
    modes = ("dtype", "dtype"), ("fp8", "dtype"), ("dtype", "fp8"), ("fp8", "fp8")
    for mode, has_graphs in [(mode, has_graphs) for mode in modes for has_graphs in (False, True)]:
        pool = torch.cuda.graph_pool_handle() if has_graphs else None
        one = WanTransformer(own_transformer(in_bfloat16(module)), attention, pool, *mode)  # type: ignore[arg-type]
        if has_graphs:  # the first step of its kind is launched kernel by kernel
            one.velocities(one.prepare(texts, timesteps, latents, has_clean_frame=False), latents, 0)
        made.append(one.velocities(one.prepare(texts, timesteps, latents, has_clean_frame=False), latents, 1))
    exact = torch.cat([module(latents, timesteps[1:2], padded(text).float(), return_dict=False)[0] for text in texts])
    assert all(torch.equal(one, other) for one, other in zip(made[::2], made[1::2], strict=True))
    errors = [error(one, exact) for one in made[::2]]
    print("relative error: bfloat16 {:.4f}, fp8 linears {:.4f}, fp8 weights {:.4f}, both {:.4f}".format(*errors))
    assert errors[0] < max(errors[1:]) < 0.15
