"""Who has a device's memory: measured by name, left in order, bounded; and a model that does not fit is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kinema.engines.base import Frames
from kinema.engines.wan import decode, loading
from kinema.engines.wan import engine as wan_engine
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import (
    OUTSIDE_BYTES,
    CudaMemory,
    Peak,
    bytes_of,
    forget_highest,
    highest,
    limit_of,
)
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.residents import Residents
from kinema.engines.wan.transformer.model import PreparedRequest
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.engines.wan.vae.stream import Stream
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve

GB = 10**9


class StandIn:
    """A device's allocator with this much memory, of which each of some holders has a part."""

    def __init__(self, limit_bytes: int, held: dict[str, int] | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.held = held or {}
        self.is_closed = False
        self.peak = 0

    def take(self, num_bytes: int) -> None:
        """So much for a moment."""
        self.peak = max(self.peak, self.allocated_bytes() + num_bytes)

    def allocated_bytes(self) -> int:
        return sum(self.held.values())

    def begin_peak(self) -> None:
        self.peak = self.allocated_bytes()

    def peak_bytes(self) -> int:
        return self.peak

    def free_bytes(self) -> int:
        return self.limit_bytes - sum(self.held.values())

    def give_back(self) -> None:
        for name in [name for name, size in self.held.items() if not size]:
            del self.held[name]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def memory() -> StandIn:
    return StandIn(100, {"graphs": 30, "decoder": 20, "prompts": 10, "transformer": 40})


@pytest.fixture
def residents(memory: StandIn) -> Residents:
    """Three that leave, and weights that do not."""
    made = Residents(memory)
    for name in ("graphs", "decoder", "prompts"):
        made.add(name, partial(memory.held.get, name, 0), partial(memory.held.__setitem__, name, 0))
    made.add("transformer", lambda: memory.held["transformer"])
    return made


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (0, {"graphs": 30, "decoder": 20, "prompts": 10, "transformer": 40}),
        (30, {"decoder": 20, "prompts": 10, "transformer": 40}),
        (31, {"prompts": 10, "transformer": 40}),
        (60, {"transformer": 40}),
        (1000, {"transformer": 40}),
        (None, {"transformer": 40}),
    ],
)
def test_as_many_leave_as_make_room(
    residents: Residents, memory: StandIn, wanted: int | None, left: dict[str, int]
) -> None:
    """In their order; all that can where nobody says how much is wanted, or where it is more than there is."""
    residents.make_room(wanted)
    assert memory.held == left


def test_shared_memory_counts_once() -> None:
    """Views, and the same tensor in two places; dataclasses, sequences and mappings are looked through."""

    @dataclass
    class Layer:
        weight: torch.Tensor
        rest: object

    whole = torch.zeros(10, 10)
    layer = Layer(whole, ({"a": whole[:2], "b": torch.zeros(3, dtype=torch.float16)}, None, "text"))
    assert bytes_of(layer, [whole.t()]) == 400 + 6


@pytest.mark.parametrize(
    ("memory_gb", "available", "limit"),
    [(None, 140 * GB, 140 * GB - OUTSIDE_BYTES), (20.0, 140 * GB, 20 * GB - OUTSIDE_BYTES)],
)
def test_the_limit_is_without_what_lies_beside_the_tensors(memory_gb: float | None, available: int, limit: int) -> None:
    """What is free by default, or what is given."""
    assert limit_of(memory_gb, available, 141 * GB) == limit


