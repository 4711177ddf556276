"""A CUDA device with too little memory: who runs out of it tries again, and every video has its own bytes."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kinema.engines.base import Frames, Output, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import Peak, forget_highest, highest
from kinema.engines.wan.engine import WanEngine
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.gpu import DeviceThread

CUDA = torch.device("cuda")
# Of what the largest of the videos takes alone, with what the allocator cannot use for pieces of other sizes.
_SPARE = 1.1


class Counting(WanEngine):
    """Counts how often memory had run out."""

    num_made_room = 0

    def make_room(self) -> None:
        self.num_made_room += 1
        super().make_room()


@pytest.fixture(scope="module")
def engine() -> Counting:
    made = Counting(inspect("tiny-wan"), device="cuda")
    made.load()
    return made


@pytest.fixture(scope="module")
def requests(engine: Counting) -> list[GenerationRequest]:
    """Of several sizes, lengths and modes, so that each has graphs and a decoder of its own."""

    def request(**values: object) -> GenerationRequest:
        options = GenerationOptions.model_validate({"prompt": "a red circle", "num_inference_steps": 4, **values})
        return resolve(options, engine.capabilities).request

    sizes = ["128x128", "96x160", "160x96", "64x128", "128x64", "96x96"]
    return [request(size=size, num_frames=33 - 4 * seed, seed=seed) for seed, size in enumerate(sizes)]


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


@contextmanager
def limited_to(num_bytes: float) -> Iterator[None]:
    """torch's allocator gives no more than this."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Device:
    """A device thread, which closes the engine at its end."""

    def __init__(self, engine: WanEngine) -> None:
        self._ends: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self.thread = DeviceThread(engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin")
        self.thread.start()

    def make(self, *requests: GenerationRequest) -> tuple[list[Ended], list[UInt8Array]]:
        """All at once."""
        outputs: list[list[Output]] = [[] for _ in requests]
        for request, made in zip(requests, outputs, strict=True):
            self.thread.admit(Admit(request.seed, request, made.append, self._ends.put))
        ends = [self._ends.get(timeout=120) for _ in requests]
        return ends, [collect(made) if made else np.zeros(0, np.uint8) for made in outputs]

    def stop(self) -> None:
        self.thread.stop()
        self.thread.join()


def test_memory_for_the_largest_alone_is_enough_for_all(engine: Counting, requests: list[GenerationRequest]) -> None:
    """They take turns, and nobody fails."""
    device, alone, peaks = Device(engine), [], []
    device.make(*requests)  # what the libraries keep is there
    for request in requests:
        engine.make_room()
        forget_highest(CUDA)
        alone += device.make(request)[1]
        peaks.append(highest(CUDA).held)
    engine.make_room()
    engine.num_made_room = 0
    with limited_to(_SPARE * max(peaks)):
        ends, together = device.make(*requests)
    device.stop()
    print(f"peaks alone {[peak // 2**20 for peak in peaks]} MB; made room {engine.num_made_room} times")
    assert [end.reason for end in ends] == [EndReason.DONE] * len(requests), ends
    assert engine.num_made_room > 0, f"there was enough: {peaks}"
    for made, expected in zip(together, alone, strict=True):
        assert np.array_equal(made, expected)


def test_forty_shapes_take_little_more_than_the_largest(engine: Counting) -> None:
    """One after the other, on one engine: what was recorded for one is in the memory of the others."""
    sizes = [(width, height) for width in range(64, 161, 16) for height in range(64, 161, 16)][:40]

    def request(width: int, height: int) -> GenerationRequest:
        options = {"prompt": "a red circle", "num_inference_steps": 3, "num_frames": 17, "size": f"{width}x{height}"}
        return resolve(GenerationOptions.model_validate(options), engine.capabilities).request

    device = Device(engine)
    engine.make_room()
    device.make(request(*sizes[0]))
    engine.make_room()
    forget_highest(CUDA)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    assert device.make(request(*largest))[0][0].reason is EndReason.DONE
    alone = highest(CUDA)
    engine.make_room()
    forget_highest(CUDA)
    for size in sizes:
        assert device.make(request(*size))[0][0].reason is EndReason.DONE
    of_all = highest(CUDA)
    device.stop()
    print(f"reserved and allocated, MB: {_mb(alone)} alone, {_mb(of_all)} for forty")
    assert of_all.held <= 1.1 * alone.held


def _mb(peak: Peak) -> list[int]:
    return [peak.held // 2**20, peak.allocated // 2**20]
