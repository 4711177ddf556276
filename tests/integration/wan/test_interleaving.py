"""Generations that take turns on one engine make what each makes alone: the real tiny model, on the CPU."""

from __future__ import annotations

import itertools
import queue
import random
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, Step, UInt8Array
from kinema.engines.wan import conditioning
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.solvers.unipc import UniPC
from kinema.engines.wan.transformer import model
from kinema.engines.wan.transformer.embeddings import Rotation, Text, modulate
from kinema.engines.wan.transformer.forward import Forward
from kinema.engines.wan.transformer.model import StepKey
from kinema.engines.wan.transformer.network import Network
from kinema.engines.wan.vae.stream import Stream
from kinema.errors import OutOfMemory
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.gpu import DeviceThread

Request = tuple[GenerationRequest, Inputs]


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    """Tests that run in two processes have one thread each; here two share every sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    made = WanEngine(inspect("tiny-wan"), device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[Request]:
    """Six that differ in prompt, length, size, steps, guidance, solver and mode: text, text, image, film, text and
    image.
    """

    def request(prompt: str, **values: object) -> GenerationRequest:
        options = GenerationOptions.model_validate({"prompt": prompt, "num_inference_steps": 4, **values})
        return resolve(options, engine.capabilities).request

    image = np.full((64, 96, 3), (10, 200, 30), dtype=np.uint8)
    film = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    edit = request("a green star spinning", num_frames=5, seed=4, size="64x64").model_copy(update={"strength": 0.6})
    few = request("a blue square moving up", num_frames=5, seed=2, size="64x64", guidance_scale=1.0)
    turn = request("it turns", num_frames=5, seed=6, size="96x64", num_inference_steps=2)
    return [
        (request("a red circle moving right", num_frames=9, seed=1, size="96x64"), NO_INPUTS),
        (few.model_copy(update={"solver": "lcm", "timesteps": (1000.0, 750.0, 500.0, 250.0)}), NO_INPUTS),
        (
            request("it moves left", num_frames=5, seed=3, size="96x64", num_inference_steps=3),
            Inputs(first_frame=image),
        ),
        (edit, Inputs(film=film)),
        (request("a yellow triangle moving down", num_frames=1, seed=5, size="64x96"), NO_INPUTS),
        (turn.model_copy(update={"solver": "euler"}), Inputs(first_frame=image)),
    ]


@pytest.fixture(scope="module")
def alone(engine: WanEngine, requests: list[Request]) -> list[UInt8Array]:
    return [collect(list(engine.generate(*request))) for request in requests]


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def take_turns(generators: list[Generator[Output, None, None]], order: random.Random | None) -> list[UInt8Array]:
    """Round robin, or in any order, until all have ended."""
    outputs: list[list[Output]] = [[] for _ in generators]
    running = list(range(len(generators)))
    while running:
        for i in list(running) if order is None else [order.choice(running)]:
            output = next(generators[i], None)
            if output is None:
                running.remove(i)
            else:
                outputs[i].append(output)
    return [collect(found) for found in outputs]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_interleaved_equals_alone(
    count: int, engine: WanEngine, requests: list[Request], alone: list[UInt8Array]
) -> None:
    """Bit for bit, with two, three or six generations at once, the latest ones of the six, in any order."""
    together = take_turns([engine.generate(*request) for request in requests[-count:]], random.Random(count))
    for made, expected in zip(together, alone[-count:], strict=True):
        assert np.array_equal(made, expected)


def test_in_turn_equals_alone(engine: WanEngine, requests: list[Request], alone: list[UInt8Array]) -> None:
    """Round robin, which begins all six before one of them ends."""
    together = take_turns([engine.generate(*request) for request in requests], None)
    for made, expected in zip(together, alone, strict=True):
        assert np.array_equal(made, expected)


def test_parked_equals_alone(engine: WanEngine, requests: list[Request], alone: list[UInt8Array]) -> None:
    """With room for one, which leaves as a checkpoint after each of its steps."""
    outputs: list[list[Output]] = [[] for _ in requests]
    ends: queue.SimpleQueue[Ended] = queue.SimpleQueue()
    device = DeviceThread(engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin", max_in_memory=1)
    for key, (request, inputs) in enumerate(requests):
        device.admit(Admit(key, request, outputs[key].append, ends.put, inputs))
    device.start()
    assert [ends.get(timeout=120) for _ in requests] == [Ended(EndReason.DONE)] * len(requests)
    device.stop()
    device.join()
    engine.load()
    for made, expected in zip(outputs, alone, strict=True):
        assert np.array_equal(collect(made), expected)


@pytest.mark.parametrize("at", ["text", "frames", "step", "solver", "decode"])
def test_out_of_memory_equals_alone(
    at: str,
    engine: WanEngine,
    requests: list[Request],
    alone: list[UInt8Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whatever it happens, several times: the generation tries again from the step before, and no frame changes."""
    owner, name, calls = {
        "text": (conditioning, "encode_text", [1, 4, 7]),
        "frames": (conditioning, "_pixels", [1, 3]),
        "step": (engine.parts.transformer, "velocities", [1, 4, 9, 11]),
        "solver": (UniPC, "_update", [1, 4, 8, 15]),
        "decode": (Stream, "step", [1, 6, 11]),
    }[at]
    plain, counter = getattr(owner, name), itertools.count(1)

    def fail_at_times(*arguments: object, **options: object) -> object:
        if next(counter) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return plain(*arguments, **options)

    engine.make_room()
    monkeypatch.setattr(owner, name, fail_at_times)
    outputs: list[list[Output]] = [[] for _ in requests]
    ends: queue.SimpleQueue[Ended] = queue.SimpleQueue()
    device = DeviceThread(engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin")
    for key, (request, inputs) in enumerate(requests):
        device.admit(Admit(key, request, outputs[key].append, ends.put, inputs))
    device.start()
    assert [ends.get(timeout=120) for _ in requests] == [Ended(EndReason.DONE)] * len(requests)
    assert next(counter) > max(calls)
    monkeypatch.undo()
    device.stop()
    device.join()
    engine.load()
    for made, expected in zip(outputs, alone, strict=True):
        assert np.array_equal(collect(made), expected)


class EagerGraph:
    """A recorded step without CUDA: like one, it reads prompts always from the memory that it was recorded with."""

    pool_bytes = 0

    def __init__(
        self, key: StepKey, network: Network, forward: Forward, text: Text, rotation: Rotation, _pool: object
    ) -> None:
        self._key, self.network, self._forward, self._text, self._rotation = key, network, forward, text, rotation

    def replay(self, latents: torch.Tensor, projected: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        modulation = modulate(self.network, projected, embedded, self._key.num_clean)
        return self._forward.velocities(latents, modulation, self._rotation, self._text)


@pytest.fixture
def recording(engine: WanEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[WanEngine]:
    """The engine with recorded steps."""
    monkeypatch.setattr(model, "StepGraph", EagerGraph)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_new_pool", lambda: "pool")
        engine.load()
        engine.make_room()
        yield engine
    engine.load()
    engine.make_room()


def test_out_of_memory_in_a_recording_equals_alone(
    recording: WanEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded steps leave with the prompts that they read, and are recorded again."""
    requests, counter = requests[:3], itertools.count(1)
    expected = [collect(list(recording.generate(*request))) for request in requests]
    plain = EagerGraph.__init__

    def fail_at_times(*arguments: Any) -> None:
        if next(counter) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        plain(*arguments)

    recording.make_room()
    monkeypatch.setattr(EagerGraph, "__init__", fail_at_times)
    ends, made = run_all(recording, requests)
    assert ends == [Ended(EndReason.DONE)] * len(requests)
    assert next(counter) > 4
    assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize(("at", "key"), [("text", 1), ("frames", 3), ("step", 0), ("solver", 2), ("decode", 4)])
def test_one_that_never_fits_fails_alone(
    at: str,
    key: int,
    engine: WanEngine,
    requests: list[Request],
    alone: list[UInt8Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it is that its memory runs out: one before it and one after it are done, with their own bytes."""
    failing, near = requests[key][0], [(key + by) % len(requests) for by in (-1, 0, 1)]
    owner, name = {
        "text": (conditioning, "encode_text"),
        "frames": (conditioning, "_pixels"),
        "step": (engine.parts.transformer, "velocities"),
        "solver": (UniPC, "_update"),
        "decode": (Stream, "step"),
    }[at]
    plain, generate = getattr(owner, name), engine.generate
    running: list[GenerationRequest] = []

    def follow(request: GenerationRequest, *rest: Any) -> Generator[Output, None, None]:
        outputs = generate(request, *rest)
        while True:
            running[:] = [request]
            if (output := next(outputs, None)) is None:
                return
            yield output

    def fail(*arguments: Any, **options: Any) -> Any:
        if running == [failing]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return plain(*arguments, **options)

    engine.make_room()
    monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(engine, "generate", follow)
    ends, made = run_all(engine, [requests[number] for number in near])
    monkeypatch.undo()
    engine.load()
    assert [ended.reason for ended in ends] == [EndReason.DONE, EndReason.FAILED, EndReason.DONE]
    assert isinstance(ends[1].error, OutOfMemory)
    for number, one in zip(near, made, strict=True):
        assert number == key or np.array_equal(one, alone[number])


def run_all(engine: WanEngine, requests: list[Request]) -> tuple[list[Ended], list[UInt8Array]]:
    """All at once on a device thread, which closes the engine: how each ended, and its frames."""
    outputs: list[list[Output]] = [[] for _ in requests]
    ends: queue.SimpleQueue[tuple[int, Ended]] = queue.SimpleQueue()
    device = DeviceThread(engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin")
    for key, (request, inputs) in enumerate(requests):

        def on_end(ended: Ended, key: int = key) -> None:
            ends.put((key, ended))

        device.admit(Admit(key, request, outputs[key].append, on_end, inputs))
    device.start()
    found = dict(ends.get(timeout=120) for _ in requests)
    device.stop()
    device.join()
    none = np.zeros((0, 1, 1), np.uint8)
    made = [collect(one) if any(isinstance(output, Frames) for output in one) else none for one in outputs]
    return [found[key] for key in range(len(requests))], made


def test_the_same_seed_makes_the_same_frames(
    engine: WanEngine, requests: list[Request], alone: list[UInt8Array]
) -> None:
    """And another seed makes others: of text, of an image and of a film."""
    for (request, inputs), expected in zip(requests[1:4], alone[1:4], strict=True):
        assert np.array_equal(collect(list(engine.generate(request, inputs))), expected)
        other = request.model_copy(update={"seed": 99})
        assert not np.array_equal(collect(list(engine.generate(other, inputs))), expected)


def test_steps_come_first_and_then_a_chunk_per_latent_frame(engine: WanEngine, requests: list[Request]) -> None:
    """The order and the numbers that progress is made of."""
    outputs = list(engine.generate(*requests[0]))
    assert [(o.index, o.total) for o in outputs if isinstance(o, Step)] == [(i, 4) for i in (1, 2, 3, 4)]
    chunks = [o for o in outputs[4:] if isinstance(o, Frames)]
    assert [len(chunk.data) for chunk in chunks] == [1, 4, 4]
    assert [(chunk.index, chunk.total) for chunk in chunks] == [(1, 3), (2, 3), (3, 3)]


def test_an_edit_counts_the_steps_that_are_left(engine: WanEngine, requests: list[Request]) -> None:
    """Two of four at a strength of 0.6."""
    steps = [output for output in engine.generate(*requests[3]) if isinstance(output, Step)]
    assert steps == [Step(1, 2), Step(2, 2)]


def test_a_closed_generation_leaves_the_others_alone(
    engine: WanEngine, requests: list[Request], alone: list[UInt8Array]
) -> None:
    """Cancelling is closing; whoever shares the engine does not notice."""
    kept, dropped = engine.generate(*requests[0]), engine.generate(*requests[1])
    outputs = [next(kept)]
    next(dropped)
    outputs.append(next(kept))
    dropped.close()
    outputs += list(kept)
    assert np.array_equal(collect(outputs), alone[0])
