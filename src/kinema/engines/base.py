"""The seam between everything that serves and everything that computes.

An engine loads one model and turns a request into a generator. Whoever holds the generator decides when the next
step runs, so several generations share a device by taking turns, and closing the generator is cancelling.
torch lives on the other side of this file: what crosses is numpy and plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kinema.manifest import EngineFacts
from kinema.request.capabilities import Capabilities
from kinema.request.request import GenerationRequest

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Step:
    """``index`` of ``total`` denoising steps are done; index counts from 1.

    ``checkpoint`` gives the bytes from which ``generate`` goes on after this step, and ``preview`` a small picture of
    what there is; None: the engine has none. They are called on the device thread before the generation is advanced or
    closed, or never. One that ``is_cached`` was taken without the model, in next to no time.
    """

    index: int
    total: int
    checkpoint: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    preview: Callable[[], UInt8Array] | None = field(default=None, compare=False, repr=False)
    is_cached: bool = False


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded frames in order. ``index`` of ``total`` chunks are done; index counts from 1.

    ``data`` is uint8: RGB (f, h, w, 3), or yuv420p (f, h * 3/2, w) as ``media/planes.py`` has it, from an engine that
    makes it on its device. It may be kept for as long as one likes, but an engine may wait for memory that is held.
    """

    data: UInt8Array
    index: int
    total: int


@dataclass(frozen=True, slots=True)
class Note:
    """How the video differs from what was asked for: one sentence for the client. It comes before the frames."""

    text: str


Output = Step | Frames | Note

# Called by ``Engine.load``: the stage that it is at, in plain words, and the part of that stage that is done, from 0 to
# 1; None where nobody can know it. The call comes from any thread, and returns at once.
StageReport = Callable[[str, float | None], None]


def report_nothing(_stage: str, _part: float | None) -> None:
    """The ``StageReport`` for whoever does not ask how far a load is."""


class Engine(Protocol):
    """Runs one model on one device, or on several as if they were one. All calls but those that say otherwise are made
    on the worker's device thread."""

    @property
    def capabilities(self) -> Capabilities:
        """Known before ``load``, so that a request which cannot be made is refused before the weights are read. May be
        asked on any thread."""

    @property
    def device(self) -> str:
        """What it runs on, for people: cpu, cuda:0. Known for sure once it is loaded."""

    @property
    def facts(self) -> EngineFacts:
        """What the frames depend on besides the request, and what must be equal for one engine to use a checkpoint of
        another; known once it is loaded."""

    @property
    def is_lost(self) -> bool:
        """Something that it computes with is gone, another process say, so it makes nothing more and raises WorkerLost.
        May be asked on any thread."""

    def load(self, report: StageReport = report_nothing) -> None:
        """Bring the model to the device, and report each stage of that. Raises ConfigError when the checkpoint cannot
        be used."""

    def generate(
        self,
        request: GenerationRequest,
        image: UInt8Array | None = None,
        video: UInt8Array | None = None,
        resume: bytes | None = None,
    ) -> Generator[Output, None, None]:
        """Yield a Step after each denoising step, then the video as Frames chunks, of another size or number than the
        request's only behind a Note that says so.

        ``image`` is the first frame (h, w, 3) uint8 RGB in the request's size, for image-to-video; ``video`` is the
        film to edit (f, h, w, 3) uint8 RGB in the request's size and length, for video-to-video, where the request has
        a ``strength`` and only ``num_denoising_steps`` of its steps are taken. One of the two at most.
        With ``resume``, the checkpoint of a step, the first Step is the one after it, and the frames are those that the
        generation would have made. A checkpoint that is damaged, or of another request or an engine of other
        ``facts``, is as none.
        The generator frees its memory when it ends or is closed, and leaves nothing switched on between steps.
        The same request gives the same frames, however its steps are interleaved with others; where the capabilities
        say that no steps are, a generation that is begun waits for the one before it.
        Raises OutOfMemory, EngineFailed, or WorkerLost when the engine is lost.
        """

    def close(self) -> None:
        """Free the model."""
