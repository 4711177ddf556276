"""The device thread by itself, with plain functions for a world."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, StageReport, Step, report_nothing
from kinema.engines.fake import FakeEngine
from kinema.errors import OutOfMemory, WorkerLost
from kinema.request.request import GenerationRequest
from kinema.storage import Storage
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.checkpoints import Checkpoints
from kinema.worker.costs import CostModel
from kinema.worker.gpu import DeviceThread
from kinema.worker.previews import preview_of
from kinema.worker.scheduler import Policy
from tests.unit.worker.tasks import PATIENCE_S, make_request, make_task


@dataclass
class Listener:
    """Collects what the thread tells of one generation."""

    outputs: list[Output] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)
    num_running_at_end: list[int] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def on_end(self, ended: Ended) -> None:
        self.ends.append(ended)
        self.is_over.set()

    def wait(self) -> Ended:
        assert self.is_over.wait(PATIENCE_S)
        return self.ends[-1]


class Device:
    """A device thread that is loaded, and its engine. Seconds are those that the engine waits for, and pass at once."""

    def __init__(self, engine: FakeEngine, policy: Policy = "shortest", max_in_memory: int | None = None) -> None:
        self.engine = engine
        self.costs = CostModel()
        self.seconds = 0.0
        engine._wait = self._pass
        self.has_exited = threading.Event()
        self.load_errors: list[BaseException | None] = []
        # The number of generations that had ended when the device was lost.
        self.losses: list[int] = []
        self.num_ended = 0
        loaded = threading.Event()

        def on_loaded(error: BaseException | None) -> None:
            self.load_errors.append(error)
            loaded.set()

        self.thread = DeviceThread(
            engine,
            on_loaded=on_loaded,
            on_exit=self.has_exited.set,
            on_lost=lambda: self.losses.append(self.num_ended),
            policy=policy,
            costs=self.costs,
            max_in_memory=max_in_memory,
            clock=lambda: self.seconds,
        )
        self.thread.start()
        assert loaded.wait(PATIENCE_S)

    def _pass(self, seconds: float) -> None:
        self.seconds += seconds

    def admit(self, key: int, request: GenerationRequest) -> Listener:
        listener = Listener()

        def on_end(ended: Ended) -> None:
            self.num_ended += 1
            listener.num_running_at_end.append(self.engine.num_running)
            listener.on_end(ended)

        self.thread.admit(Admit(key, request, listener.outputs.append, on_end))
        return listener


@pytest.fixture
def open_device() -> Iterator[Callable[..., Device]]:
    """Makes devices and stops them at the end of the test."""
    devices: list[Device] = []

    def make(engine: FakeEngine, policy: Policy = "shortest", max_in_memory: int | None = None) -> Device:
        devices.append(Device(engine, policy, max_in_memory))
        return devices[-1]

    yield make
    for device in devices:
        device.thread.stop()
        device.thread.join()


@dataclass
class Order:
    """Whose outputs came when; nothing goes on before ``go`` is set."""

    seen: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: GenerationRequest, output: Output) -> None:
        self.go.wait(PATIENCE_S)
        self.seen.append(request.prompt)


def test_a_short_generation_overtakes_a_long_one(open_device: Callable[..., Device]) -> None:
    """One that comes later is done first, and the long one loses nothing but time."""
    order = Order()
    device = open_device(FakeEngine(step_s=1.0, on_output=order))
    order.go.set()
    assert device.admit(0, make_request("what a step costs")).wait() == Ended(EndReason.DONE)
    order.go.clear()
    order.seen.clear()
    long = device.admit(1, make_request("long", num_inference_steps=20))
    short = device.admit(2, make_request("short", num_inference_steps=2, num_frames=1))
    order.go.set()
    assert short.wait() == Ended(EndReason.DONE)
    assert long.wait() == Ended(EndReason.DONE)
    alone = order.seen.index("short")
    assert alone <= 1  # the long one was alone in its first step, or not even that
    assert order.seen == ["long"] * alone + ["short"] * 3 + ["long"] * (23 - alone)
    assert [type(output) for output in long.outputs] == [Step] * 20 + [Frames] * 3


def test_round_robin_takes_turns(open_device: Callable[..., Device]) -> None:
    """Two generations that are there from the start alternate."""
    order = Order()
    device = open_device(FakeEngine(on_output=order), "round-robin")
    one = device.admit(1, make_request("one", num_inference_steps=20))
    other = device.admit(2, make_request("other", num_inference_steps=20))
    order.go.set()
    assert one.wait() == other.wait() == Ended(EndReason.DONE)
    assert order.seen == ["one", "other"] * 23


def test_what_does_not_fit_waits_as_a_checkpoint(open_device: Callable[..., Device]) -> None:
    """So many hold latents and no more, however often they take turns; no step is taken twice, the frames are right."""
    order = Order()
    num_in_memory: list[int] = []

    def on_output(request: GenerationRequest, output: Output) -> None:
        order(request, output)
        num_in_memory.append(engine.num_running)

    engine = FakeEngine(on_output=on_output)
    device = open_device(engine, "round-robin", 2)
    requests = [make_request(name, num_inference_steps=5) for name in ("a", "b", "c", "d")]
    listeners = [device.admit(key, request) for key, request in enumerate(requests)]
    order.go.set()
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.wait() == Ended(EndReason.DONE)
        assert listener.outputs[:5] == [Step(index, 5) for index in range(1, 6)]
        made = [output.data for output in listener.outputs if isinstance(output, Frames)]
        alone = [output.data for output in FakeEngine().generate(request) if isinstance(output, Frames)]
        assert np.array_equal(np.concatenate(made), np.concatenate(alone))
    assert order.seen[4:12] == ["a", "b", "c", "d"] * 2
    assert max(num_in_memory[:20]) == 2
    assert device.thread.num_parked == device.thread.num_resumed > 10


def test_fifo_serves_the_oldest_to_its_end(open_device: Callable[..., Device]) -> None:
    """Whatever came later and is shorter."""
    order = Order()
    device = open_device(FakeEngine(on_output=order), "fifo")
    long = device.admit(1, make_request("long", num_inference_steps=20))
    short = device.admit(2, make_request("short", num_inference_steps=2, num_frames=1))
    order.go.set()
    assert long.wait() == short.wait() == Ended(EndReason.DONE)
    assert order.seen == ["long"] * 23 + ["short"] * 3


def test_the_end_says_what_the_device_spent(open_device: Callable[..., Device]) -> None:
    """On this generation alone, not on the one beside it; and the costs were learned from it."""
    device = open_device(FakeEngine(step_s=2.0))
    long = device.admit(1, make_request("long", num_inference_steps=9))
    short = device.admit(2, make_request("short", num_inference_steps=2))
    assert (long.wait().device_s, short.wait().device_s) == (18.0, 4.0)
    assert device.costs.remaining_s(make_request("next", num_inference_steps=50)) == 100.0


def test_a_step_without_the_model_teaches_no_costs(open_device: Callable[..., Device]) -> None:
    """Those with it take as long as ever, and are fewer."""

    class Caching(FakeEngine):
        def generate(self, request: GenerationRequest, *args: object) -> Generator[Output, None, None]:
            for index in range(1, request.num_denoising_steps + 1):
                is_cached = index % 4 != 1
                self._wait(0.0 if is_cached else 2.0)
                yield Step(index, request.num_denoising_steps, is_cached=is_cached)

    device = open_device(Caching())
    assert device.admit(1, make_request(num_inference_steps=9)).wait().device_s == 6.0
    assert device.costs.next_turn_s(make_request(num_inference_steps=50)) == 2.0
    assert device.costs.remaining_s(make_request(num_inference_steps=9)) == pytest.approx(6.0, abs=0.1)


def test_everything_of_the_engine_runs_on_the_one_thread() -> None:
    """Load, steps and close."""
    seen: list[tuple[str, int]] = []

    class Watching(FakeEngine):
        def load(self, report: StageReport = report_nothing) -> None:
            seen.append(("load", threading.get_ident()))

        def close(self) -> None:
            seen.append(("close", threading.get_ident()))

    engine = Watching(on_output=lambda _request, _output: seen.append(("step", threading.get_ident())))
    device = Device(engine)
    device.admit(1, make_request()).wait()
    device.thread.stop()
    device.thread.join()
    assert [name for name, _ in seen] == ["load"] + ["step"] * 6 + ["close"]
    assert len({thread for _, thread in seen}) == 1
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_cancel_takes_effect_before_the_next_step(open_device: Callable[[FakeEngine], Device]) -> None:
    """The step that runs is the last one, and the generator has freed what it held."""
    in_step, go_on = threading.Event(), threading.Event()

    def on_output(_request: GenerationRequest, output: Output) -> None:
        if output == Step(2, 3):
            in_step.set()
            go_on.wait(PATIENCE_S)

    device = open_device(FakeEngine(on_output=on_output))
    listener = device.admit(1, make_request())
    assert in_step.wait(PATIENCE_S)
    device.thread.cancel(1)
    device.thread.cancel(77)
    go_on.set()
    assert listener.wait() == Ended(EndReason.CANCELLED)
    assert listener.outputs == [Step(1, 3), Step(2, 3)]
    assert listener.num_running_at_end == [0]


def test_an_exception_ends_its_own_generation_only(open_device: Callable[[FakeEngine], Device]) -> None:
    """The neighbour finishes, and the next one too."""

    def on_output(request: GenerationRequest, output: Output) -> None:
        if request.prompt == "bad" and output == Step(3, 3):
            raise RuntimeError("boom")

    device = open_device(FakeEngine(on_output=on_output))
    bad, good = device.admit(1, make_request("bad")), device.admit(2, make_request("good"))
    ended = bad.wait()
    assert ended.reason is EndReason.FAILED
    assert isinstance(ended.error, RuntimeError)
    assert good.wait() == Ended(EndReason.DONE)
    assert device.admit(3, make_request()).wait() == Ended(EndReason.DONE)


def test_a_lost_engine_ends_the_thread(open_device: Callable[..., Device]) -> None:
    """All generations are lost with it; those that stand at a step are asked for it, to go on elsewhere."""
    left: list[Step] = []
    are_both_there = threading.Event()

    def lose(request: GenerationRequest, _output: Output) -> None:
        assert are_both_there.wait(PATIENCE_S)
        if request.seed == 2:
            raise WorkerLost

    device = open_device(FakeEngine(on_output=lose), "round-robin")
    standing, stepping = Listener(), Listener()
    device.thread.admit(
        Admit(
            1,
            make_request(seed=1, num_inference_steps=9),
            standing.outputs.append,
            standing.on_end,
            on_leave=left.append,
        )
    )
    device.thread.admit(Admit(2, make_request(seed=2), stepping.outputs.append, stepping.on_end))
    are_both_there.set()
    assert stepping.wait().reason is EndReason.LOST
    assert standing.wait().reason is EndReason.LOST
    assert left == standing.outputs == [Step(1, 9)]
    assert device.has_exited.wait(PATIENCE_S)
    assert not device.engine.is_loaded


class AcceleratorError(RuntimeError):
    """Named as torch's own class."""