@pytest.mark.parametrize(
    ("memory_gb", "available", "sentence"),
    [
        (None, GB // 2, "0.5 GB of the device are free"),
        (0.5, 140 * GB, r"engine\.wan\.memory_gb = 0\.5 cannot be used: give more than 0\.75"),
        (142.0, 140 * GB, "at most 141"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(memory_gb: float | None, available: int, sentence: str) -> None:
    """With what would be accepted."""
    with pytest.raises(ConfigError, match=sentence):
        limit_of(memory_gb, available, 141 * GB)


class Cuda:
    """What torch.cuda says of a device of 100 GB, of which another process has 30."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction = 1.0
        self.held = self.allocated = self.peak = 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (70 * GB - self.held, 100 * GB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: self.held)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._set_fraction)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _device: self._stats())

    def take(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def _set_fraction(self, fraction: float, device: torch.device) -> None:
        assert device.index == 3
        self.fraction = fraction

    def _reset(self, _device: torch.device) -> None:
        self.peak = self.allocated

    def _stats(self) -> dict[str, Any]:
        allocated = {"all": {"current": self.allocated, "peak": self.peak}}
        return {"allocated_bytes": allocated, "reserved_bytes": {"all": {"peak": 2 * self.peak}}}


def test_torch_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is closed; what is free is less where another process has it. What was held before counts as ours."""
    cuda = Cuda(monkeypatch)
    memory = CudaMemory(torch.device("cuda"), 20.0)
    assert cuda.fraction * 100 * GB == pytest.approx(20 * GB - OUTSIDE_BYTES)
    cuda.held = 5 * GB
    assert memory.free_bytes() == 15 * GB - OUTSIDE_BYTES
    memory.close()
    assert cuda.fraction == 1.0
    largest = CudaMemory(torch.device("cuda", 3))
    assert largest.limit_bytes == 70 * GB - OUTSIDE_BYTES
    assert largest.free_bytes() == 65 * GB - OUTSIDE_BYTES


def test_who_measures_a_turn_hides_no_peak_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has one peak, which each turn begins anew."""
    cuda, device = Cuda(monkeypatch), torch.device("cuda", 3)
    memory = CudaMemory(device)
    forget_highest(device)
    for num_bytes in (700, 200):
        memory.begin_peak()
        cuda.take(num_bytes)
        cuda.take(-num_bytes)
        assert (memory.peak_bytes(), memory.allocated_bytes()) == (num_bytes, 0)
    assert highest(device) == Peak(allocated=700, held=1400)
    forget_highest(device)
    assert highest(device) == Peak()


def test_a_bound_is_for_cuda() -> None:
    """A CPU's memory is not bounded by it, so a start with it is refused."""
    with pytest.raises(ConfigError, match=r"engine\.wan\.memory_gb .* engine\.device is cpu; leave it out"):
        WanEngine(inspect("tiny-wan"), device="cpu", memory_gb=20.0)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they take and what there is; the bound is lifted again."""
    checkpoint = inspect("tiny-wan")
    parts = loading.load(checkpoint, Placement(torch.device("cpu")), torch.float32)
    needs = bytes_of(parts.text_encoder.weights, parts.vae.weights, parts.transformer.tensors)
    opened = [StandIn(needs), StandIn(needs - 1)]
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: opened[0])
    engine = WanEngine(checkpoint, device="cpu", offload="none")
    engine.load()
    engine.close()
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: opened[1])
    reading = WanEngine(
        checkpoint, device="cpu", offload="none", load_components=lambda *_: pytest.fail("they were read")
    )
    with pytest.raises(
        ConfigError, match=f"its weights take {needs / 1e9:.3g} GB there, and all of its tensors may take"
    ):
        reading.load()
    assert all(one.is_closed for one in opened)


@pytest.mark.parametrize("at", ["weights", "decoder"])
def test_memory_that_runs_out_in_the_load_is_said(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weights get their memory, or after that; and a later load is as good as the first."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    owner, name = {"weights": (loading, "empty_vae"), "decoder": (VaeDecoder, "__init__")}[at]
    engine = WanEngine(inspect("tiny-wan"), device="cpu", offload="none")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(ConfigError, match=r"tiny-wan does not fit into the memory of cpu: its weights take 0\.0"):
            engine.load()
    engine.load()


def request_of(engine: WanEngine, **values: object) -> GenerationRequest:
    options = {"prompt": "a red circle", "num_inference_steps": 2, "size": "64x64", "num_frames": 5, **values}
    return resolve(GenerationOptions.model_validate(options), engine.capabilities).request


def test_the_engine_learns_what_a_video_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step by its tokens and passes, a decode by its pixels, and what lies there by name."""
    memory = StandIn(GB)
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: memory)
    engine = WanEngine(inspect("tiny-wan"), device="cpu", offload="none")
    assert engine.memory is None
    engine.load()
    velocities, decoded = engine.parts.transformer.velocities, Stream.step

    def step(prepared: PreparedRequest, latents: torch.Tensor, index: int) -> torch.Tensor:
        memory.take(1000 * math.prod(prepared.grid) * len(prepared.prompts.states))
        return velocities(prepared, latents, index)

    def decode_one(stream: Stream, latent: torch.Tensor) -> object:
        # Its buffers stay until the film is decoded; the second picture takes more than the first.
        memory.held["stream"] = memory.held.get("stream", 0) + 100 * latent.shape[0] * latent.shape[1]
        memory.take(7)
        return decoded(stream, latent)

    monkeypatch.setattr(engine.parts.transformer, "velocities", step)
    monkeypatch.setattr(Stream, "step", decode_one)
    fresh = engine.memory
    assert fresh is not None
    assert not fresh.is_measured
    kinds = ["graphs", "decoder", "prompts", "loras", "text encoder", "transformer", "vae"]
    assert list(fresh.residents) == kinds
    assert fresh.residents["transformer"] == bytes_of(engine.parts.transformer.network)
    assert fresh.room_bytes == GB - sum(fresh.residents[name] for name in kinds[4:])
    request = request_of(engine)
    list(engine.generate(request))
    known = engine.memory
    assert known is not None
    assert known.is_measured
    num_tokens = 4 * 4 * 2  # of 16x16 pixels, in two latent frames
    assert known.step is not None
    assert known.step.bytes_for(known.step_units(request)) == pytest.approx(1000 * 2 * num_tokens)
    assert known.decode is not None
    assert known.decode.bytes_for(request.size.pixels) == pytest.approx(2 * 100 * 64 + 7)
    assert known.residents["prompts"] > 0
    assert known.room_bytes < fresh.room_bytes  # a step needs the keys and values of its prompts
    engine.make_room()
    assert engine.memory is not None
    assert engine.memory.residents["prompts"] == 0
    engine.close()
    assert engine.memory is None


def test_blocks_that_pass_by_leave_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the transformer's blocks stay in the host's memory, the device has those that compute; no frame changes."""
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: StandIn(GB))
    engine = WanEngine(inspect("tiny-wan"), device="cpu", offload="blocks")
    engine.load()
    fresh = engine.memory
    assert fresh is not None
    request = request_of(engine)
    frames = [output.data for output in engine.generate(request) if isinstance(output, Frames)]
    used = engine.memory
    assert used is not None
    assert used.residents["streamed blocks"] > fresh.residents["streamed blocks"] == 0
    assert used.room_bytes <= fresh.room_bytes - used.residents["streamed blocks"]
    engine.make_room()
    assert engine.memory is not None
    assert engine.memory.residents["streamed blocks"] == 0
    again = [output.data for output in engine.generate(request) if isinstance(output, Frames)]
    assert all(np.array_equal(one, other) for one, other in zip(frames, again, strict=True))


def test_a_decode_asks_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it begins, where it is known to need more than is free; prompts are then encoded again."""
    memory = StandIn(GB)
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: memory)
    engine = WanEngine(inspect("tiny-wan"), device="cpu", offload="none")
    engine.load()
    left: list[int] = []
    decoded = Stream.step

    def decode_one(stream: Stream, latent: torch.Tensor) -> object:
        assert engine._residents is not None
        left.append(engine._residents.sizes()["prompts"])
        memory.take(1000)
        return decoded(stream, latent)

    monkeypatch.setattr(Stream, "step", decode_one)
    request = request_of(engine, num_frames=1)
    list(engine.generate(request))
    memory.held["others"] = GB - 1000
    list(engine.generate(request))
    memory.held["others"] += 1
    list(engine.generate(request))
    assert left[0] == left[1] > left[2] == 0


def test_the_idle_decoder_has_a_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the card, most of which may be somebody else's."""
    asked: list[float] = []
    plain = decode.VaeDecoder

    def make(*args: object, max_idle_bytes: float, **options: object) -> VaeDecoder:
        asked.append(max_idle_bytes)
        return plain(*args, max_idle_bytes=max_idle_bytes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "VaeDecoder", make)
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: StandIn(10 * GB))
    WanEngine(inspect("tiny-wan"), device="cpu", offload="none").load()
    assert asked == [GB]
