"""A CUDA device that plays a smaller one: the limit holds, estimates are near, a thousand videos keep their bytes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch

from kinema.engines.base import Frames, Output, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import OUTSIDE_BYTES, forget_highest, highest
from kinema.engines.wan.engine import WanEngine
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.gpu import DeviceThread

CUDA = torch.device("cuda")
# Of what the largest of the videos takes alone, with what the allocator cannot use for pieces of other sizes: less than
# two of them together.
_SPARE = 1.3
_VIDEOS = 1000
# As many as a worker admits, and half of them hold latents.
_AT_ONCE, _IN_MEMORY = 8, 4
_PATIENCE_S = 300.0


@contextmanager
def opened(memory_gb: float | None = None) -> Iterator[WanEngine]:
    engine = WanEngine(inspect("tiny-wan"), device="cuda", attention="sdpa", offload="none", memory_gb=memory_gb)
    engine.load()
    try:
        yield engine
    finally:
        engine.close()


def request_of(engine: WanEngine, size: str, num_frames: int, seed: int = 0, steps: int = 3) -> GenerationRequest:
    options = {"prompt": f"a red circle, {seed}", "size": size, "num_frames": num_frames, "seed": seed}
    options["num_inference_steps"] = steps
    return resolve(GenerationOptions.model_validate(options), engine.capabilities).request


def requests_of(engine: WanEngine) -> list[GenerationRequest]:
    """Twenty-four of as many sizes and lengths, the largest at the end."""
    shapes = list(product(["64x64", "96x64", "64x96", "128x96", "160x160", "256x256"], [1, 9, 17, 33]))
    return [request_of(engine, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def collect(outputs: Sequence[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def peak_of(engine: WanEngine, request: GenerationRequest) -> int:
    """The most memory that torch holds for the video alone."""
    engine.make_room()
    forget_highest(CUDA)
    list(engine.generate(request))
    return highest(CUDA).held


@pytest.fixture(scope="module")
def narrow_gb() -> float:
    """Enough for the largest of the videos alone, and too little for two."""
    with opened() as engine:
        for _ in range(2):  # the libraries keep some memory from their first call on
            peak = max(peak_of(engine, request) for request in requests_of(engine)[-4:])
    return (_SPARE * peak + OUTSIDE_BYTES) / 1e9


def test_the_limit_bounds_all_that_torch_holds(narrow_gb: float) -> None:
    """Whatever sizes come one after the other; it is lifted at the end."""
    with opened(narrow_gb) as engine:
        forget_highest(CUDA)
        for request in requests_of(engine):
            assert len(collect(list(engine.generate(request)))) == request.num_frames
        peak, memory = highest(CUDA).held, engine.memory
        assert memory is not None
        print(f"limit {memory.limit_bytes / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, residents {memory.residents}")
        assert peak <= memory.limit_bytes
        assert memory.limit_bytes == pytest.approx(narrow_gb * 1e9 - OUTSIDE_BYTES, abs=1)
        assert sum(memory.residents.values()) <= memory.limit_bytes
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(memory.limit_bytes, dtype=torch.uint8, device="cuda")
    torch.empty(memory.limit_bytes + 2**30, dtype=torch.uint8, device="cuda")


def test_an_estimate_of_a_larger_video_is_near() -> None:
    """From small ones, as after a trial video; and from then on it is not below what the large one took."""
    with opened() as engine:
        for size in ("64x64", "128x128"):
            list(engine.generate(request_of(engine, size, 9)))
        large = request_of(engine, "256x256", 33)
        before = engine.memory
        list(engine.generate(large))
        after = engine.memory
    assert before is not None
    assert after is not None
    estimate, measured = before.bytes_for(large), after.bytes_for(large)
    print(f"estimate {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB; {after.step}, {after.decode}")
    assert 0.5 < estimate / measured < 2.0


class Load:
    """Videos on a device thread, a number of them at once: how each ended, and whether its bytes are its own."""

    def __init__(self, engine: WanEngine, expected: dict[int, UInt8Array]) -> None:
        self._expected = expected
        self._places = threading.Semaphore(_AT_ONCE)
        self.ends: list[Ended] = []
        self.num_wrong = 0
        self.thread = DeviceThread(
            engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin", max_in_memory=_IN_MEMORY
        )
        self.thread.start()

    def admit(self, key: int, request: GenerationRequest) -> None:
        assert self._places.acquire(timeout=_PATIENCE_S)
        outputs: list[Output] = []

        def on_end(ended: Ended) -> None:
            self.ends.append(ended)
            if ended.reason is EndReason.DONE:
                self.num_wrong += not np.array_equal(collect(outputs), self._expected[request.seed])
            self._places.release()

        self.thread.admit(Admit(key, request, outputs.append, on_end))

    def finish(self) -> None:
        for _ in range(_AT_ONCE):
            assert self._places.acquire(timeout=_PATIENCE_S)
        self.thread.stop()
        self.thread.join()


def test_a_thousand_videos_keep_their_bytes_on_a_narrow_device(narrow_gb: float) -> None:
    """Of sizes in any order, with too little memory for two of the largest: none fails, and none is another's."""
    with opened() as engine:
        requests = requests_of(engine)
        expected = {request.seed: collect(list(engine.generate(request))) for request in requests}
    chosen = random.Random(0).choices(requests, k=_VIDEOS)
    with opened(narrow_gb) as engine:
        forget_highest(CUDA)
        load = Load(engine, expected)
        for key, request in enumerate(chosen):
            load.admit(key, request)
        load.finish()
        peak = highest(CUDA).held
    num_failed = sum(ended.reason is not EndReason.DONE for ended in load.ends)
    print(
        f"{len(load.ends)} videos: failed {num_failed}, wrong bytes {load.num_wrong}, "
        f"parked {load.thread.num_parked}, resumed {load.thread.num_resumed}, peak {peak / 1e6:.0f} MB"
    )
    assert [ended.error for ended in load.ends if ended.reason is not EndReason.DONE] == []
    assert (len(load.ends), load.num_wrong) == (_VIDEOS, 0)
    assert load.thread.num_parked == load.thread.num_resumed > 0
