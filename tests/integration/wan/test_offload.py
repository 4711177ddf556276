"""Weights that stay in the host's memory and come when they compute: every bit is that of resident ones.

On the CPU, where a block is copied when its turn comes; tests/gpu/test_offload.py has the streams of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.bench.wan.subject import checkpoint_of
from kinema.engines.base import Frames, Output, Step
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.engines.wan.device_memory import OUTSIDE_BYTES
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Offload, Placement, bytes_wanted, place
from kinema.engines.wan.streaming import BlockStream, StreamedBlocks
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_ti2v, save_two_experts

CPU = torch.device("cpu")
OFFLOADS: tuple[Offload, ...] = ("none", "text", "blocks")


@dataclass(frozen=True)
class Inner:
    values: Tensor
    name: str = "inner"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    scale: Tensor


def blocks(count: int) -> Iterator[Outer]:
    for index in range(count):
        yield Outer(Inner(torch.full((3, 5), index, dtype=torch.bfloat16)), torch.full((2,), index / 2))


def read(streamed: StreamedBlocks[Outer]) -> list[tuple[float, float]]:
    return [(block.inner.values.float().mean().item(), block.scale.sum().item()) for block in streamed]


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_each_pass_gives_the_blocks_in_their_order(count: int, is_kept: bool) -> None:
    stream = BlockStream(CPU, is_kept=is_kept)
    streamed = StreamedBlocks(blocks(count), count, stream)
    expected = [(float(index), float(index)) for index in range(count)]
    assert len(streamed) == count
    assert [read(streamed) for _ in range(3)] == [expected] * 3
    assert (stream.num_bytes > 0) is is_kept
    stream.drop()
    assert stream.num_bytes == 0
    assert read(streamed) == expected


def test_a_pass_that_was_given_up_leaves_nothing_behind() -> None:
    streamed = StreamedBlocks(blocks(5), 5, BlockStream(CPU, is_kept=True))
    for stop in range(5):
        given_up = iter(streamed)
        for _ in range(stop + 1):
            next(given_up)
        del given_up
        assert read(streamed) == [(float(index), float(index)) for index in range(5)]


def test_two_networks_take_turns_on_one_stream() -> None:
    stream = BlockStream(CPU, is_kept=True)
    one, other = StreamedBlocks(blocks(4), 4, stream), StreamedBlocks(blocks(5), 5, stream)
    for _ in range(2):
        assert [first for first, _ in read(one)] == [0, 1, 2, 3]
        assert [first for first, _ in read(other)] == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {"two experts": save_two_experts(folder / "a"), "ti2v": save_ti2v(folder / "b")}
    return {"tiny": "tiny-wan", **{name: str(path) for name, path in made.items()}}


def make(engine: WanEngine, request: GenerationRequest, resume: bytes | None = None) -> list[Output]:
    return list(engine.generate(request, resume=resume))


def frames(outputs: list[Output]) -> np.ndarray:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def engine(model: str, offload: Offload, **values: object) -> WanEngine:
    made = WanEngine(inspect(model), device="cpu", offload=offload, **values)  # type: ignore[arg-type]
    made.load()
    return made


def request_of(made: WanEngine, **values: object) -> GenerationRequest:
    wanted = {"prompt": "a red circle", "size": "64x64", "num_frames": 5, "num_inference_steps": 4, "seed": 3}
    return resolve(GenerationOptions.model_validate(wanted | values), made.capabilities).request


@pytest.mark.parametrize("model", ["tiny", "two experts", "ti2v"])
@pytest.mark.parametrize("offload", ["text", "blocks"])
def test_a_video_has_the_bytes_of_resident_weights(models: dict[str, str], model: str, offload: Offload) -> None:
    resident, offloaded = engine(models[model], "none"), engine(models[model], offload)
    request = request_of(resident)
    assert np.array_equal(frames(make(resident, request)), frames(make(offloaded, request)))
    assert resident.facts == offloaded.facts


@pytest.mark.parametrize("how", [{"linears": "fp8"}, {"weights_dtype": "fp8"}])
def test_large_layers_in_8_bits_too(models: dict[str, str], how: dict[str, str]) -> None:
    resident, offloaded = engine(models["tiny"], "none", **how), engine(models["tiny"], "blocks", **how)
    request = request_of(resident)
    assert np.array_equal(frames(make(resident, request)), frames(make(offloaded, request)))


def test_generations_take_turns_and_go_on_elsewhere(models: dict[str, str]) -> None:
    """On offloaded weights, one of them from the checkpoint of an engine whose weights are resident."""
    resident, offloaded = engine(models["two experts"], "none"), engine(models["two experts"], "blocks")
    requests = [request_of(resident, seed=seed, prompt=prompt) for seed, prompt in enumerate(["a red circle", "sky"])]
    expected = [frames(make(resident, request)) for request in requests]
    begun = resident.generate(requests[1])
    step = next(begun)
    assert isinstance(step, Step)
    assert step.checkpoint is not None
    runs = [offloaded.generate(requests[0]), offloaded.generate(requests[1], resume=step.checkpoint())]
    made: list[list[Output]] = [[], []]
    left = [0, 1]
    while left:
        for index in list(left):
            output = next(runs[index], None)
            if output is None:
                left.remove(index)
            else:
                made[index].append(output)
    for outputs, video in zip(made, expected, strict=True):
        assert np.array_equal(frames(outputs), video)


def test_auto_keeps_as_much_on_the_device_as_fits() -> None:
    checkpoint = inspect("tiny-wan")
    large = checkpoint.text_encoder.model_copy(update={"vocab_size": 2**19, "d_model": 1024})
    tall = replace(checkpoint, text_encoder=large)
    in_order = [Placement(CPU, offload) for offload in OFFLOADS]
    wanted = [bytes_wanted(tall, placement, torch.float32) for placement in in_order]
    for placement, size in zip(in_order, wanted, strict=True):
        assert place(placement.offload, tall, CPU, torch.float32, size).offload == placement.offload
        chosen = place("auto", tall, CPU, torch.float32, size)
        assert bytes_wanted(tall, chosen, torch.float32) <= size
        assert in_order.index(chosen) <= in_order.index(placement)
    assert place("auto", tall, CPU, torch.float32, max(wanted)) == in_order[0]
    assert place("auto", tall, CPU, torch.float32, min(wanted) - 1) == in_order[-1]
    assert place("auto", tall, CPU, torch.float32, None) == in_order[0]
    assert wanted[0] == max(wanted)
    assert wanted[-1] == min(wanted)


def test_auto_offloads_no_block_that_is_split() -> None:
    """Of eight devices each holds an eighth; that has room where whole blocks have none."""
    checkpoint = inspect("tiny-wan")
    split = Placement(CPU, "text", num_parts=8)
    wanted = bytes_wanted(checkpoint, split, torch.float32)
    assert place("auto", checkpoint, CPU, torch.float32, wanted).offload == "blocks"
    assert place("auto", checkpoint, CPU, torch.float32, wanted, 8) == split
    assert place("auto", checkpoint, CPU, torch.float32, 0, 8) == split


def test_the_page_says_what_auto_chooses() -> None:
    """docs/memory.md has a row for each limit and a column for each architecture; image-to-video has its twin's."""
    page = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    found = [row.strip("| ").split(" | ") for row in page.partition("| GB |")[2].split("\n\n")[0].splitlines()[2:]]
    names = ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b"]
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(checkpoint_of(name)) for name in names]
        expected = [[chosen_for(checkpoint, float(row[0])) for checkpoint in checkpoints] for row in found]
    assert [[*row[1:], row[-1]] for row in found] == expected


def chosen_for(checkpoint: Checkpoint, memory_gb: float) -> str:
    limit = int(memory_gb * 1e9) - OUTSIDE_BYTES
    chosen = place("auto", checkpoint, CPU, torch.bfloat16, limit)
    return "too small" if bytes_wanted(checkpoint, chosen, torch.bfloat16) > limit else chosen.offload
