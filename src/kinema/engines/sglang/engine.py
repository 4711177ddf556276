"""The sglang engine: SGLang's DiffGenerator behind our protocol. Read ``generate`` first.

The library makes one video at a time and gives nothing out between two steps, so what it offers is less than the wan
engine's: no checkpoints, no previews, no turns. Where it is silent (a killed worker, an error, a size that it rounds)
this file is not: a video fails with the reason, and what is not as it was asked for is measured and said.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from kinema.engines.base import Frames, Note, Output, StageReport, Step, UInt8Array, report_nothing
from kinema.engines.sglang.arguments import (
    arguments_of,
    backend_of,
    capabilities_of,
    environment_of,
    num_gpus,
    parameters_of,
)
from kinema.engines.sglang.facts import facts_of
from kinema.engines.sglang.process import Lost, Process
from kinema.engines.sglang.steps import stop_file
from kinema.engines.sglang.wire import Message, num_chunks
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError, EngineFailed, GenerationError, OutOfMemory
from kinema.manifest import EngineFacts
from kinema.request.capabilities import Capabilities
from kinema.request.request import GenerationRequest
from kinema.settings import EngineSettings

log = logging.getLogger(__name__)

# A client reads the reason; the library's has whole tracebacks in it now and then.
_MAX_REASON_CHARS = 500


@dataclass(eq=False)
class _Job:
    """A video that the library makes now or is to make next. ``outputs`` are what it said and nobody took yet."""

    number: int
    request: GenerationRequest
    outputs: deque[Output | GenerationError] = field(default_factory=deque)
    num_steps: int = 0
    num_frames: int = 0
    is_over: bool = False

    def add_steps(self, num_done: int) -> None:
        """All up to this one: the library tells of one for each percent at most, and drops what it cannot send."""
        total = self.request.num_denoising_steps
        self.outputs.extend(Step(index, total) for index in range(self.num_steps + 1, num_done + 1))
        self.num_steps = max(self.num_steps, num_done)


class SglangEngine:
    """Runs one checkpoint in a process of its own, which is started again when it dies.

    ``environment`` is added to that process' environment, for tests. Raises ConfigError when the settings do not fit.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: EngineSettings, environment: Mapping[str, str] | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._capabilities = capabilities_of(checkpoint, settings)
        self._arguments = arguments_of(checkpoint, settings)
        self._environment = {**environment_of(settings), **(environment or {})}
        self._backend, self._num_gpus = backend_of(settings), num_gpus(settings)
        if settings.sglang_backend == "auto":
            log.info("sglang_backend auto: chose %s", self._backend)
        self._process: Process | None = None
        self._is_ready = False
        self._facts: EngineFacts | None = None
        self._device = settings.device
        self._num_jobs = 0
        self._current: _Job | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def device(self) -> str:
        return self._device

    @property
    def is_lost(self) -> bool:
        """Never: a process that died is started again."""
        return False

    @property
    def facts(self) -> EngineFacts:
        assert self._facts is not None, "load() was not called"
        return self._facts

    @property
    def process_group(self) -> int | None:
        """Of the library's process and its workers; None when there is none."""
        return None if self._process is None else self._process.pid

    def load(self, report: StageReport = report_nothing) -> None:
        report("loading the model in sglang", None)  # the library does not say how far it is
        if self._process is None:
            self._start()
            try:
                self._wait_until_ready()
            except Lost as exc:
                self._drop()
                raise ConfigError(f"sglang cannot load {self._checkpoint.name}: {exc}") from exc

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def generate(
        self,
        request: GenerationRequest,
        image: UInt8Array | None = None,
        video: UInt8Array | None = None,
        resume: bytes | None = None,  # noqa: ARG002 - there are no checkpoints, so this is never one of ours
    ) -> Generator[Output, None, None]:
        """See ``engines/base.py``. While another video is made, the first ``next`` waits for its end."""
        self._check(request, image, video)
        self._num_jobs += 1
        job = _Job(self._num_jobs, request)
        try:
            self._begin(job, image)
            while (output := self._next(job)) is not None:
                yield output
        finally:
            self._leave(job)

    def _check(self, request: GenerationRequest, image: UInt8Array | None, video: UInt8Array | None) -> None:
        """Raises EngineFailed for what no request that was resolved against the capabilities asks for."""
        can = self._capabilities
        if video is not None:
            raise EngineFailed(f"{can.model} does not edit videos with sglang")
        if not (can.is_text_to_video if image is None else can.is_image_to_video):
            raise EngineFailed(f"{can.model} {'needs a' if image is None else 'takes no'} first frame with sglang")
        expected = (request.height, request.width, 3)
        if image is not None and (image.shape != expected or image.dtype != np.uint8):
            raise EngineFailed(f"the first frame is {image.dtype} {image.shape}, not uint8 {expected}")

    def _begin(self, job: _Job, image: UInt8Array | None) -> None:
        """Hand the video to the library, once it is free. Raises EngineFailed when it cannot be started."""
        while self._current is not None:
            self._receive(self._current)
        try:
            process = self._ready_process()
            path = None if image is None else _write_image(image, process.folder / f"first-{job.number}.png")
            process.send("generate", job=job.number, parameters=parameters_of(job.request, path))
        except Lost as exc:
            self._restart()
            raise EngineFailed(_sentence(f"sglang could not begin: {exc}")) from exc
        self._current = job

    def _next(self, job: _Job) -> Output | None:
        """The next output, None after the last. Raises GenerationError."""
        while not job.outputs and not job.is_over:
            self._receive(job)
        if not job.outputs:
            return None
        output = job.outputs.popleft()
        if isinstance(output, GenerationError):
            raise output
        return output

    def _leave(self, job: _Job) -> None:
        """After its end, or at a cancel: then the library stops at its next step, or is started again."""
        job.outputs.clear()
        if self._process is not None:
            (self._process.folder / f"first-{job.number}.png").unlink(missing_ok=True)
        if job is not self._current:
            return
        self._current = None
        # Several ranks would have to stop together, or one waits for the others for ever.
        if self._num_gpus == 1 and self._process is not None:
            stop_file(self._process.folder, job.number).touch()
        else:
            self._restart()

    def _receive(self, job: _Job) -> None:
        """Take what the library says next of the video that it makes."""
        assert self._process is not None
        try:
            message = self._process.receive(self._settings.sglang_silence_s)
        except Lost as exc:
            self._end(job, EngineFailed(_sentence(f"sglang was lost while it made the video: {exc}")))
            self._restart()
            return
        if message.said.get("job") != job.number:  # of one that was cancelled
            return
        match message.kind:
            case "step":
                job.add_steps(int(message.said["index"]))
            case "frames":
                self._add_frames(job, message)
            case "error":
                self._end(job, _failure(str(message.said["reason"])))
            case "done":
                self._end(job, None)

    def _add_frames(self, job: _Job, message: Message) -> None:
        """What the library says of a video's size is the request's; here it is the frames'."""
        request = job.request
        job.add_steps(request.num_denoising_steps)
        made, asked = tuple(message.said["video"]), (request.num_frames, request.height, request.width, 3)
        if made != asked and not job.num_frames:
            job.outputs.append(Note(f"sglang made {_told(made)}, not {_told(asked)}"))
        count = int(message.said["num_frames"])
        data = np.frombuffer(message.content, np.uint8).reshape(count, *made[1:])
        job.num_frames += count
        job.outputs.append(Frames(data, num_chunks(job.num_frames), num_chunks(made[0])))

    def _end(self, job: _Job, failure: GenerationError | None) -> None:
        if failure is not None:
            log.error("sglang failed: %s", failure)
            job.outputs.append(failure)
        job.is_over = True
        if self._current is job:
            self._current = None

    def _start(self) -> None:
        self._is_ready = False
        self._process = Process(self._environment)
        try:
            self._process.send("load", arguments=self._arguments)
        except Lost as exc:
            log.error("sglang did not start: %s", exc)

    def _restart(self) -> None:
        """Begin to load again at once; the next video waits for it."""
        self._drop()
        self._start()

    def _drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _ready_process(self) -> Process:
        """Raises Lost when it is not ready again in time."""
        if self._process is None:
            self._start()
        elif self._is_ready:
            self._replace_if_lost(self._process)
        assert self._process is not None
        if not self._is_ready:
            self._wait_until_ready()
        return self._process

    def _replace_if_lost(self, process: Process) -> None:
        """What died between two videos is none of the next one's business. All that it said is of videos before."""
        try:
            process.drain()
        except Lost as exc:
            log.error("sglang was lost between two videos: %s", exc)
            self._restart()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        message = self._process.receive(self._settings.sglang_start_s)
        if message.kind != "ready":
            raise Lost(_sentence(str(message.said["reason"])))
        self._is_ready = True
        self._device = str(message.said["device"])
        self._facts = facts_of(message.said, self._checkpoint, self._settings)


def _write_image(image: UInt8Array, path: Path) -> Path:
    """The library takes first frames as files alone."""
    Image.fromarray(image).save(path)
    return path


def _failure(reason: str) -> GenerationError:
    if "out of memory" in reason.lower():
        return OutOfMemory()
    return EngineFailed(_sentence(f"sglang made no video: {reason}"))


def _sentence(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON_CHARS]


def _told(video: tuple[int, ...]) -> str:
    num_frames, height, width, *_ = video
    return f"{num_frames} frames of {width}x{height}"
