"""What a step's errors on a device mean, by torch's own classes, in this process and in the other ranks."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.ranks.channel import error_fields
from kinema.engines.wan.ranks.follower import Follower, _Begun
from kinema.errors import OutOfMemory, WorkerLost
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve


class NoLeader:
    """A channel on which no order comes."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, **fields: Any) -> None:
        self.sent.append(fields)

    def receive(self) -> None:
        threading.Event().wait()


class Sent:
    """A group of ranks, of which this one gets latents and gives a velocity."""

    rank = 1

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def receive(self, _spec: object) -> torch.Tensor:
        return torch.zeros(1, 4, 1, 8, 8)

    def broadcast(self, velocity: torch.Tensor, root: int) -> None:
        assert root == 1
        self.shapes.append(velocity.shape)


class FailingTransformer:
    """Fails in a step, and keeps its own error in a variable beside its tensors."""

    network = SimpleNamespace(out_channels=4)

    def __init__(self, text: str) -> None:
        self._text = text
        self.held: list[weakref.ref[torch.Tensor]] = []

    def velocities(self, _prepared: object, latents: torch.Tensor, _index: int) -> torch.Tensor:
        tokens = latents + 1
        self.held.append(weakref.ref(tokens))
        try:
            raise ValueError("deep")
        except ValueError as exc:
            cycle = exc
            raise RuntimeError(self._text) from cycle


def follower_with(transformer: FailingTransformer) -> tuple[Follower, NoLeader, Sent]:
    channel, group = NoLeader(), Sent()
    follower = Follower(cast(Any, channel))
    follower._group = cast(Any, group)
    follower._transformers = cast(Any, [transformer])
    follower._sharded = [{}]  # a rank with all blocks computes its branch alone
    follower._begun = {1: _Begun(0, cast(Any, "prepared"), {})}
    return follower, channel, group


STEP = {"do": "step", "key": 1, "mode": "cfg", "index": 0, "latents": []}


def test_a_step_that_fails_in_a_rank_is_told_and_holds_no_memory() -> None:
    """With the collector off; the rank goes on with the next order."""
    transformer = FailingTransformer("boom")
    follower, channel, group = follower_with(transformer)
    gc.collect()
    gc.disable()
    try:
        follower._follow(STEP)
        assert [ref() for ref in transformer.held] == [None]
    finally:
        gc.enable()
    assert channel.sent == [{"what": "stepped", "code": "engine_failed", "message": "RuntimeError: boom"}]
    assert group.shapes == [torch.Size([1, 4, 1, 8, 8])]


def test_a_rank_whose_device_failed_sends_nothing_more() -> None:
    """It ends with the error, and rank 0 then knows that the engine is lost, not that the job is bad."""
    follower, channel, group = follower_with(FailingTransformer("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert") as failed:
        follower._follow(STEP)
    assert (channel.sent, group.shapes) == ([], [])
    assert error_fields(failed.value)["code"] == "worker_lost"
    assert error_fields(torch.OutOfMemoryError("CUDA out of memory"))["code"] == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), WorkerLost),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
    ],
)
@pytest.mark.parametrize("part", ["denoise.guide", "engine.decode"])
def test_an_error_of_the_device_is_understood(
    error: Exception, meaning: type[Exception], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own classes, in a step and in a decode."""
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    engine.load()

    def fail(*_arguments: object) -> NoReturn:
        raise error

    asked = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=2)
    made = engine.generate(resolve(asked, engine.capabilities).request)
    next(made)
    monkeypatch.setattr(f"kinema.engines.wan.{part}", fail)
    with pytest.raises(meaning) as failed:
        list(made)
    assert failed.value.__cause__ is error
    engine.close()
