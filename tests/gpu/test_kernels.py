"""The fused parts of a block are no further from float32 than diffusers' own lines are, in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from kinema.engines.wan.transformer.block_operations import BlockOperations, TorchBlockOperations
from kinema.engines.wan.transformer.embeddings import Rotation, Text
from kinema.engines.wan.transformer.layers import Linear
from kinema.engines.wan.transformer.model import choose_block_operations

EPS = 1e-6
NUM_DRAWS = 10
# Two ways to round the same number are that far apart at most, of the error that both have.
SLACK = 1.02
SIZES = [(width, tokens) for width in (1536, 3072, 5120) for tokens in (7800, 32760)]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} wide, {size[1]} tokens")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Of the models 1.3B, 5B and 14B, at 17 and 81 frames of 832x480."""
    return request.param


def operations(width: int) -> tuple[BlockOperations, BlockOperations]:
    """The kernels, which are chosen on CUDA, and what they are compared with."""
    chosen = choose_block_operations(torch.device("cuda"), width // 128, EPS)
    assert not isinstance(chosen, TorchBlockOperations)
    return chosen, TorchBlockOperations(width // 128, EPS)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def error(made: Tensor, exact: Tensor) -> float:
    return ((made.float() - exact).norm() / exact.norm()).item()


def check(one_draw: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
    """``one_draw`` gives what the fused part, diffusers and float32 make of the same random numbers."""
    torch.manual_seed(1)
    with torch.inference_mode():
        for _ in range(NUM_DRAWS):
            fused, stock, exact = one_draw()
            assert torch.isfinite(fused).all()
            assert error(fused, exact) <= SLACK * error(stock, exact)


def spread(rows: Tensor, num_clean: int, tokens: int) -> Tensor:
    """diffusers has a row for each token."""
    return rows[[0] * num_clean + [-1] * (tokens - num_clean)][None]


@pytest.mark.parametrize("num_clean", [0, 1560], ids=["one time", "a clean first frame"])
def test_gated_addition_and_modulated_norm(size: tuple[int, int], num_clean: int) -> None:
    """The hidden states and their norm, as between feed-forward and self-attention."""
    width, tokens = size
    fused, plain = operations(width)
    norm = FP32LayerNorm(width, EPS, elementwise_affine=False)
    num_rows = 2 if num_clean else 1

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        hidden, branch = draw(1, tokens, width), draw(1, tokens, width)
        gate, shift, scale = (draw(num_rows, width, dtype=torch.float32) for _ in range(3))
        exact = hidden.float()
        exact_norm = plain.add_norm(exact, branch.float(), gate, shift, scale, num_clean)
        g, b, a = (spread(rows, num_clean, tokens) for rows in (gate, shift, scale))
        stock = (hidden.float() + branch.float() * g).type_as(hidden)
        stock_norm = (norm(stock.float()) * (1 + a) + b).type_as(hidden)
        made_norm = fused.add_norm(hidden, branch, gate, shift, scale, num_clean)
        assert error(hidden, exact) <= SLACK * error(stock, exact)
        return made_norm, stock_norm, exact_norm

    check(one_draw)


def test_plain_addition_and_modulated_norm(size: tuple[int, int]) -> None:
    """As between cross-attention and feed-forward."""
    width, tokens = size
    fused, plain = operations(width)
    norm = FP32LayerNorm(width, EPS, elementwise_affine=False)

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        hidden, branch = draw(1, tokens, width), draw(1, tokens, width)
        shift, scale = (draw(1, width, dtype=torch.float32) for _ in range(2))
        exact = plain.add_norm(hidden.float(), branch.float(), None, shift, scale, 0)
        stock = (norm((hidden + branch).float()) * (1 + scale) + shift).type_as(hidden)
        return fused.add_norm(hidden, branch, None, shift, scale, 0), stock, exact

    check(one_draw)


def test_gated_addition_and_affine_norm(size: tuple[int, int]) -> None:
    """As between self-attention and cross-attention."""
    width, tokens = size
    fused, plain = operations(width)
    norm = FP32LayerNorm(width, EPS, elementwise_affine=True).cuda()

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        hidden, branch = draw(1, tokens, width), draw(1, tokens, width)
        gate, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((1, width), (width,), (width,)))
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        affine = Linear(weight, bias)
        exact = plain.add_norm_affine(hidden.float(), branch.float(), gate, affine, 0)
        stock = norm((hidden.float() + branch * gate).type_as(hidden).float()).type_as(hidden)
        return fused.add_norm_affine(hidden, branch, gate, affine, 0), stock, exact

    check(one_draw)


def test_rotation(size: tuple[int, int]) -> None:
    """Queries and keys, and the values as they were."""
    width, tokens = size
    fused, plain = operations(width)
    norm = nn.RMSNorm(width, EPS).cuda().bfloat16()

    def turned(x: Tensor, rotation: Rotation) -> Tensor:
        """As diffusers' ``apply_rotary_emb``."""
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation.cosines[:, None], rotation.sines[:, None]
        out = torch.empty_like(x)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        qkv, norms, angles = draw(1, tokens, 3 * width), draw(2, width), draw(tokens, 64, dtype=torch.float32)
        rotation = Rotation(angles.cos(), angles.sin())
        exact = torch.stack(plain.rotate(qkv.float(), norms.float(), rotation))
        parts = []
        for part, weight in zip(qkv.chunk(3, dim=-1), norms, strict=False):
            norm.weight.copy_(weight)
            parts.append(turned(norm(part).unflatten(2, (-1, 128)), rotation))
        parts.append(qkv.chunk(3, dim=-1)[2].unflatten(2, (-1, 128)))
        stock = torch.stack(parts)
        return torch.stack(fused.rotate(qkv, norms, rotation)), stock, exact

    check(one_draw)


def test_query_norm(size: tuple[int, int]) -> None:
    """Of the queries to the text."""
    width, tokens = size
    fused, plain = operations(width)
    norm = nn.RMSNorm(width, EPS).cuda().bfloat16()

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        query, weight = draw(1, tokens, width), draw(width)
        norm.weight.copy_(weight)
        exact = plain.norm_query(query.float(), weight.float())
        stock = norm(query)
        return fused.norm_query(query, weight), stock, exact

    check(one_draw)


def test_cross_attention(size: tuple[int, int]) -> None:
    """With one key for all zeros against all 512 of them."""
    width, tokens = size
    fused, _ = operations(width)
    num_used = (20, 500)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 128)).transpose(1, 2)

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        query, keys_values = draw(2, tokens, width), draw(2, 512, 2 * width)
        bias = torch.full((2, 1, 1, 512), -math.inf, device="cuda")
        for index, used in enumerate(num_used):
            keys_values[index, used:] = keys_values[index, used]
            bias[index, ..., :used] = 0.0
            bias[index, ..., used] = math.log(512 - used)
        counts = torch.tensor(num_used, dtype=torch.int32, device="cuda") + 1
        made = fused.attend_text(query, keys_values, Text(keys_values[None], bias, counts))
        key, value = keys_values.chunk(2, dim=-1)
        stock, exact = (
            scaled_dot_product_attention(*(heads(x.to(dtype)) for x in (query, key, value))).transpose(1, 2).flatten(2)
            for dtype in (torch.bfloat16, torch.float32)
        )
        return made, stock, exact

    check(one_draw)


def test_gelu(size: tuple[int, int]) -> None:
    """In the product's epilogue it has one rounding less."""
    width, tokens = size
    fused, _ = operations(width)

    def one_draw() -> tuple[Tensor, Tensor, Tensor]:
        x, layer = draw(1, tokens, width), Linear(draw(2 * width, width) * width**-0.5, draw(2 * width))
        exact = gelu(Linear(layer.weight.float(), layer.bias.float())(x.float()), approximate="tanh")
        return fused.gelu_linear(x, layer), gelu(layer(x), approximate="tanh"), exact

    check(one_draw)