LOST_DEVICES = [
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, ...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("NCCL error in: ../NCCLUtils.hpp:268, unhandled cuda error"),
]


@pytest.mark.parametrize("output", ["Step 2", "Frames 1"])
@pytest.mark.parametrize("error", LOST_DEVICES, ids=str)
def test_a_device_that_failed_is_lost_for_all(
    open_device: Callable[..., Device], error: Exception, output: str
) -> None:
    """Nothing more is tried on it: what runs, waits or comes later is lost, and the thread ends with the engine."""
    are_all_there = threading.Event()

    def fail(_request: GenerationRequest, made: Output) -> None:
        assert are_all_there.wait(PATIENCE_S)
        if f"{type(made).__name__} {made.index}" == output:
            raise error

    device = open_device(FakeEngine(on_output=fail), "round-robin")
    listeners = [device.admit(key, make_request(str(key))) for key in range(3)]
    are_all_there.set()
    assert [listener.wait() for listener in listeners] == [Ended(EndReason.LOST)] * 3
    assert device.has_exited.wait(PATIENCE_S)
    assert (device.losses, device.engine.is_loaded) == ([0], False)
    assert device.admit(9, make_request()).wait() == Ended(EndReason.LOST)


def test_a_device_without_memory_is_not_lost(open_device: Callable[..., Device]) -> None:
    """The job that asked for too much fails by the name of that, and the next one is made."""

    def fail(request: GenerationRequest, _output: Output) -> None:
        if request.prompt == "large":
            raise AcceleratorError("CUDA error: out of memory")

    device = open_device(FakeEngine(on_output=fail))
    ended = device.admit(1, make_request("large")).wait()
    assert (ended.reason, type(ended.error)) == (EndReason.FAILED, OutOfMemory)
    assert device.admit(2, make_request()).wait() == Ended(EndReason.DONE)
    assert device.losses == []


