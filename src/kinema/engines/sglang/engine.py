"""The sglang engine: SGLang's DiffGenerator behind our protocol. Read ``generate`` first.

The library makes one video at a time and hands nothing out between two steps, so this engine has no checkpoints and no
previews, and videos do not interleave. The library says nothing of a killed worker, an error, or a size that it rounds;
here a video fails with the reason, and a Note names what differs from the request.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from kinema.engines.base import (
    NO_INPUTS,
    Frames,
    Inputs,
    Note,
    Output,
    StageReport,
    Step,
    UInt8Array,
    check_inputs,
    report_nothing,
)
from kinema.engines.failures import says_lost
from kinema.engines.sglang.arguments import (
    arguments_of,
    backend_of,
    capabilities_of,
    check_request,
    environment_of,
    num_gpus,
    parameters_of,
    refused_tiers,
)
from kinema.engines.sglang.facts import facts_of
from kinema.engines.sglang.library_process import LibraryProcess, ProcessLost
from kinema.engines.sglang.step_hooks import stop_file
from kinema.engines.sglang.wire import Message, num_chunks
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.fingerprint import weights_digest
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.errors import ConfigError, EngineFailed, GenerationError, OutOfMemory, WorkerLost
from kinema.manifest import EngineFacts
from kinema.request.capabilities import Capabilities
from kinema.request.request import GenerationRequest
from kinema.settings import EngineSettings

log = logging.getLogger(__name__)

# A client reads the reason; the library's text sometimes has whole tracebacks.
_MAX_REASON_CHARS = 500


@dataclass(eq=False)
class _Generation:
    """A video that the library makes now or will make next. ``outputs`` have come and are not yielded yet."""

    number: int
    request: GenerationRequest
    outputs: deque[Output | GenerationError] = field(default_factory=deque)
    num_steps: int = 0
    num_frames: int = 0
    is_over: bool = False

    def add_steps(self, num_done: int) -> None:
        """Add all steps up to this one: the library reports at most one for each percent, and drops what it cannot
        send.
        """
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
        for name, reason in refused_tiers(checkpoint, settings).items():
            log.warning("the tier %s is not offered: %s", name, reason)
        self._arguments = arguments_of(checkpoint, settings)
        self._environment = {**environment_of(settings), **(environment or {})}
        self._backend, self._num_gpus = backend_of(settings), num_gpus(settings)
        if settings.sglang.backend == "auto":
            log.info("engine.sglang.backend auto: chose %s", self._backend)
        self._process: LibraryProcess | None = None
        self._is_ready = False
        self._weights = ""
        self._facts: EngineFacts | None = None
        self._device = settings.device
        self._num_generations = 0
        self._current: _Generation | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def device(self) -> str:
        return self._device

    @property
    def is_lost(self) -> bool:
        """Never true: a process that died is started again."""
        return False

    @property
    def memory(self) -> None:
        """Nobody knows: the library has it in processes of its own."""

    @property
    def facts(self) -> EngineFacts:
        assert self._facts is not None, "load() was not called"
        return self._facts

    @property
    def process_group(self) -> int | None:
        """The group of the library's process and its workers; None when no process runs."""
        return None if self._process is None else self._process.pid

    @property
    def loras_in_memory(self) -> Sequence[str]:
        """None that a request could ask for."""
        return ()

    def load(self, report: StageReport = report_nothing) -> None:
        report("loading the model in sglang", None)  # the library does not say how far it is
        if self._process is None:
            self._weights = self._read_weights()
            self._start()
            try:
                self._wait_until_ready()
            except ProcessLost as exc:
                self._drop()
                raise ConfigError(f"sglang cannot load {self._checkpoint.name}: {exc}") from exc

    def make_room(self) -> None:
        """The library's process keeps what it has."""

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def read_loras(self, request: GenerationRequest) -> object:  # noqa: ARG002 - requests have none
        """The LoRA of the settings is the library's own."""
        return None

    def generate(
        self,
        request: GenerationRequest,
        inputs: Inputs = NO_INPUTS,
        resume: bytes | None = None,  # noqa: ARG002 - there are no checkpoints, so this is never one of ours
    ) -> Generator[Output, None, None]:
        """See ``engines/base.py``. While another video is made, the first ``next`` waits for its end."""
        self._check(request, inputs)
        self._num_generations += 1
        generation = _Generation(self._num_generations, request)
        try:
            self._begin(generation, inputs)
            while (output := self._next(generation)) is not None:
                yield output
        finally:
            self._leave(generation)

    def _check(self, request: GenerationRequest, inputs: Inputs) -> None:
        """Raises EngineFailed for a request that was not resolved against the capabilities, and InvalidRequest for
        steps that the library does not take."""
        check_request(request)
        can = self._capabilities
        check_inputs(inputs, can)
        expected = (request.height, request.width, 3)
        for name, picture in inputs.given().items():
            if picture.shape != expected or picture.dtype != np.uint8:
                raise EngineFailed(
                    f"the {name.replace('_', ' ')} is {picture.dtype} {picture.shape}, not uint8 {expected}"
                )

    def _begin(self, generation: _Generation, inputs: Inputs) -> None:
        """Hand the video to the library, once it is free. Raises EngineFailed when it cannot be started."""
        while self._current is not None:
            self._receive(self._current)
        try:
            process = self._ready_process()
            pictures = {
                name: _write_image(data, process.folder / f"{name}-{generation.number}.png")
                for name, data in inputs.given().items()
            }
            process.send("generate", number=generation.number, parameters=parameters_of(generation.request, pictures))
        except ProcessLost as exc:
            self._restart()
            raise EngineFailed(_sentence(f"sglang could not begin: {exc}")) from exc
        self._current = generation

    def _next(self, generation: _Generation) -> Output | None:
        """The next output, None after the last. Raises GenerationError."""
        while not generation.outputs and not generation.is_over:
            self._receive(generation)
        if not generation.outputs:
            return None
        output = generation.outputs.popleft()
        if isinstance(output, GenerationError):
            raise output
        return output

    def _leave(self, generation: _Generation) -> None:
        """Clean up after the end of a video. A cancelled one ends at its next step, or the library is started again."""
        generation.outputs.clear()
        if self._process is not None:
            for path in self._process.folder.glob(f"*-{generation.number}.png"):
                path.unlink(missing_ok=True)
        if generation is not self._current:
            return
        self._current = None
        # Several ranks would have to stop together, or one would wait for the others for ever.
        if self._num_gpus == 1 and self._process is not None:
            stop_file(self._process.folder, generation.number).touch()
        else:
            self._restart()

    def _receive(self, generation: _Generation) -> None:
        """Receive the library's next message, and add what it says to the video."""
        assert self._process is not None
        try:
            message = self._process.receive(self._settings.sglang.silence_s)
        except ProcessLost as exc:
            self._end(generation, EngineFailed(_sentence(f"sglang was lost while it made the video: {exc}")))
            self._restart()
            return
        if message.fields.get("number") != generation.number:  # a video that was cancelled
            return
        match message.kind:
            case "step":
                generation.add_steps(int(message.fields["index"]))
            case "frames":
                self._add_frames(generation, message)
            case "error":
                self._end(generation, _failure(str(message.fields["reason"]), generation.request))
            case "done":
                self._end(generation, None)

    def _add_frames(self, generation: _Generation, message: Message) -> None:
        """Add decoded frames. Their true size counts: the library only repeats that of the request."""
        request = generation.request
        generation.add_steps(request.num_denoising_steps)
        made, asked = tuple(message.fields["shape"]), (request.num_frames, request.height, request.width, 3)
        if made != asked and not generation.num_frames:
            generation.outputs.append(Note(f"sglang made {_described(made)}, not {_described(asked)}"))
        count = int(message.fields["num_frames"])
        data = np.frombuffer(message.content, np.uint8).reshape(count, *made[1:])
        generation.num_frames += count
        generation.outputs.append(Frames(data, num_chunks(generation.num_frames), num_chunks(made[0])))

    def _end(self, generation: _Generation, failure: GenerationError | None) -> None:
        if failure is not None:
            log.error("sglang failed: %s", failure)
            generation.outputs.append(failure)
        generation.is_over = True
        if self._current is generation:
            self._current = None

    def _read_weights(self) -> str:
        """The digest of the weights, whose files are looked at before the library reads them. Raises ConfigError."""
        try:
            return weights_digest(self._checkpoint)
        except (OSError, DamagedFile) as exc:
            raise ConfigError(f"the model in {self._checkpoint.path} cannot be loaded: {exc}") from exc

    def _start(self) -> None:
        self._is_ready = False
        self._process = LibraryProcess(self._environment)
        try:
            self._process.send("load", arguments=self._arguments)
        except ProcessLost as exc:
            log.error("sglang did not start: %s", exc)

    def _restart(self) -> None:
        """Begin to load the model again; the next video waits for it."""
        self._drop()
        self._start()

    def _drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _ready_process(self) -> LibraryProcess:
        """The process with the model loaded. Raises ProcessLost when it is not ready in time."""
        if self._process is None:
            self._start()
        elif self._is_ready:
            self._replace_if_lost(self._process)
        assert self._process is not None
        if not self._is_ready:
            self._wait_until_ready()
        return self._process

    def _replace_if_lost(self, process: LibraryProcess) -> None:
        """Start a process again that died between two videos. Its last messages belong to earlier videos, and go."""
        try:
            process.drain()
        except ProcessLost as exc:
            log.error("sglang was lost between two videos: %s", exc)
            self._restart()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        message = self._process.receive(self._settings.sglang.start_s)
        if message.kind != "ready":
            raise ProcessLost(_sentence(str(message.fields["reason"])))
        self._is_ready = True
        self._device = str(message.fields["device"])
        self._facts = facts_of(message.fields, self._weights, self._settings)


def _write_image(image: UInt8Array, path: Path) -> Path:
    """Write a picture to a file, as the library wants it."""
    Image.fromarray(image).save(path)
    return path


def _failure(reason: str, request: GenerationRequest) -> GenerationError:
    if "out of memory" in reason.lower():
        return OutOfMemory()
    # The library's process keeps a device that fails from now on. A prompt that is repeated here says nothing of it.
    if says_lost(reason.replace(request.prompt, "").replace(request.negative_prompt, "")):
        return WorkerLost(_sentence(f"sglang lost its device: {reason}"))
    return EngineFailed(_sentence(f"sglang made no video: {reason}"))


def _sentence(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON_CHARS]


def _described(video: tuple[int, ...]) -> str:
    num_frames, height, width, *_ = video
    return f"{num_frames} frames of {width}x{height}"
