"""The seam between everything that serves and everything that computes.

An engine loads one model and turns a request into a generator. Its caller decides when the next step runs, so several
generations share a device by interleaving their steps, and closing the generator cancels. torch lives behind this file:
numpy arrays and plain data cross it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kinema.errors import EngineFailed
from kinema.manifest import EngineFacts
from kinema.media.sound import Sound
from kinema.request.capabilities import Capabilities
from kinema.request.memory import Memory
from kinema.request.request import GenerationRequest

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The pictures and films that come with a request, in the request's size; None or empty for each that does not.

    ``first_frame`` and ``last_frame`` (h, w, 3) uint8 RGB are the video's own. ``film`` (f, h, w, 3) uint8 RGB is the
    film to edit, in the request's length, and comes alone. A last frame comes with a first one. ``control_video`` are
    films like it that say what is to be seen in each frame. ``reference_images`` (h, w, 3) uint8 RGB show what is to be
    seen somewhere, each in its own shape and no larger than the video. ``conditioning`` are pictures of single frames
    with the numbers of these, from 0. ``audio`` is a sound that the video follows. ``loras`` is what the engine's
    ``read_loras`` gave for the request; without it ``generate`` reads them.
    """

    first_frame: UInt8Array | None = None
    last_frame: UInt8Array | None = None
    film: UInt8Array | None = None
    loras: object = None
    control_video: tuple[UInt8Array, ...] = ()
    reference_images: tuple[UInt8Array, ...] = ()
    conditioning: tuple[tuple[int, UInt8Array], ...] = ()
    audio: Sound | None = None

    def given(self) -> dict[str, UInt8Array]:
        """The frames and the film that are there, by name."""
        pictures = {"first_frame": self.first_frame, "last_frame": self.last_frame, "film": self.film}
        return {name: data for name, data in pictures.items() if data is not None}

    @property
    def kinds(self) -> frozenset[str]:
        """The names of all inputs that are there."""
        others = ("control_video", "reference_images", "conditioning")
        lists = {name for name in others if getattr(self, name)}
        return frozenset(self.given()) | lists | ({"audio"} if self.audio is not None else set())


NO_INPUTS = Inputs()


def check_inputs(inputs: Inputs, can: Capabilities) -> None:
    """Raises EngineFailed for inputs of a kind that the model does not take, and for a first frame that it needs and
    does not get; no resolved request has these."""
    is_taken = {
        "first_frame": can.is_image_to_video,
        "last_frame": can.is_first_last_frame_to_video,
        "film": can.is_video_to_video,
        "control_video": len(inputs.control_video) == len(can.control_videos),
        "reference_images": len(inputs.reference_images) <= can.max_reference_images,
        "conditioning": can.takes_conditioning,
        "audio": can.takes_audio,
    }
    for name in sorted(inputs.kinds):
        if not is_taken.get(name):
            raise EngineFailed(f"{can.model} takes no {name.replace('_', ' ')} with the engine {can.engine}")
    if inputs.first_frame is None and inputs.film is None and not can.is_text_to_video:
        raise EngineFailed(f"{can.model} needs a first frame with the engine {can.engine}")
    if can.needs_control_video and not inputs.control_video:
        raise EngineFailed(f"{can.model} needs a control video with the engine {can.engine}")


@dataclass(frozen=True, slots=True)
class Step:
    """``index`` of ``total`` denoising steps are done; index counts from 1.

    ``checkpoint`` returns the bytes from which ``generate`` goes on after this step, and ``preview`` a small picture of
    the video so far; they are None for an engine without them. They are called on the device thread before the
    generation is advanced or closed, or never; ``checkpoint`` may also be called after an advance raised OutOfMemory. A
    step that ``is_cached`` ran without the model, in next to no time.
    """

    index: int
    total: int
    checkpoint: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    preview: Callable[[], UInt8Array] | None = field(default=None, compare=False, repr=False)
    is_cached: bool = False


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded frames in order. ``index`` of ``total`` chunks are done; index counts from 1.

    ``data`` is uint8: RGB (f, h, w, 3), or yuv420p (f, h * 3/2, w) as in ``media/planes.py`` from an engine that
    converts on its device. The caller may keep it for as long as it likes, but the engine may wait for its memory.
    ``sound`` is what is heard while they are shown, for a model that has sound.
    """

    data: UInt8Array
    index: int
    total: int
    sound: Sound | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """How the video differs from the request, in one sentence for the client. It comes before the frames."""

    text: str


Output = Step | Frames | Note

# Called by ``Engine.load``: the stage that it is at, in plain words, and the part of that stage that is done, from 0 to
# 1; None where nobody can know it. The call comes from any thread, and returns at once.
StageReport = Callable[[str, float | None], None]


def report_nothing(_stage: str, _part: float | None) -> None:
    """The ``StageReport`` for whoever does not ask how far a load is."""


class Engine(Protocol):
    """Runs one model on one device, or on several as if they were one.

    Calls are made on the worker's device thread, unless a method says otherwise.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can make. Known before ``load``, so that other requests are refused before the weights are
        read. May be asked on any thread.
        """

    @property
    def device(self) -> str:
        """What it runs on, for people: cpu, cuda:0. Known for sure once it is loaded."""

    @property
    def facts(self) -> EngineFacts:
        """What the frames depend on besides the request. Engines with equal facts can use each other's checkpoints.
        Known once it is loaded.
        """

    @property
    def is_lost(self) -> bool:
        """Whether a part of the engine is gone, another process for instance, so that every call raises WorkerLost. May
        be asked on any thread.
        """

    @property
    def memory(self) -> Memory | None:
        """What lies on the device, and what a video takes of it; None where nobody measures that, or not yet. May be
        asked on any thread."""

    @property
    def loras_in_memory(self) -> Sequence[str]:
        """The digests of the LoRAs that need not be read again. May be asked on any thread."""

    def load(self, report: StageReport = report_nothing) -> None:
        """Bring the model to the device, and report each stage of that. Raises ConfigError when the checkpoint cannot
        be used."""

    def read_loras(self, request: GenerationRequest) -> object:
        """Read the request's LoRAs from disk, so that ``generate``, which gets the result in ``Inputs.loras``, need not
        do it while others wait for the device. They stay in memory as long as the result is kept. None for an engine
        that reads none.

        Blocks for as long as the disk needs. May be called on any thread between ``load`` and ``close``. Raises
        InvalidRequest for a LoRA that is gone, damaged or another one now, and WorkerLost when the engine is lost.
        """

    def generate(
        self,
        request: GenerationRequest,
        inputs: Inputs = NO_INPUTS,
        resume: bytes | None = None,
    ) -> Generator[Output, None, None]:
        """Yield a Step after each denoising step, then the video as Frames chunks, of another size or number than the
        request's only behind a Note that says so.

        ``inputs`` are of the kinds that the capabilities name. With a film the request has a ``strength``, and only
        ``num_denoising_steps`` of its steps are computed.
        With ``resume``, the checkpoint of a step, the first Step is the one after it, and the frames are those of an
        uninterrupted generation. A checkpoint that is damaged, or of another request or of an engine with other
        ``facts``, is ignored.
        The generator frees its memory when it ends or is closed, and leaves no torch context entered between steps.
        The same request gives the same frames, however its steps interleave with others; where the capabilities say
        that steps do not interleave, a generation waits for the one before it.
        Raises OutOfMemory, EngineFailed, or WorkerLost when the engine is lost.
        """

    def make_room(self) -> None:
        """Free the memory of the device that only saves time. Called between two steps; no frame changes by it."""

    def close(self) -> None:
        """Free the model."""