class Narrow(FakeEngine):
    """A device with room for so many generations; one more raises the error of torch. Decoding takes as much as two."""

    def __init__(self, room: int, decoding: int = 2) -> None:
        self.go = threading.Event()
        super().__init__(on_output=lambda _request, _output: self.go.wait(PATIENCE_S))
        self.room = room
        self._decoding = decoding
        self._taken: dict[int, int] = {}
        self.num_failed = 0
        self.num_made_room = 0

    def generate(
        self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None
    ) -> Generator[Output, None, None]:
        outputs = super().generate(request, resume=resume)
        try:
            while True:
                self._taken[request.seed] = 1
                self._check()
                output = next(outputs, None)
                if output is None:
                    return
                if isinstance(output, Frames):
                    self._taken[request.seed] = self._decoding
                    if output.index > 1:  # the first chunk is small
                        self._check()
                yield output
        finally:
            outputs.close()
            del self._taken[request.seed]

    def _check(self) -> None:
        if sum(self._taken.values()) > self.room:
            self.num_failed += 1
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")

    def make_room(self) -> None:
        self.num_made_room += 1


class OutOfMemoryError(RuntimeError):
    """Named as torch's own class."""


@pytest.mark.parametrize("policy", ["round-robin", "shortest"])
@pytest.mark.parametrize("room", [2, 3, 5])
def test_who_runs_out_of_memory_tries_again_alone(
    open_device: Callable[..., Device], room: int, policy: Policy
) -> None:
    """Nobody fails, no output comes twice or is missing, and every frame is that of a video made alone."""
    engine = Narrow(room)
    device = open_device(engine, "round-robin")
    requests = [
        make_request(f"{seed} [narrow]", num_inference_steps=2 + seed, num_frames=9 + 4 * (seed % 3), seed=seed)
        for seed in range(6)
    ]
    listeners = [device.admit(request.seed, request) for request in requests]
    engine.go.set()
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.wait() == Ended(EndReason.DONE)
        alone = list(FakeEngine().generate(request))
        assert len(listener.outputs) == len(alone)
        for output, expected in zip(listener.outputs, alone, strict=True):
            if isinstance(expected, Frames):
                assert isinstance(output, Frames)
                assert np.array_equal(output.data, expected.data)
            else:
                assert output == expected
    assert engine.num_failed == engine.num_made_room > 0
    assert device.thread.num_parked == device.thread.num_resumed >= engine.num_failed
    assert not engine._taken


