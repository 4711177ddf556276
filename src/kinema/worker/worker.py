"""A worker: one engine, tasks in, events out.

It joins the device thread, the deliveries and the asyncio side. Each task has a driver of its own that ends in exactly
one terminal event, whether anybody listens or not. It never sees the job store: whoever called ``run`` records events.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar, TypeVarTuple, Unpack

import structlog

from kinema.capabilities import Capabilities
from kinema.engines.base import Engine, Output, UInt8Array
from kinema.errors import (
    ConfigError,
    Drained,
    EngineFailed,
    GenerationError,
    KinemaError,
    NoWorker,
    RequestError,
    StorageUnavailable,
    WorkerLost,
)
from kinema.events import Cancelled, Completed, Event, Failed, Started, Terminal, is_terminal
from kinema.job import JobId, Task
from kinema.request import GenerationOptions, GenerationRequest, resolve
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.delivery import Delivery
from kinema.worker.generation import Generation
from kinema.worker.gpu import Admit, DeviceThread, Ended, EndReason
from kinema.worker.inputs import read_inputs
from kinema.worker.patience import Patience
from kinema.worker.scratch import remove_abandoned

log = structlog.get_logger(__name__)

# Small enough for every Wan model to make in a moment, large enough to run all of its parts once.
PROBE = GenerationOptions(prompt="test", num_frames=8, size="256x256", num_inference_steps=1, seed=0)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Worker:
    """Runs tasks on one engine, ``max_active`` at a time. All methods belong to one event loop."""

    def __init__(
        self, engine: Engine, storage: Storage, settings: WorkerSettings, worker_id: str | None = None
    ) -> None:
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}"
        self._engine = engine
        self._storage = storage
        self._max_active = settings.max_active
        self._max_step_s = settings.max_step_s
        self._storage_patience_s = settings.storage_patience_s
        self._generations: dict[int, Generation] = {}
        self._keys = itertools.count(1)
        self._device: DeviceThread | None = None
        self._is_loaded = self._is_ready = self._is_stopping = self._is_lost = False
        self._changed = asyncio.Event()

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    @property
    def max_active(self) -> int:
        return self._max_active

    @property
    def device(self) -> str:
        return self._engine.device

    @property
    def is_ready(self) -> bool:
        """The engine is loaded, and no end was asked for."""
        return self._is_ready

    @property
    def is_lost(self) -> bool:
        """The device thread ended although nobody had asked for it, or its step takes longer than ``max_step_s``."""
        return self._is_lost or (self._device is not None and self._device.step_s > self._max_step_s)

    @property
    def tasks(self) -> Sequence[Task]:
        """What runs here."""
        return [generation.task for generation in self._generations.values()]

    @property
    def predicted_work(self) -> float:
        """What is left to compute of what runs here, in the units of ``GenerationRequest.work``."""
        return sum(generation.remaining_work for generation in self._generations.values())

    @property
    def free_slots(self) -> int:
        """How many more tasks ``run`` would admit now."""
        return self._max_active - len(self._generations) if self._is_ready else 0

    async def wait_for_change(self) -> None:
        """Return when a slot is taken or becomes free or the readiness changes, counted from this call."""
        await self._changed.wait()

    async def start(self) -> None:
        """Load the engine on the device thread. Raises ConfigError when that fails."""
        if num_abandoned := await asyncio.to_thread(remove_abandoned):
            log.info("temporary folders of killed processes were removed", count=num_abandoned)
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Exception | None] = loop.create_future()
        self._device = DeviceThread(
            self._engine,
            on_loaded=lambda error: _post(loop, _resolve, loaded, error),
            on_exit=lambda: _post(loop, self._on_device_exit),
        )
        log.info("loading", model=self.capabilities.model)
        self._device.start()
        error = await loaded
        if error is not None:
            raise _as_config_error(error, self._engine.capabilities.model) from error
        self._is_loaded = True
        self._set_ready(True)

    async def probe(self) -> None:
        """Make the probe video on the device and throw it away. Raises ConfigError when that fails."""
        try:
            request = resolve(PROBE, self.capabilities).request
        except RequestError:  # a model that does not make this size makes its own
            request = resolve(PROBE.model_copy(update={"size": None}), self.capabilities).request
        log.info("making a probe video", model=request.model, size=str(request.size), num_frames=request.num_frames)
        started = time.perf_counter()
        ended = await self._on_device(next(self._keys), request, None, None, lambda _output: None)
        if ended.reason is not EndReason.DONE:
            error = ended.error or WorkerLost()
            raise _as_config_error(error, request.model) from error
        log.info("ready", model=request.model, probe_s=round(time.perf_counter() - started, 3))

    def retire(self) -> None:
        """Admit nothing more; what runs goes on."""
        self._set_ready(False)

    def give_back(self, reason: Drained | WorkerLost) -> None:
        """End what runs: each stream raises the reason at once, whatever the device is at."""
        for generation in list(self._generations.values()):
            generation.is_given_back = True
            generation.outcomes.put_nowait(reason)
            self._cancel(generation)

    async def stop(self) -> None:
        """Admit nothing more, end what runs (its stream raises WorkerLost) and free the engine.

        A generation whose frames are all there is still delivered.
        """
        self.retire()
        if self._device is None:
            return
        self._is_stopping = True
        self._device.stop()
        drivers = [item.driver for item in self._generations.values() if item.driver is not None]
        await asyncio.gather(*drivers, return_exceptions=True)
        if self._is_loaded:  # a load that still runs is left to the process's end
            await asyncio.to_thread(self._device.join)

    def run(self, task: Task) -> AsyncIterator[Event]:
        """Admit the task and return its events; the first is Started, the last one, and only the last, is terminal.

        The slot is taken by the call itself. Closing the iterator, or being cancelled in it, cancels the generation.
        Raises at once: NoWorker when all slots are taken, WorkerLost when the worker is not ready. The iterator raises
        WorkerLost when the worker stops before the end, and what ``give_back`` was told.
        """
        if not self._is_ready:
            raise WorkerLost(f"worker {self.worker_id} is not ready")
        if self.free_slots < 1:
            raise NoWorker(f"worker {self.worker_id} runs {self._max_active} generations and takes no more")
        patience = Patience(self._storage_patience_s)
        generation = Generation(next(self._keys), task, Delivery(task, self._storage, patience), patience)
        generation.outcomes.put_nowait(Started(worker_id=self.worker_id, attempt=task.attempt))
        self._generations[generation.key] = generation
        generation.driver = asyncio.create_task(self._drive(generation), name=f"generation {task.job_id}")
        self._notify()
        return self._events(generation)

    async def cancel(self, job_id: JobId) -> None:
        """Ask for the job's generation to end; its events then end with Cancelled. Unknown jobs are ignored."""
        for generation in list(self._generations.values()):
            if generation.task.job_id == job_id:
                self._cancel(generation)

    async def _events(self, generation: Generation) -> AsyncIterator[Event]:
        try:
            while True:
                outcome = await generation.outcomes.get()
                if isinstance(outcome, GenerationError):
                    raise outcome
                yield outcome
                if is_terminal(outcome):
                    return
        finally:
            if generation.key in self._generations:  # nobody listens any more
                self._cancel(generation)
            if generation.driver is not None and not generation.is_given_back:
                await asyncio.shield(generation.driver)

    def _cancel(self, generation: Generation) -> None:
        generation.is_cancelled = True
        generation.patience.end()
        if self._device is not None:
            self._device.cancel(generation.key)

    async def _drive(self, generation: Generation) -> None:
        """Take a task to its end. The slot is free before anybody hears of the end."""
        outcome: Event | WorkerLost = WorkerLost()
        try:
            outcome = await self._make(generation)
        except WorkerLost as exc:
            outcome = exc
        except StorageUnavailable as exc:  # one that nobody wants any more does not wait for storage
            outcome = Cancelled() if generation.is_cancelled else _failed(exc, generation.task)
        except asyncio.CancelledError:  # the event loop ends; nobody will run the rest
            self._cancel(generation)
            generation.delivery.abort()
            raise
        except Exception as exc:
            outcome = _failed(exc, generation.task)
        finally:
            del self._generations[generation.key]
            self._notify()
            generation.outcomes.put_nowait(outcome)

    async def _make(self, generation: Generation) -> Terminal:
        """Inputs, device, delivery. Raises what went wrong."""
        request = generation.task.request
        inputs = await asyncio.to_thread(read_inputs, request, self._storage, generation.patience)
        if generation.is_cancelled:
            return Cancelled()
        if inputs.older is not None:
            generation.delivery.continue_from(inputs.older)
        generation.marks.on_device = time.perf_counter()
        loop = asyncio.get_running_loop()

        def on_output(output: Output) -> None:
            _post(loop, generation.outcomes.put_nowait, generation.note(output))

        ended = await self._on_device(generation.key, request, inputs.image, inputs.video, on_output)
        if ended.reason is EndReason.DONE and not generation.is_cancelled:
            return await self._deliver(generation)
        await asyncio.to_thread(generation.delivery.abort)
        if ended.error is not None:
            raise ended.error
        if generation.is_cancelled:
            return Cancelled()
        raise WorkerLost

    async def _on_device(
        self,
        key: int,
        request: GenerationRequest,
        image: UInt8Array | None,
        video: UInt8Array | None,
        on_output: Callable[[Output], None],
    ) -> Ended:
        """Run a generation on the device to its end. ``on_output`` is called on the device thread."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Ended] = loop.create_future()
        assert self._device is not None, "run() admits only when the device is there"
        self._device.admit(
            Admit(
                key=key,
                request=request,
                image=image,
                video=video,
                on_output=on_output,
                on_end=lambda how: _post(loop, _resolve, ended, how),
            )
        )
        return await ended

    async def _deliver(self, generation: Generation) -> Terminal:
        """Store the film. A cancel that comes now deletes it again; if that fails, the film is there and is said so."""
        made = await asyncio.to_thread(generation.delivery.finish)
        if generation.is_cancelled:
            try:
                await asyncio.to_thread(generation.delivery.abort)
            except StorageUnavailable as exc:
                log.warning("a cancel came too late", job_id=generation.task.job_id, reason=exc.message)
            else:
                return Cancelled()
        return Completed(
            artifact=made.film, thumbnail=made.thumbnail, spritesheet=made.spritesheet, timings=generation.timings
        )

    def _on_device_exit(self) -> None:
        self._is_lost = self._is_loaded and not self._is_stopping
        self._set_ready(False)

    def _set_ready(self, is_ready: bool) -> None:
        self._is_ready = is_ready
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _failed(error: Exception, task: Task) -> Failed:
    """One sentence for the client; the traceback goes to the log alone."""
    if isinstance(error, KinemaError):
        log.warning("a generation failed", job_id=task.job_id, attempt=task.attempt, reason=error.message)
        return Failed(code=error.code, message=error.message)
    log.error("a generation failed unexpectedly", job_id=task.job_id, attempt=task.attempt, exc_info=error)
    return Failed(code=EngineFailed.code, message=f"{EngineFailed().message[:-1]} ({type(error).__name__}).")


def _as_config_error(error: Exception, model: str) -> KinemaError:
    if isinstance(error, KinemaError):
        return error
    log.error("the engine did not start", model=model, exc_info=error)
    return ConfigError(f"engine.model = {model!r} cannot be used ({type(error).__name__}: {error})")


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> None:
    """Call on the loop's thread; a loop that has closed has nobody left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
