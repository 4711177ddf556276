"""A worker: one engine, tasks in, events out.

It joins the device thread, the deliveries and the asyncio side. Each task has a driver of its own that ends in exactly
one terminal event, whether anybody listens or not. It never sees the job store: the caller of ``run`` records events.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

import numpy as np
import structlog

from kinema.engines.base import Engine, Inputs, Output
from kinema.engines.failures import meaning_of, release_frames
from kinema.errors import (
    ConfigError,
    DecoderUnavailable,
    Drained,
    EngineFailed,
    GenerationError,
    InvalidRequest,
    KinemaError,
    NoWorker,
    RequestError,
    StorageUnavailable,
    WorkerLost,
)
from kinema.events import Cancelled, Completed, Event, Failed, Started, Terminal, is_terminal
from kinema.ids import JobId
from kinema.job import Task
from kinema.manifest import Manifest
from kinema.media.decoders import Decoders
from kinema.media.writers import encoder_facts
from kinema.request.capabilities import Capabilities
from kinema.request.memory import Memory
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve_alone
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.checkpoints import Checkpoints
from kinema.worker.costs import CostModel
from kinema.worker.costs_file import costs_path, read_costs, write_costs
from kinema.worker.delivery import Delivery
from kinema.worker.film_decoders import FilmDecoders
from kinema.worker.generation import Generation
from kinema.worker.gpu import DeviceThread
from kinema.worker.input_files import TaskInputs, read_inputs
from kinema.worker.live import LiveFilm
from kinema.worker.previews import preview_of
from kinema.worker.scratch import remove_abandoned
from kinema.worker.startup import Loading, Startup
from kinema.worker.storage_retries import StorageRetries

log = structlog.get_logger(__name__)

# Small enough for a quick video with every Wan model, large enough to run all parts of the model once.
PROBE = GenerationOptions(prompt="test", num_frames=8, size="256x256", num_inference_steps=1, seed=0)
# A CPU takes seconds for that, and is timed as well by a quarter of the pixels.
_CPU_PROBE_SIZE = "128x128"
# A second video with these steps times a warm step, without the work before the first step.
_TIMED_STEPS = 3

# Seconds between two checks of an engine, which may be lost without a report.
_LOOK_S = 1.0

# Seconds that giving back may take: for the running step, and for storing its checkpoint.
GIVE_BACK_S = 2.0
# Seconds that a stop waits for a device that is lost: its driver may not answer any more.
_LOST_S = 10.0
# What a cancel makes of waiting for storage, and of decoding.
_OF_ENDED_WORK = (StorageUnavailable, InvalidRequest, DecoderUnavailable)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Worker:
    """Runs tasks on one engine, ``max_active`` at a time, or one at a time if the engine cannot interleave videos.

    All methods belong to one event loop. The measured costs of the device are kept in ``data_dir``, if given, for the
    next worker. ``decoders`` decode films; without them this process does.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        settings: WorkerSettings,
        worker_id: str | None = None,
        data_dir: Path | None = None,
        decoders: Decoders | None = None,
    ) -> None:
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}"
        self._engine = engine
        self._storage = storage
        self._decoders = decoders
        self._max_active = settings.max_active if engine.capabilities.is_interleaved else 1
        # One for each generation: a film may keep it for minutes, and others need the threads of the event loop.
        self._threads = ThreadPoolExecutor(self._max_active, "generation")
        self._max_step_s = settings.max_step_s
        self._policy = settings.policy
        self._max_in_memory = settings.max_in_memory
        can = engine.capabilities
        self._costs = CostModel(can.geometry, encodes_whole_film=can.encodes_whole_film)
        self._data_dir = data_dir
        # None until the file was read, so that nothing else is written there.
        self._costs_path: Path | None = None
        self._storage_patience_s = settings.storage_patience_s
        self._checkpoint_s = settings.checkpoint_s
        self._generations: dict[int, Generation] = {}
        self._tidying: set[asyncio.Task[None]] = set()
        self._keys = itertools.count(1)
        self._device: DeviceThread | None = None
        self._startup = Startup(engine.capabilities.model)
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
    def memory(self) -> Memory | None:
        """What lies on the device; None where nobody knows."""
        return self._engine.memory

    @property
    def loras_in_memory(self) -> Sequence[str]:
        """The digests of the LoRAs that need not be read again."""
        return self._engine.loras_in_memory

    @property
    def costs(self) -> Mapping[str, Any]:
        """What turns take here, for ``CostModel.from_json``."""
        return self._costs.told()

    @property
    def num_parked(self) -> int:
        """How often a video left the device's memory for others."""
        return 0 if self._device is None else self._device.num_parked

    @property
    def num_resumed(self) -> int:
        """How often one came back."""
        return 0 if self._device is None else self._device.num_resumed

    @property
    def is_ready(self) -> bool:
        """Whether the worker has started and no end was requested."""
        return self._is_ready

    @property
    def loading(self) -> Loading | None:
        """How far its start is; None when none is under way."""
        return self._startup.loading

    @property
    def still_loads(self) -> bool:
        """The device thread loads the engine, which nobody can interrupt, though ``start`` may have been cancelled."""
        return not self._is_loaded and self._device is not None and self._device.is_alive

    @property
    def is_lost(self) -> bool:
        """Whether the device is lost, or a step takes longer than ``max_step_s``."""
        return self.has_lost_device or (self._device is not None and self._device.step_s > self._max_step_s)

    @property
    def has_lost_device(self) -> bool:
        """Whether the device thread ended without a request, or the engine lost its device."""
        return self._is_lost or self._engine.is_lost

    async def wait_for_loss(self) -> None:
        """Return when the device is lost."""
        while not self.has_lost_device:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self.wait_for_change()

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks that run here."""
        return [generation.task for generation in self._generations.values()]

    @property
    def predicted_work(self) -> float:
        """The work that is left for the running tasks, in the units of ``GenerationRequest.work``."""
        return sum(generation.remaining_work for generation in self._generations.values())

    @property
    def has_suspect(self) -> bool:
        """Whether a task runs here whose worker was lost before."""
        return any(task.losses for task in self.tasks)

    @property
    def free_slots(self) -> int:
        """The number of further tasks that ``run`` would admit now."""
        return self._max_active - len(self._generations) if self._is_ready else 0

    async def wait_for_change(self) -> None:
        """Return when, after this call, a slot is taken or becomes free, or the readiness changes."""
        await self._changed.wait()

    async def start(self, *, with_probe: bool = False) -> None:
        """Load the engine on the device thread, make the probe video if asked to, and take tasks from then on.

        Raises ConfigError when one of them fails, and WorkerLost when the engine is lost meanwhile.
        """
        self._startup.report("starting the device thread")
        try:
            await self._load()
            if with_probe:
                await self.probe()
        finally:
            self._startup.end()
        log.info("ready", model=self.capabilities.model, device=self.device, seconds=self._startup.seconds)
        self._set_ready(True)

    async def _load(self) -> None:
        if num_abandoned := await asyncio.to_thread(remove_abandoned):
            log.info("temporary folders of killed processes were removed", count=num_abandoned)
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[BaseException | None] = loop.create_future()
        self._device = DeviceThread(
            self._engine,
            policy=self._policy,
            max_in_memory=self._max_in_memory,
            costs=self._costs,
            on_stage=self._startup.report,
            on_loaded=lambda error: _post(loop, _resolve, loaded, error),
            on_exit=lambda: _post(loop, self._on_device_exit),
            on_lost=lambda: _post(loop, self._on_loss),
        )
        self._device.start()
        error = await loaded
        if error is not None:
            raise _as_config_error(error, self._engine.capabilities.model) from error
        self._is_loaded = True
        if self._data_dir is not None:  # the engine knows its device now
            path = costs_path(self._data_dir, self.capabilities.model, self.device)
            can = self.capabilities
            read = partial(read_costs, path, can.geometry, encodes_whole_film=can.encodes_whole_film)
            self._device.costs = self._costs = await asyncio.to_thread(read)
            self._costs_path = path

    async def probe(self) -> None:
        """Make the probe video and discard it; then once more with a few steps, whose times the first predictions use.

        Raises ConfigError when that fails.
        """
        request, inputs = _probe_of(self.capabilities, self._engine.device)
        self._startup.report("making a trial video")
        for probe in (request, request.model_copy(update={"num_inference_steps": _TIMED_STEPS})):
            admit = partial(Admit, next(self._keys), probe, lambda _output: None, inputs=inputs)
            ended = await self._on_device(admit)
            if ended.reason is not EndReason.DONE:
                error = ended.error or WorkerLost()
                raise _as_config_error(error, request.model) from error

    def retire(self) -> None:
        """Admit nothing more; running tasks continue."""
        self._set_ready(False)

    def give_back(self, reason: Drained | WorkerLost) -> None:
        """End the running tasks. Each stream raises the reason: WorkerLost at once, Drained after the checkpoint.

        This takes at most ``GIVE_BACK_S`` seconds, whatever the device and storage do.
        """
        loop = asyncio.get_running_loop()
        wait_s = GIVE_BACK_S if isinstance(reason, Drained) else 0
        for generation in list(self._generations.values()):
            generation.given_back = reason
            self._leave(generation)
            loop.call_later(wait_s, generation.outcomes.put_nowait, reason)

    async def stop(self) -> None:
        """Admit nothing more, end the running tasks (their streams raise WorkerLost) and free the engine.

        A generation with all its frames is still delivered. For a generation at a step, the checkpoint is kept.
        """
        self.retire()
        if self._device is None:
            return
        self._is_stopping = True
        self._device.stop()
        for generation in self._generations.values():
            generation.stop_reading()
        drivers = [item.driver for item in self._generations.values() if item.driver is not None]
        wait_s = _LOST_S if self.has_lost_device else None
        if drivers:
            await asyncio.wait(drivers, timeout=wait_s)
        await asyncio.gather(*self._tidying, return_exceptions=True)
        if self._is_loaded:  # a load that still runs ends with the process
            await asyncio.to_thread(self._device.join, wait_s)
            if self._costs_path is not None:
                await asyncio.to_thread(write_costs, self._costs_path, self._costs)

    def run(self, task: Task) -> AsyncIterator[Event]:
        """Admit the task and return its events: the first is Started, and only the last is terminal.

        The call itself takes the slot. Closing the iterator, or being cancelled in it, ends the generation. Its job may
        continue elsewhere: the checkpoint is kept, unless ``cancel`` was called.
        Raises at once: NoWorker when all slots are taken, WorkerLost when the worker is not ready. The iterator raises
        WorkerLost when the worker stops before the end, and the reason of ``give_back``.
        """
        if not self._is_ready:
            raise WorkerLost(f"worker {self.worker_id} is not ready")
        if self.free_slots < 1:
            raise NoWorker(f"worker {self.worker_id} runs {self._max_active} generations and takes no more")
        retries = StorageRetries(self._storage_patience_s)
        live = LiveFilm()
        delivery = Delivery(task, self._storage, retries, live=live, has_sound=self.capabilities.has_sound)
        checkpoints = Checkpoints(task, self._storage, self._checkpoint_s)
        decoders = FilmDecoders(self._decoders)
        generation = Generation(next(self._keys), task, delivery, live, retries, decoders, checkpoints)
        generation.outcomes.put_nowait(Started(worker_id=self.worker_id, attempt=task.attempt))
        self._generations[generation.key] = generation
        generation.driver = asyncio.create_task(self._drive(generation), name=f"generation {task.job_id}")
        self._notify()
        return self._events(generation)

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        """Request the end of this attempt of the job; its events then end with Cancelled. Unknown ones are ignored."""
        for generation in list(self._generations.values()):
            if (generation.task.job_id, generation.task.attempt) == (job_id, attempt):
                self._cancel(generation)

    def live(self, job_id: JobId, attempt: int) -> AsyncGenerator[bytes, None]:
        """The video of this attempt while it is made, as the bytes of a fragmented MP4: from its first frame on, in
        pieces, to its last frame.

        Raises WorkerLost for an attempt that does not run here; the iterator raises it when the attempt ends before the
        last frame.
        """
        for generation in self._generations.values():
            if (generation.task.job_id, generation.task.attempt) == (job_id, attempt):
                return generation.live.read()
        raise WorkerLost(f"worker {self.worker_id} does not make attempt {attempt} of {job_id}")

    def leave(self, job_id: JobId) -> None:
        """End the generation like ``cancel``, but the job continues elsewhere: its checkpoint is kept."""
        for generation in list(self._generations.values()):
            if generation.task.job_id == job_id:
                self._leave(generation)

    async def _events(self, generation: Generation) -> AsyncIterator[Event]:
        try:
            while True:
                outcome = await generation.outcomes.get()
                if isinstance(outcome, GenerationError):
                    try:
                        raise outcome
                    finally:
                        del outcome  # else this frame would hold the error, whose traceback holds this frame
                yield outcome
                if is_terminal(outcome):
                    return
        finally:
            if generation.key in self._generations:  # nobody listens any more
                self._leave(generation)
            if generation.driver is not None and generation.given_back is None:
                await asyncio.shield(generation.driver)

    def _leave(self, generation: Generation) -> None:
        """End the generation here. Its job continues elsewhere, or was cancelled before."""
        generation.goes_on = not generation.is_cancelled or generation.goes_on
        self._cancel(generation)

    def _cancel(self, generation: Generation) -> None:
        generation.is_cancelled = True
        generation.retries.end()
        generation.decoders.end()
        generation.stop_reading()
        if self._device is not None:
            self._device.cancel(generation.key, goes_on=generation.goes_on)

    async def _drive(self, generation: Generation) -> None:
        """Take a task to its end. The slot is free before anybody sees the end."""
        outcome: Event | WorkerLost = WorkerLost()
        try:
            outcome = await self._make(generation)
        except asyncio.CancelledError:  # the event loop ends, and will not run the rest
            self._cancel(generation)
            generation.delivery.abort()
            raise
        except Exception as exc:
            outcome = _outcome_of(exc, generation)
            release_frames(exc)
        finally:
            del self._generations[generation.key]
            generation.live.end()
            self._notify()
            generation.outcomes.put_nowait(generation.given_back or outcome)
            if isinstance(outcome, Terminal) and not generation.goes_on:
                self._remove_checkpoint(generation.checkpoints)

    def _remove_checkpoint(self, checkpoints: Checkpoints) -> None:
        """Remove the checkpoint in the background: waiters for the end of the job do not wait for this."""
        if checkpoints.is_any:
            tidying = asyncio.create_task(asyncio.to_thread(checkpoints.remove))
            self._tidying.add(tidying)
            tidying.add_done_callback(self._tidying.discard)

    async def _make(self, generation: Generation) -> Terminal:
        """Make the video: read inputs, run on the device, deliver. Raises the error of any of these."""
        request = generation.task.request
        read, resume = await self._blocking(partial(self._read, generation))
        inputs = replace(read.inputs, loras=await self._read_loras(generation))
        if generation.is_cancelled:
            return Cancelled()
        facts = self._engine.facts
        generation.delivery.describe(Manifest.of(request, read.files, facts, encoder_facts(request.output_format)))
        if read.older is not None:
            generation.delivery.continue_from(read.older)
        generation.marks.on_device = time.perf_counter()
        loop = asyncio.get_running_loop()

        def on_output(output: Output) -> None:
            if (progress := generation.note(output)) is not None:
                _post(loop, generation.outcomes.put_nowait, progress)
            if (preview := preview_of(request, output)) is not None:
                _post(loop, generation.outcomes.put_nowait, preview)

        admit = partial(
            Admit,
            generation.key,
            request,
            on_output,
            inputs=inputs,
            resume=resume,
            on_leave=generation.checkpoints.leave,
            tenant=generation.task.tenant,
            deadline_at=generation.task.deadline_at,
        )
        ended = await self._on_device(admit)
        generation.device_s = ended.device_s
        if ended.reason is EndReason.DONE and not generation.is_cancelled:
            return await self._deliver(generation)
        if generation.goes_on or ended.reason is EndReason.LOST:
            await self._blocking(partial(generation.checkpoints.keep, GIVE_BACK_S))
        await self._blocking(generation.delivery.abort)
        if ended.error is not None:
            raise ended.error
        if generation.is_cancelled:
            return Cancelled()
        raise WorkerLost

    def _read(self, generation: Generation) -> tuple[TaskInputs, bytes | None]:
        """Read the inputs of the request, and the checkpoint of an earlier attempt. Blocks."""
        read = read_inputs(generation.task.request, self._storage, generation.retries, generation.decoders)
        return read, generation.checkpoints.read(generation.retries)

    async def _read_loras(self, generation: Generation) -> object:
        """What the engine reads of LoRAs, on a thread of its own while the device goes on with others. None when nobody
        wants the video meanwhile: then the reading ends by itself, for those who may need the same LoRAs."""
        request = generation.task.request
        if not request.loras or generation.is_cancelled or self._is_stopping:
            return None
        loop = asyncio.get_running_loop()
        generation.reading = reading = loop.create_future()

        def read() -> None:
            try:
                found = self._engine.read_loras(request)
            except Exception as exc:
                _post(loop, _fail, reading, exc)
            else:
                _post(loop, _resolve, reading, found)

        # A daemon, so that the process can end while a slow disk is read.
        threading.Thread(target=read, name="loras", daemon=True).start()
        return await reading

    async def _blocking(self, work: Callable[[], _T]) -> _T:
        """Run a part of a generation that blocks in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _on_device(self, admit: Callable[..., Admit]) -> Ended:
        """Run a generation on the device to its end; ``admit`` needs only its ``on_end``."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Ended] = loop.create_future()
        assert self._device is not None, "run() admits only when the device is there"
        self._device.admit(admit(on_end=lambda how: _post(loop, _resolve, ended, how)))
        return await ended

    async def _deliver(self, generation: Generation) -> Terminal:
        """Store the video. A cancel that comes now deletes it again; if that fails, the video stays and is reported."""
        made = await self._blocking(partial(generation.delivery.finish, lambda: generation.timings))
        if generation.is_cancelled:
            try:
                await self._blocking(generation.delivery.abort)
            except StorageUnavailable as exc:
                log.warning("a cancel came too late", job_id=generation.task.job_id, reason=exc.message)
            else:
                return Cancelled()
        return Completed(
            artifact=made.film,
            thumbnail=made.thumbnail,
            spritesheet=made.spritesheet,
            timings=generation.timings,
            warnings=tuple(generation.warnings),
        )

    def _on_device_exit(self) -> None:
        self._is_lost = self._is_lost or (self._is_loaded and not self._is_stopping)
        self._set_ready(False)

    def _on_loss(self) -> None:
        """Take nothing more: the device thread ends what runs, and then itself."""
        self._is_lost = True
        self._set_ready(False)

    def _set_ready(self, is_ready: bool) -> None:
        self._is_ready = is_ready
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _probe_of(can: Capabilities, device: str) -> tuple[GenerationRequest, Inputs]:
    """The probe request, with black pictures and films where the model needs them."""
    probe = PROBE.model_copy(update={"num_inference_steps": can.limits.min_steps})
    if device == "cpu":
        probe = probe.model_copy(update={"size": _CPU_PROBE_SIZE})
    try:
        request = resolve_alone(probe, can).request
    except RequestError:  # a model that does not make this size gets its own default
        request = resolve_alone(probe.model_copy(update={"size": None}), can).request
    film = np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)
    return request, Inputs(
        first_frame=film[0] if request.strength is None and not can.is_text_to_video else None,
        film=None if request.strength is None else film,
        control_video=(film,) * len(can.control_videos) if can.needs_control_video else (),
    )


def _outcome_of(error: Exception, generation: Generation) -> Terminal | WorkerLost:
    """What an error makes of a generation: lost, cancelled or failed."""
    if isinstance(error, WorkerLost):
        return error
    if isinstance(error, _OF_ENDED_WORK) and generation.is_cancelled:  # nobody wants the video any more
        return Cancelled()
    return _failed(error, generation.task)


def _failed(error: Exception, task: Task) -> Failed:
    """The failed event with one sentence for the client; the traceback goes only to the log."""
    if isinstance(error, KinemaError):
        log.warning("a generation failed", job_id=task.job_id, attempt=task.attempt, reason=error.message)
        return Failed(code=error.code, message=error.message)
    log.error("a generation failed unexpectedly", job_id=task.job_id, attempt=task.attempt, exc_info=error)
    return Failed(code=EngineFailed.code, message=f"{EngineFailed().message[:-1]} ({type(error).__name__}).")


def _as_config_error(error: BaseException, model: str) -> KinemaError:
    if isinstance(error, KinemaError):
        return error
    if isinstance(error, Exception) and isinstance(lost := meaning_of(error), WorkerLost):
        return lost
    log.error("the engine did not start", model=model, exc_info=error)
    return ConfigError(f"engine.model = {model!r} cannot be used ({type(error).__name__}: {error})")


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[_T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> None:
    """Call it on the loop's thread. A closed loop has no listeners, so nothing happens then."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