@pytest.mark.parametrize(("room", "num_outputs"), [(0, 0), (1, 4)])
def test_what_does_not_fit_alone_fails(open_device: Callable[..., Device], room: int, num_outputs: int) -> None:
    """After a second try, with what it wanted; those beside it, and those that come later, are made."""
    engine = Narrow(room)
    large = make_request("large", num_inference_steps=3, num_frames=9, seed=1)
    engine.go.set()
    device = open_device(engine, "round-robin")
    failed = device.admit(1, large)
    ended = failed.wait()
    assert (ended.reason, type(ended.error)) == (EndReason.FAILED, OutOfMemory)
    assert "2.00 GiB" in str(ended.error)
    assert len(failed.outputs) == num_outputs
    assert engine.num_failed == 2
    engine.room = 2
    assert device.admit(2, large).wait() == Ended(EndReason.DONE)
    assert device.losses == []


def test_a_generation_that_resumes_tries_again_from_its_checkpoint(open_device: Callable[..., Device]) -> None:
    """It is not begun anew."""
    engine = Narrow(0)
    request = make_request(num_inference_steps=5, seed=4)
    outputs = FakeEngine().generate(request)
    checkpoint = [next(outputs) for _ in range(3)][-1].checkpoint
    device = open_device(engine)
    engine.make_room = lambda: setattr(engine, "room", 9)
    engine.go.set()
    listener = Listener()
    device.thread.admit(Admit(1, request, listener.outputs.append, listener.on_end, resume=checkpoint()))
    assert listener.wait() == Ended(EndReason.DONE)
    assert listener.outputs[:2] == [Step(4, 5), Step(5, 5)]


def test_without_checkpoints_it_fails_at_once(open_device: Callable[..., Device]) -> None:
    """Its steps would come again."""

    class Plain(Narrow):
        def generate(self, *args: object, **options: object) -> Generator[Output, None, None]:
            for output in super().generate(*args, **options):
                if isinstance(output, Step) and output.index == 2:
                    self.room = 0
                yield Step(output.index, output.total) if isinstance(output, Step) else output

    engine = Plain(1)
    engine.go.set()
    device = open_device(engine)
    listener = device.admit(1, make_request(num_inference_steps=4))
    assert type(listener.wait().error) is OutOfMemory
    assert listener.outputs == [Step(1, 4), Step(2, 4)]


