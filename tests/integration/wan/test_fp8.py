"""FP8 linears and attention by their arithmetic, and the real tiny model with them, on the CPU."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from kinema.engines.base import Step
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.transformer.fp8 import Fp8Linear
from kinema.engines.wan.transformer.fp8_attention import attend_fp8_plainly
from kinema.engines.wan.transformer.fp8_operations import TorchFp8Operations
from kinema.engines.wan.transformer.layers import Fp8FeedForward, Linear
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_wan21
from tests.integration.wan.ranks import assert_same_in_turns_and_resumed, take_turns

# Of a number's own size, half the distance of two numbers with three bits after the first.
HALF_STEP = 2**-4


def loaded(linears: str) -> WanEngine:
    engine = WanEngine(inspect("tiny-wan"), device="cpu", linears=linears)  # type: ignore[arg-type]
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    return loaded("fp8")


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[GenerationRequest]:
    asked = {"num_inference_steps": 3, "num_frames": 5, "size": "64x64"}
    options = [
        GenerationOptions.model_validate({"prompt": f"a {name} moving right", "seed": seed, **asked})
        for seed, name in enumerate(("red circle", "blue square"))
    ]
    return [resolve(one, engine.capabilities).request for one in options]


def sampled(generator: Generator[Step, None, Tensor]) -> Tensor:
    return take_turns([generator])[0]


def error(made: Tensor, exact: Tensor) -> float:
    return ((made.float() - exact.float()).norm() / exact.float().norm()).item()


def test_a_number_is_wrong_by_half_a_step_at_most() -> None:
    """Of rows as different as 1e-6 and 1e6, and of zeros; what is far smaller than its row's largest may go to zero."""
    torch.manual_seed(1)
    rows = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e6, 0.0, 3.0])[:, None]
    restored = TorchFp8Operations().quantise(rows).restored()
    assert (restored - rows).abs().le(HALF_STEP * rows.abs() + 2**-9 * rows.abs().amax(1, keepdim=True) / 448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_near_the_exact_one(dtype: torch.dtype) -> None:
    """With and without GELU in front; each error is random, so those of a sum mostly cancel out."""
    torch.manual_seed(2)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 30, 256), (96, 256), (96,)))
    layer = Fp8Linear.of(weight, bias, TorchFp8Operations())
    made, after = layer(x), layer.after_gelu(x)
    assert made.dtype == after.dtype == dtype
    assert error(made, linear(x.float(), weight.float(), bias.float())) < 0.05
    assert error(after, linear(gelu(x.float(), approximate="tanh"), weight.float(), bias.float())) < 0.05


def test_attention_is_near_the_exact_one() -> None:
    """With heads whose values differ in size."""
    torch.manual_seed(3)
    query, key, value = torch.randn(2, 200, 3, 4, 32).unbind(2)
    value = value * torch.tensor([1e-3, 1.0, 10.0, 1e4])[:, None]
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    made = attend_fp8_plainly(query, key, value)
    assert max(error(made[:, :, head], exact[:, :, head]) for head in range(4)) < 0.1


def test_the_large_layers_alone_are_converted(engine: WanEngine) -> None:
    """Keys and values of the text, embeddings and the head stay, bit for bit."""
    exact, made = loaded("dtype").parts.transformer.network, engine.parts.transformer.network
    for other in made.blocks:
        for name in ("qkv", "out", "cross_q", "cross_out"):
            assert isinstance(getattr(other, name), Fp8Linear)
        assert isinstance(other.feed_forward, Fp8FeedForward)
    for readers, same in zip(exact.readers, made.readers, strict=True):
        assert isinstance(same.text.keys_values, Linear)
        assert torch.equal(readers.text.keys_values.weight, same.text.keys_values.weight)
    for name in ("patch", "text_in", "text_out", "time_projection", "head"):
        assert torch.equal(getattr(exact, name).weight, getattr(made, name).weight)


def test_a_video_is_the_same_alone_interleaved_and_resumed(
    engine: WanEngine, requests: list[GenerationRequest]
) -> None:
    assert_same_in_turns_and_resumed(engine, requests)


def test_the_facts_name_the_mode_and_its_checkpoints_are_its_own(
    engine: WanEngine, requests: list[GenerationRequest]
) -> None:
    """An exact engine names none, and begins again."""
    exact = loaded("dtype")
    assert engine.facts.linears == "fp8"
    assert exact.facts.linears is None
    step = next(engine.sample(requests[0]))
    assert step.checkpoint is not None
    assert next(exact.sample(requests[0], resume=step.checkpoint())).index == 1


def test_what_cannot_be_multiplied_is_refused(tmp_path: Path) -> None:
    """With what would do; a model of 24 channels, and the attention without CUDA."""
    odd = WanEngine(inspect(str(save_wan21(tmp_path / "model"))), device="cpu", linears="fp8")
    with pytest.raises(ConfigError, match="24 and 48 channels; multiples of 16 would do"):
        odd.load()
    with pytest.raises(ConfigError, match="it runs on CUDA alone"):
        WanEngine(inspect("tiny-wan"), device="cpu", attention="fa3-fp8").load()


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("parallel", ["cfg"])
def test_two_ranks_make_what_one_makes(engine: WanEngine, requests: list[GenerationRequest], parallel: str) -> None:
    """Bit for bit over the branches of guidance."""
    two = WanEngine(inspect("tiny-wan"), device="cpu", gpus=2, parallel=parallel, linears="fp8")  # type: ignore[arg-type]
    try:
        two.load()
        assert torch.equal(sampled(two.sample(requests[0])), sampled(engine.sample(requests[0])))
    finally:
        two.close()
