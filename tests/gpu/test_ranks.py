"""The tiny model on two GPUs makes what it makes on one, with graphs and NCCL."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kinema.engines.base import NO_INPUTS, Inputs
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.ranks.plan import Parallel
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.ranks import Request, lose_a_rank, take_turns

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, and torch finds {torch.cuda.device_count()}"
)
# bfloat16 sums of other parts, of latents whose deviation is about 1.
_TOLERANCE = 0.1


def started(parallel: Parallel) -> WanEngine:
    engine = WanEngine(inspect("tiny-wan"), device="cuda:0", gpus=2, parallel=parallel, attention="sdpa")
    engine.load()
    return engine


@pytest.fixture(scope="module")
def single() -> WanEngine:
    # Named, since what is chosen by measurement may differ at each start.
    engine = WanEngine(inspect("tiny-wan"), device="cuda:0", attention="sdpa")
    engine.load()
    return engine


@pytest.fixture(scope="module", params=["cfg", "ulysses", "shard"])
def double(request: pytest.FixtureRequest) -> Iterator[WanEngine]:
    engine = started(request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(single: WanEngine) -> list[Request]:
    """The first has so many tokens that a single GPU computes one branch of guidance after the other, as two do."""

    def request(prompt: str, **values: object) -> GenerationRequest:
        options = GenerationOptions.model_validate({"prompt": prompt, "num_inference_steps": 3, **values})
        return resolve(options, single.capabilities).request

    image = np.full((64, 96, 3), (10, 200, 30), dtype=np.uint8)
    long = request("a red circle moving right", num_frames=9, seed=1, size="80x80")
    return [
        (long.model_copy(update={"width": 832, "height": 480, "num_frames": 45}), NO_INPUTS),
        (long, NO_INPUTS),
        (request("it moves left", num_frames=9, seed=3, size="96x64"), Inputs(first_frame=image)),
        (request("a yellow triangle", num_frames=5, seed=4, size="64x64", guidance_scale=1.0), NO_INPUTS),
    ]


def test_two_that_take_turns_make_what_one_makes(single: WanEngine, double: WanEngine, requests: list[Request]) -> None:
    """Bit for bit over the branches of guidance when one GPU computes them one after the other, else but for rounding;
    several at once, and one that is given up after its first step."""
    alone = [take_turns([single.sample(*request)])[0] for request in requests]
    dropped = double.sample(*requests[0])
    next(dropped)
    together = [double.sample(*request) for request in requests]
    next(together[0])
    dropped.close()
    made = take_turns(together)
    for mine, expected in zip(made, alone, strict=True):
        assert torch.allclose(mine, expected, rtol=0, atol=_TOLERANCE), (mine - expected).abs().max()
    if double.facts.parallel == "cfg":
        assert torch.equal(made[0], alone[0])


@pytest.mark.parametrize("parallel", ["cfg", "ulysses", "shard"])
def test_a_killed_rank_loses_the_engine_at_once(parallel: Parallel, requests: list[Request]) -> None:
    """Whatever waits for it on the device ends. Other generations can still be asked for their checkpoints."""
    lose_a_rank(started(parallel), requests[1], requests[2])
