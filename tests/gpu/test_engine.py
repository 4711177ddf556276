"""The tiny model on CUDA: what an engine promises holds with fused kernels and graphs too."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, Step, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve

Request = tuple[GenerationRequest, Inputs]


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    made = WanEngine(inspect("tiny-wan"), device="cuda")
    made.load()
    return made


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[Request]:
    """Four that differ in prompt, size, length, guidance and mode."""

    def request(prompt: str, **values: object) -> GenerationRequest:
        options = GenerationOptions.model_validate({"prompt": prompt, "num_inference_steps": 4, **values})
        return resolve(options, engine.capabilities).request

    image = np.full((64, 96, 3), (10, 200, 30), dtype=np.uint8)
    return [
        (request("a red circle moving right", num_frames=9, seed=1, size="96x64"), NO_INPUTS),
        (request("a blue square moving up", num_frames=9, seed=2, size="96x64"), NO_INPUTS),
        (request("it moves left", num_frames=9, seed=3, size="96x64"), Inputs(first_frame=image)),
        (request("a yellow triangle", num_frames=5, seed=4, size="64x64", guidance_scale=1.0), NO_INPUTS),
    ]


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def test_a_step_is_told_when_the_device_has_done_it(engine: WanEngine, requests: list[Request]) -> None:
    """So what follows waits for one step at most, and a step's time is its own. With the next step launched ahead, as
    it is once the time of such steps is known, the frames are the same bit for bit."""
    waiting = WanEngine(inspect("tiny-wan"), device="cuda", launches_ahead=False)
    waiting.load()
    for request in requests:
        outputs = []
        for output in waiting.generate(*request):
            outputs.append(output)
            if isinstance(output, Step):
                assert torch.cuda.current_stream().query()
        for _ in range(2):
            assert np.array_equal(collect(list(engine.generate(*request))), collect(outputs))
    waiting.close()


def test_interleaved_equals_alone(engine: WanEngine, requests: list[Request]) -> None:
    """Bit for bit, step by step in turn."""
    alone = [collect(list(engine.generate(*request))) for request in requests]
    running = {index: engine.generate(*request) for index, request in enumerate(requests)}
    outputs: list[list[Output]] = [[] for _ in requests]
    while running:
        for index, generator in list(running.items()):
            output = next(generator, None)
            if output is None:
                del running[index]
            else:
                outputs[index].append(output)
    for made, expected in zip(outputs, alone, strict=True):
        assert np.array_equal(collect(made), expected)


@pytest.mark.parametrize("which", range(4))
def test_resumed_equals_uninterrupted(engine: WanEngine, requests: list[Request], which: int) -> None:
    """Bit for bit, from every step."""
    request, inputs = requests[which]
    outputs, checkpoints = [], []
    for output in engine.generate(request, inputs):
        outputs.append(output)
        if isinstance(output, Step):
            assert output.checkpoint is not None
            checkpoints.append(output.checkpoint())
    for checkpoint in checkpoints:
        assert np.array_equal(collect(list(engine.generate(request, inputs, resume=checkpoint))), collect(outputs))


def test_steps_that_are_not_computed_resume_too(requests: list[Request]) -> None:
    """Bit for bit, from every step, while another generation takes its turns."""
    engine = WanEngine(inspect("tiny-wan"), device="cuda", has_step_cache=True)
    engine.load()
    request, other = (one.model_copy(update={"num_inference_steps": 10}) for one, _ in requests[:2])
    outputs: list[Output] = []
    checkpoints: list[bytes] = []
    for output, _ in zip(engine.generate(request), engine.generate(other), strict=True):
        outputs.append(output)
        if isinstance(output, Step):
            assert output.checkpoint is not None
            checkpoints.append(output.checkpoint())
    assert any(isinstance(output, Step) and output.is_cached for output in outputs)
    for checkpoint in [None, *checkpoints]:
        assert np.array_equal(collect(list(engine.generate(request, resume=checkpoint))), collect(outputs))
    engine.close()


def test_a_graph_outlives_the_request_that_it_was_recorded_for(engine: WanEngine, requests: list[Request]) -> None:
    """Whatever takes the memory that the request had."""
    torch.cuda.empty_cache()
    other = WanEngine(inspect("tiny-wan"), device="cuda")
    other.load()
    before = collect(list(other.generate(*requests[0])))
    taken = [torch.full((size,), torch.nan, device="cuda") for size in (2**8, 2**10, 2**12) for _ in range(500)]
    assert np.array_equal(collect(list(other.generate(*requests[0]))), before)
    assert len(taken) == 1500


@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "no graphs"])
def test_memory_of_turns(requests: list[Request], has_graphs: bool) -> None:
    """Each of eight that take turns adds states of its prompts, times, latents and the solver's memory, and no keys and
    values, of which a prompt of 512 tokens has 3 MB."""
    engine = WanEngine(inspect("tiny-wan"), device="cuda", has_graphs=has_graphs)
    engine.load()
    request = requests[0][0].model_copy(update={"prompt": "a red circle moving right " * 200})
    generations = [engine.sample(request.model_copy(update={"seed": seed})) for seed in range(8)]
    for _ in range(2):
        next(generations[0])
    gc.collect()
    before = torch.cuda.memory_allocated()
    for generation in generations[1:]:
        for _ in range(2):
            next(generation)
    gc.collect()
    grown = torch.cuda.memory_allocated() - before
    latents = 16 * 3 * 8 * 12
    kept = 2 * 512 * 128 * 2 + 4 * (6 * 4 + 2) * 256 + 4 * latents * 4 + latents * 2
    assert grown <= 7 * (kept + 64 * 2**10)  # and small tensors, of which each takes 512 bytes or more
    for generation in generations:
        generation.close()
    engine.close()


def test_without_graphs_the_frames_are_the_same(requests: list[Request]) -> None:
    """A graph only replays. The attention is named, since one that is chosen by measurement may differ."""
    recorded, plain = (
        WanEngine(inspect("tiny-wan"), device="cuda", attention="sdpa", has_graphs=has_graphs)
        for has_graphs in (True, False)
    )
    recorded.load()
    plain.load()
    for request in requests:
        assert np.array_equal(collect(list(plain.generate(*request))), collect(list(recorded.generate(*request))))
