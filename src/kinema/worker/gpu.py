"""The one thread that owns the device.

It loads the engine, advances generators one step at a time, and closes the engine at the end. Other threads send it
messages through a queue. It answers by plain functions, which it calls on its own thread. It knows nothing of asyncio,
of files, or of jobs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import structlog

from kinema.engines.base import Engine, Frames, Note, Output, StageReport, Step, report_nothing
from kinema.engines.failures import meaning_of, note_traceback, release_frames
from kinema.errors import OutOfMemory, WorkerLost
from kinema.worker.active import Active, Admit, Ended, EndReason
from kinema.worker.costs import CostModel, Done
from kinema.worker.scheduler import Policy, StepScheduler

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ends the generation of that key; ``goes_on`` says whether it continues elsewhere. Unknown keys are ignored."""

    key: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends every generation as lost, to continue elsewhere, and then the thread."""


Message = Admit | Cancel | Stop


class DeviceThread:
    """Runs one engine.

    ``on_stage`` gets the stages of the engine's load. ``on_loaded`` gets None, or the exception of ``engine.load``.
    ``on_lost`` is called when the engine or its device is lost, before any generation hears of it: all of them end as
    lost then, and so does the thread. ``on_exit`` is called last. ``costs`` learns from every turn. It may be replaced
    until the first generation is admitted, and belongs to the thread from then on until the thread has ended. When more
    than ``max_in_memory`` generations have begun, those with the most work left are parked as checkpoints until their
    next turn.

    A generation that runs out of memory is taken back to its output before. The others are parked, the engine gives up
    what only saves time, and it tries once more alone. From then on one generation less is in memory at a time, until
    none is left. It fails only if it does not fit alone.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_loaded: Callable[[BaseException | None], None],
        on_exit: Callable[[], None],
        on_lost: Callable[[], None] = lambda: None,
        on_stage: StageReport = report_nothing,
        policy: Policy = "shortest",
        costs: CostModel | None = None,
        max_in_memory: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._on_loaded = on_loaded
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._on_stage = on_stage
        self._scheduler = StepScheduler(policy)
        self.costs = costs or CostModel()
        self._max_in_memory = max_in_memory
        # The most that fit, as far as it was found out.
        self._num_fit: int | None = None
        # The generation that ran out of memory and tries again now.
        self._again: Active | None = None
        self._clock = clock
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._active: dict[int, Active] = {}
        self._turn = 0
        self._step_began: float | None = None
        self._is_stopping = False
        # Guards the time between the thread's last look into the queue and its end; see ``admit``.
        self._lock = threading.Lock()
        self._is_over = False
        self._num_parked = self._num_resumed = 0
        # A daemon, so that the process can end while weights are read or a step hangs.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    @property
    def step_s(self) -> float:
        """Seconds that the present step has taken; 0 when no step runs. May be called on any thread."""
        began = self._step_began
        return 0.0 if began is None else self._clock() - began

    @property
    def num_parked(self) -> int:
        """How often a generation left the device's memory as a checkpoint. May be asked on any thread."""
        return self._num_parked

    @property
    def num_resumed(self) -> int:
        """How often one came back. May be asked on any thread."""
        return self._num_resumed

    @property
    def is_alive(self) -> bool:
        """It was started and has not ended. May be asked on any thread."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; it loads the engine first."""
        self._thread.start()

    def admit(self, message: Admit) -> None:
        """Queue a generation for the device. After the thread's end it is lost at once, on the caller's thread."""
        with self._lock:
            if not self._is_over:
                self._messages.put(message)
                return
        message.on_end(Ended(EndReason.LOST))

    def cancel(self, key: int, *, goes_on: bool = False) -> None:
        """End a generation before its next step. If it ``goes_on`` elsewhere, its checkpoint is made first."""
        self._messages.put(Cancel(key, goes_on))

    def stop(self) -> None:
        """End after the present step."""
        self._messages.put(Stop())

    def join(self, timeout_s: float | None = None) -> None:
        """Block until the thread has ended, or the time is up."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            if self._load():
                self._serve()
        finally:
            self._end_all()
            self._on_exit()

    def _load(self) -> bool:
        try:
            self._engine.load(self._on_stage)
        except BaseException as exc:  # a library may also exit; somebody waits for this load in any case
            note_traceback(exc)
            release_frames(exc)
            self._on_loaded(exc)
            return False
        self._on_loaded(None)
        return True

    def _serve(self) -> None:
        try:
            while not self._is_stopping:
                self._receive()
                if not self._is_stopping:
                    self._take_turn()
                if self._engine.is_lost:
                    self._lose()
        finally:
            # Generators free their memory before the engine is closed.
            self._end_all()
            self._close()

    def _take_turn(self) -> None:
        """Choose, step, report. In a frame of its own, so that a thread that sleeps holds no generation that ended."""
        chosen = self._choose()
        if chosen is not None:
            self._make_room(chosen)
            result = self._step(chosen)
            if result is not None:
                self._report(chosen, result)

    def _close(self) -> None:
        try:
            self._engine.close()
        except Exception as exc:  # a device that failed fails here too
            log.error("the engine did not close", exc_info=exc)
            release_frames(exc)

    def _lose(self) -> None:
        """Stop, since nothing can be made any more."""
        if not self._is_stopping:
            self._is_stopping = True
            self._on_lost()

    def _receive(self) -> None:
        """Take all messages in the queue. When there is nothing to do, sleep until one comes."""
        if not self._active:
            self._num_fit = None
            self._handle(self._messages.get())
        while not self._messages.empty():
            self._handle(self._messages.get())

    def _choose(self) -> Active | None:
        if self._again is not None:
            return self._again
        candidates = [active.candidate(self.costs) for active in self._active.values()]
        # Deadlines come from other machines, so they use the clock that all machines share.
        key = self._scheduler.choose(candidates, time.time())
        return None if key is None else self._active[key]

    def _make_room(self, chosen: Active) -> None:
        """Park others so that the chosen generation fits beside those that stay; all of them when it tries again."""
        others = [active for active in self._active.values() if active is not chosen and active.holds_memory]
        if self._again is not None:
            for active in others:
                self._park(active)
            self._engine.make_room()
            return
        limits = [limit for limit in (self._max_in_memory, self._num_fit) if limit is not None]
        if limits:
            others = [active for active in others if isinstance(active.last_output, Step)]
            others.sort(key=lambda active: self.costs.remaining_s(active.admit.request, active.done))
            for active in others[min(limits) - 1 :]:
                self._park(active)

    def _park(self, active: Active) -> None:
        try:
            self._num_parked += active.go_back()
        except Exception as exc:  # it stays in memory, which may still be enough
            log.warning("a generation could not be parked", exc_info=exc)
            release_frames(exc)

    def _step(self, chosen: Active) -> Output | Ended | None:
        """Advance one generation; None when it tries again. Its exception ends only this generation, unless the engine
        itself is lost."""
        self._turn += 1
        chosen.last_turn = self._turn
        chosen.last_output = None
        self._step_began = began = self._clock()
        self._num_resumed += chosen.outputs is None
        try:
            output = chosen.advance(self._generate)
            self._learn(chosen, output, self._clock() - began)
        except StopIteration:
            return Ended(EndReason.DONE)
        except Exception as exc:
            return None if self._takes_back(chosen, exc) else self._failed(exc)
        else:
            self._again = None
            return output
        finally:
            self._step_began = None
            spent_s = self._clock() - began
            chosen.device_s += spent_s
            self._scheduler.charge(chosen.admit.key, spent_s)

    def _takes_back(self, chosen: Active, error: Exception) -> bool:
        """Take a generation that ran out of memory back to the output before, so that it tries again alone. False when
        it is alone already, or gives no checkpoint."""
        if chosen is self._again or not isinstance(meaning_of(error), OutOfMemory):
            return False
        num_begun = sum(active.outputs is not None for active in self._active.values())
        try:
            has_gone_back = chosen.go_back()
        except Exception as exc:
            release_frames(exc)
            return False
        if has_gone_back:
            log.warning("a generation ran out of memory; it tries again alone", num_in_memory=num_begun)
            release_frames(error)
            self._again = chosen
            self._num_parked += 1
            self._num_fit = max(1, min(num_begun, self._num_fit or num_begun) - 1)
        return has_gone_back

    def _failed(self, error: Exception) -> Ended:
        """The end of the generation that met this error. If the device is lost, it is for all others too: they continue
        elsewhere from their present steps, or from what was stored of them."""
        meaning = meaning_of(error)
        if isinstance(meaning, WorkerLost):
            log.critical("the device is lost", exc_info=error)
            self._lose()
        else:
            note_traceback(meaning)
        release_frames(meaning)  # its cause is the error
        return Ended(EndReason.LOST) if isinstance(meaning, WorkerLost) else Ended(EndReason.FAILED, meaning)

    def _learn(self, chosen: Active, output: Output, seconds: float) -> None:
        if isinstance(output, Note):  # its time is part of the next turn, or zero
            return
        if isinstance(output, Frames):
            done = Done(is_begun=True, steps=chosen.admit.request.num_denoising_steps, chunks=output.index)
        else:
            done = Done(is_begun=True, steps=output.index)
        is_cached = isinstance(output, Step) and output.is_cached
        self.costs.observe(chosen.admit.request, chosen.done, done, seconds, is_cached=is_cached)
        chosen.done = done

    def _report(self, chosen: Active, result: Output | Ended) -> None:
        if isinstance(result, Ended):
            self._end(chosen.admit.key, result)
            return
        try:
            chosen.admit.on_output(result)
        except Exception as exc:
            self._end(chosen.admit.key, self._failed(exc))

    def _handle(self, message: Message) -> None:
        match message:
            case Admit():
                self._begin(message)
            case Cancel(key, goes_on):
                self._end(key, Ended(EndReason.CANCELLED), goes_on=goes_on)
            case Stop():
                self._is_stopping = True

    def _begin(self, message: Admit) -> None:
        try:
            outputs = self._generate(message, message.resume)
        except Exception as exc:
            _call_on_end(message, self._failed(exc))
            return
        self._active[message.key] = Active(message, outputs)

    def _generate(self, message: Admit, resume: bytes | None) -> Generator[Output, None, None]:
        return self._engine.generate(message.request, message.inputs, resume)

    def _end(self, key: int, ended: Ended, *, goes_on: bool = False) -> None:
        active = self._active.pop(key, None)
        if active is None:
            return
        if active is self._again:
            self._again = None
        try:
            if goes_on and isinstance(active.last_output, Step) and active.admit.on_leave is not None:
                active.admit.on_leave(active.last_output)
            if active.outputs is not None:
                active.outputs.close()
        except Exception as exc:
            log.error("a generation did not close", exc_info=exc)
            release_frames(exc)
        self._scheduler.end(key, active.admit.tenant)
        _call_on_end(active.admit, replace(ended, device_s=active.device_s))

    def _end_all(self) -> None:
        for key in list(self._active):
            self._end(key, Ended(EndReason.LOST), goes_on=True)
        with self._lock:
            self._is_over = True
        while not self._messages.empty():
            message = self._messages.get()
            if isinstance(message, Admit):
                _call_on_end(message, Ended(EndReason.LOST))


def _call_on_end(message: Admit, ended: Ended) -> None:
    try:
        message.on_end(ended)
    except Exception as exc:  # a mistake of one listener must not end the generations of others
        log.error("the end of a generation was not reported", exc_info=exc)