def test_a_device_that_fails_in_what_a_listener_asks_for_is_lost(open_device: Callable[..., Device]) -> None:
    """A step's checkpoint or preview is made on the device as well."""
    device = open_device(FakeEngine())
    listener = Listener()

    def on_output(_output: Output) -> None:
        raise LOST_DEVICES[0]

    device.thread.admit(Admit(1, make_request(), on_output, listener.on_end))
    assert listener.wait() == Ended(EndReason.LOST)
    assert device.has_exited.wait(PATIENCE_S)


def test_an_engine_that_says_that_it_is_lost_ends_the_thread(open_device: Callable[..., Device]) -> None:
    """Though no turn has met it: the next one would."""
    device = open_device(FakeEngine(on_output=lambda _request, _output: setattr(device.engine, "is_lost", True)))
    assert device.admit(1, make_request()).wait() == Ended(EndReason.LOST)
    assert device.has_exited.wait(PATIENCE_S)


def test_an_engine_that_does_not_close_ends_the_thread_all_the_same() -> None:
    """A device that failed fails there too."""

    class Stuck(FakeEngine):
        def close(self) -> None:
            raise LOST_DEVICES[0]

    device = Device(Stuck())
    device.thread.stop()
    assert device.has_exited.wait(PATIENCE_S)


class Holding(FakeEngine):
    """Each generation holds an array in the frames of its steps, and fails or goes on as it is told."""

    def __init__(self, fails_at: str) -> None:
        super().__init__()
        self._fails_at = fails_at
        self.arrays: list[weakref.ref[np.ndarray]] = []

    def generate(self, request: GenerationRequest, *args: object) -> Generator[Output, None, None]:
        latents = self._array()
        for index in range(1, 4):
            self._compute(latents, f"Step {index}")
            yield Step(index, 3, partial(self._checkpoint_of, latents), partial(self._preview_of, latents))
        self._compute(latents, "Frames 1")
        yield Frames(np.zeros((1, 16, 16, 3), np.uint8), 1, 1)

    def _array(self) -> np.ndarray:
        made = np.zeros((1000, 1000))
        self.arrays.append(weakref.ref(made))
        return made

    def _compute(self, latents: np.ndarray, name: str) -> None:
        _velocity = self._array()
        if name != self._fails_at:
            return
        try:
            raise ValueError("deep")
        except ValueError as exc:
            cycle = exc
            raise RuntimeError("boom") from cycle

    def _checkpoint_of(self, latents: np.ndarray) -> bytes:
        self._compute(latents, "checkpoint")
        return b""

    def _preview_of(self, latents: np.ndarray) -> np.ndarray:
        self._compute(latents, "preview")
        return np.zeros((16, 16, 3), np.uint8)

    @property
    def num_held(self) -> int:
        return sum(ref() is not None for ref in self.arrays)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is freed is freed by the last reference alone."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("fails_at", ["Step 1", "Step 3", "Frames 1", "nothing"])
def test_a_generation_that_ended_holds_no_memory(open_device: Callable[..., Device], fails_at: str) -> None:
    """A failed one neither, for as long as anybody knows its error, nor does the thread that waits for the next."""
    device = open_device(Holding(fails_at))
    reason = EndReason.DONE if fails_at == "nothing" else EndReason.FAILED
    listener = Listener()
    device.thread.admit(Admit(1, make_request(), lambda _output: None, listener.on_end))
    assert listener.wait().reason is reason
    until_true(lambda: not device.engine.num_held)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("fails_at", ["checkpoint", "preview"])
def test_what_a_step_could_not_give_holds_no_memory(open_device: Callable[..., Device], fails_at: str) -> None:
    """The video goes on without a checkpoint or a preview that could not be made."""
    device = open_device(Holding(fails_at))
    request = make_request().model_copy(update={"preview_every": 1})
    checkpoints = Checkpoints(make_task(), Storage("memory://held"), 0.0)
    listener = Listener()

    def on_output(output: Output) -> None:
        preview_of(request, output)
        if isinstance(output, Step):
            checkpoints.note(output)

    device.thread.admit(Admit(1, request, on_output, listener.on_end))
    assert listener.wait() == Ended(EndReason.DONE)
    assert len(device.engine.arrays) > 5
    until_true(lambda: not device.engine.num_held)


