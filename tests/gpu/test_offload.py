"""Weights that stay in the host's memory, on CUDA: blocks cross on a stream of their own while others compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.engines.base import Frames, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Offload
from kinema.engines.wan.ranks.group import Group, Rendezvous
from kinema.engines.wan.ranks.shard import Shard
from kinema.engines.wan.streaming import BlockStream, StreamedBlocks
from kinema.engines.wan.transformer.layers import Linear
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve

CUDA = torch.device("cuda")


def blocks(count: int, size: int) -> list[Linear]:
    generator = torch.Generator().manual_seed(1)
    return [
        Linear(torch.randn(size, size, generator=generator) / size**0.5, torch.randn(size, generator=generator))
        for _ in range(count)
    ]


def new_kept() -> BlockStream:
    return BlockStream(CUDA, is_kept=True)


def new_dropped() -> BlockStream:
    return BlockStream(CUDA, is_kept=False)


def new_gathering() -> BlockStream:
    """The blocks of a split model, whose only rank has all of each: NCCL copies them on a stream of its own."""
    shard = Shard(0, 1, CUDA)
    shard.join(Group(Rendezvous().store, 0, 1, torch.device("cuda", 0), lambda: False))
    return shard.new_stream()


@torch.inference_mode()
@pytest.mark.parametrize("new_stream", [new_kept, new_dropped, new_gathering])
def test_no_block_is_overwritten_while_it_computes(new_stream: Callable[[], BlockStream]) -> None:
    """Products that take longer than a copy, and passes without a pause, of which one is given up."""
    count, size = 7, 2048
    made = blocks(count, size)
    streamed = StreamedBlocks(iter(made), count, new_stream())
    resident = [Linear(one.weight.cuda(), one.bias.cuda()) for one in made]
    x = torch.randn(8192, size, device=CUDA)

    def run(layers: StreamedBlocks[Linear] | list[Linear]) -> Tensor:
        hidden = x
        for layer in layers:
            for _ in range(3):
                hidden = layer(hidden)
        return hidden

    expected = run(resident)
    results = [run(streamed) for _ in range(3)]
    given_up = iter(streamed)
    next(given_up)(x)
    next(given_up)(x)
    del given_up
    results.append(run(streamed))
    assert all(torch.equal(result, expected) for result in results)


def video(offload: Offload, **settings: str) -> tuple[UInt8Array, int]:
    """A video, and the most bytes that tensors took."""
    torch.cuda.reset_peak_memory_stats()
    engine = WanEngine(inspect("tiny-wan"), device="cuda", offload=offload, has_graphs=False, **settings)  # type: ignore[arg-type]
    engine.load()
    options = {"prompt": "a red circle", "num_inference_steps": 4, "num_frames": 17, "seed": 5}
    request = resolve(GenerationOptions.model_validate(options), engine.capabilities).request
    chunks = [output.data for output in engine.generate(request) if isinstance(output, Frames)]
    engine.close()
    return np.concatenate(chunks), torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("settings", [{}, {"weights_dtype": "fp8"}])
def test_a_video_has_the_bytes_of_resident_weights(settings: dict[str, str]) -> None:
    made = [video(offload, **settings)[0] for offload in ("none", "text", "blocks")]
    assert all(np.array_equal(one, made[0]) for one in made)
