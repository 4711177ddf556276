"""Weights that are kept in e4m3 and multiply in the type of the rest, in the real tiny model on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.conditioning import encode_text
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.transformer.fp8 import Fp8Linear, StoredLinear
from kinema.engines.wan.transformer.fp8_operations import E4M3, quantise
from kinema.engines.wan.transformer.layers import FeedForward, Fp8FeedForward
from kinema.engines.wan.transformer.network import Network
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.ranks import assert_same_in_turns_and_resumed
from tests.integration.wan.test_fp8 import error, sampled


def loaded(**how: object) -> WanEngine:
    engine = WanEngine(inspect("tiny-wan"), device="cpu", **how)  # type: ignore[arg-type]
    engine.load()
    return engine


@pytest.fixture(scope="module")
def exact() -> WanEngine:
    return loaded()


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    return loaded(weights_dtype="fp8")


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[GenerationRequest]:
    asked = {"num_inference_steps": 2, "num_frames": 5, "size": "64x64"}
    options = [
        GenerationOptions.model_validate({"prompt": f"a {name} moving right", "seed": seed, **asked})
        for seed, name in enumerate(("red circle", "blue square"))
    ]
    return [resolve(one, engine.capabilities).request for one in options]


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors of a tree of dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors_of(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def size_of(value: object) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_restored_weight(dtype: torch.dtype) -> None:
    """To the bit, in the weights' type; a weight is wrong by half a step of e4m3, and rounds once more."""
    torch.manual_seed(2)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 30, 256), (96, 256), (96,)))
    layer = StoredLinear.of(weight, bias)
    assert (layer.weight.dtype, layer.rows.values.dtype, layer.rows.scales.shape) == (dtype, E4M3, (96, 1))
    assert torch.equal(layer.weight, quantise(weight).restored().to(dtype))
    assert torch.equal(layer(x), linear(x, layer.weight, bias))
    assert 0.01 < error(layer(x), linear(x.float(), weight.float(), bias.float())) < 0.04


def test_a_damaged_weight_stays_damaged() -> None:
    """What is not finite is found in a video; it must not become a number."""
    for damage in (float("nan"), float("inf")):
        weight = torch.ones(3, 4)
        weight[1, 2] = damage
        assert quantise(weight).restored().isfinite().all(dim=1).tolist() == [True, False, True]


def test_the_large_layers_are_kept_in_8_bits(exact: WanEngine, engine: WanEngine) -> None:
    """Those of the blocks and the matrices of the text encoder, a quarter of float32 and their scales; all others stay,
    bit for bit."""
    plain, made = exact.parts.transformer.network, engine.parts.transformer.network
    for one, other in zip(plain.blocks, made.blocks, strict=True):
        for name in ("qkv", "out", "cross_q", "cross_out"):
            assert isinstance(getattr(other, name), StoredLinear)
        assert isinstance(other.feed_forward, FeedForward)
        assert isinstance(other.feed_forward.up, StoredLinear)
        assert isinstance(other.feed_forward.down, StoredLinear)
        assert size_of(other) < 0.28 * size_of(one)
    assert all(isinstance(readers.text.keys_values, StoredLinear) for readers in made.readers)
    for name in ("patch", "text_in", "text_out", "time_projection", "head"):
        assert torch.equal(getattr(plain, name).weight, getattr(made, name).weight)
    own, left = exact.parts.text_encoder.weights, engine.parts.text_encoder.weights
    matrices = {name for name, tensor in own.items() if tensor.dim() == 2 and ".layer." in name}
    assert own.keys() - left.keys() == {name for name in matrices if "relative_attention_bias" not in name}
    assert all(torch.equal(own[name], tensor) for name, tensor in left.items())


def test_with_fp8_products_the_layers_are_those_that_multiply(engine: WanEngine) -> None:
    """Keys and values of the texts and the text encoder, which never multiply in e4m3, are kept in it."""
    both = loaded(linears="fp8", weights_dtype="fp8")
    network: Network = both.parts.transformer.network
    for one in network.blocks:
        assert all(isinstance(getattr(one, name), Fp8Linear) for name in ("qkv", "out", "cross_q", "cross_out"))
        assert isinstance(one.feed_forward, Fp8FeedForward)
    for readers, same in zip(network.readers, engine.parts.transformer.network.readers, strict=True):
        assert isinstance(readers.text.keys_values, StoredLinear)
        assert torch.equal(readers.text.keys_values.weight, same.text.keys_values.weight)
    assert both.parts.text_encoder.weights.keys() == engine.parts.text_encoder.weights.keys()
    assert (both.facts.linears, both.facts.weights_dtype) == ("fp8", "fp8")


@torch.inference_mode()
def test_texts_are_near_the_exact_ones(exact: WanEngine, engine: WanEngine, requests: list[GenerationRequest]) -> None:
    """And are not the same."""
    for request in requests:
        states, expected = (encode_text(one.parts, request.prompt) for one in (engine, exact))
        assert 0.001 < error(states, expected) < 0.1


@torch.inference_mode()
def test_velocities_are_near_the_exact_ones(exact: WanEngine, engine: WanEngine) -> None:
    """And are not the same; from the same noise and the same texts, so the transformer alone differs."""
    torch.manual_seed(4)
    transformers = [one.parts.transformer for one in (engine, exact)]
    config = inspect("tiny-wan").transformer
    latents = torch.randn(1, config.in_channels, 2, 8, 8)
    text, times = torch.randn(1, 512, config.text_dim), torch.tensor([900, 500])
    made, expected = (
        one.velocities(one.prepare([text], times, latents, has_clean_frame=False), latents, 1) for one in transformers
    )
    assert 0.001 < error(made, expected) < 0.1


def test_a_video_is_near_the_exact_one(exact: WanEngine, engine: WanEngine, requests: list[GenerationRequest]) -> None:
    """And is not the same."""
    made, expected = (sampled(one.sample(requests[0])) for one in (engine, exact))
    assert 0.001 < error(made, expected) < 0.15


def test_a_video_is_the_same_alone_interleaved_and_resumed(
    engine: WanEngine, requests: list[GenerationRequest]
) -> None:
    assert_same_in_turns_and_resumed(engine, requests)


def test_the_facts_name_the_mode_and_its_checkpoints_are_its_own(
    exact: WanEngine, engine: WanEngine, requests: list[GenerationRequest]
) -> None:
    """An exact engine names none, and begins again."""
    assert engine.facts.weights_dtype == "fp8"
    assert exact.facts.weights_dtype is None
    step = next(engine.sample(requests[0]))
    assert step.checkpoint is not None
    assert next(exact.sample(requests[0], resume=step.checkpoint())).index == 1


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_make_what_one_makes(engine: WanEngine, requests: list[GenerationRequest]) -> None:
    """Bit for bit over the branches of guidance: the other rank keeps its transformer in e4m3 too."""
    two = WanEngine(inspect("tiny-wan"), device="cpu", gpus=2, parallel="cfg", weights_dtype="fp8")
    try:
        two.load()
        assert torch.equal(sampled(two.sample(requests[0])), sampled(engine.sample(requests[0])))
    finally:
        two.close()