@pytest.mark.usefixtures("without_collector")
def test_a_load_that_fails_holds_no_memory() -> None:
    """Weights that were read are freed, though the error is kept until the process ends."""
    held: list[weakref.ref[np.ndarray]] = []

    class Broken(FakeEngine):
        def load(self, report: StageReport = report_nothing) -> None:
            weights = np.zeros(1000)
            held.append(weakref.ref(weights))
            raise OSError("no such file")

    device = Device(Broken())
    device.thread.join()
    assert [ref() for ref in held] == [None]
    assert [str(error) for error in device.load_errors] == ["no such file"]


def test_a_library_that_exits_in_the_load_is_an_error_like_any_other() -> None:
    """Whoever waits for the load hears of it."""

    class Exiting(FakeEngine):
        def load(self, report: StageReport = report_nothing) -> None:
            raise SystemExit("this library wants another Python")

    device = Device(Exiting())
    device.thread.join()
    assert [str(error) for error in device.load_errors] == ["this library wants another Python"]


def until_true(is_so: Callable[[], bool]) -> None:
    """Wait for what the device thread does after it has told of an end."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_listener_that_raises_fails_its_own_generation(open_device: Callable[[FakeEngine], Device]) -> None:
    """Our own mistakes do not take the device down either."""
    device = open_device(FakeEngine())
    broken = Listener()

    def on_output(_output: Output) -> None:
        raise KeyError("mistake")

    device.thread.admit(Admit(1, make_request(), on_output, broken.on_end))
    assert broken.wait().reason is EndReason.FAILED
    assert device.admit(2, make_request()).wait() == Ended(EndReason.DONE)


def test_stop_loses_what_runs_and_what_waits() -> None:
    """Each generation hears of its end exactly once, also one that comes after the thread's end."""
    in_step, go_on = threading.Event(), threading.Event()

    def on_output(_request: GenerationRequest, _output: Output) -> None:
        in_step.set()
        go_on.wait(PATIENCE_S)

    device = Device(FakeEngine(on_output=on_output))
    running = device.admit(1, make_request())
    assert in_step.wait(PATIENCE_S)
    waiting = device.admit(2, make_request())
    device.thread.stop()
    late = device.admit(3, make_request())
    go_on.set()
    device.thread.join()
    after = device.admit(4, make_request())
    for listener in (running, waiting, late, after):
        assert listener.ends == [Ended(EndReason.LOST)]
    assert device.engine.num_running == 0
    assert not device.engine.is_loaded
    assert device.has_exited.is_set()


def test_an_engine_that_does_not_load_ends_the_thread() -> None:
    """With its reason."""

    class Broken(FakeEngine):
        def load(self, report: StageReport = report_nothing) -> None:
            raise OSError("no such file")

    device = Device(Broken())
    device.thread.join()
    assert [str(error) for error in device.load_errors] == ["no such file"]
    assert device.admit(1, make_request()).ends == [Ended(EndReason.LOST)]


def test_what_goes_on_elsewhere_is_asked_for_its_step(open_device: Callable[[FakeEngine], Device]) -> None:
    """While it can still give its checkpoint, and stands at a step; one that is cancelled is not asked."""
    left: list[tuple[str, Step, int]] = []
    gates: dict[str, tuple[threading.Event, threading.Event]] = {}

    def hold(request: GenerationRequest, output: Output) -> None:
        in_step, go_on = gates[request.prompt]
        if f"{type(output).__name__} {output.index}" in request.prompt:
            in_step.set()
            assert go_on.wait(PATIENCE_S)

    device = open_device(FakeEngine(on_output=hold))
    for key, (prompt, goes_on) in enumerate([("at Step 2", True), ("at Frames 1", True), ("no at Step 2", False)]):
        in_step, go_on = gates[prompt] = threading.Event(), threading.Event()
        listener = Listener()

        def on_leave(step: Step, prompt: str = prompt) -> None:
            left.append((prompt, step, device.engine.num_running))

        request = make_request(prompt)
        device.thread.admit(Admit(key, request, listener.outputs.append, listener.on_end, on_leave=on_leave))
        assert in_step.wait(PATIENCE_S)
        device.thread.cancel(key, goes_on=goes_on)
        go_on.set()
        assert listener.wait() == Ended(EndReason.CANCELLED)
    assert left == [("at Step 2", Step(2, 3), 1)]
