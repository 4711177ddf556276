"""What lies in the memory of a worker's device, and which requests fit into it.

Plain data and arithmetic: an engine measures, its worker tells the frontends, and these refuse a request that would not
fit alone. Nothing is refused before something was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from kinema.errors import UnsupportedRequest
from kinema.request.capabilities import Capabilities, Limits
from kinema.request.geometry import Geometry
from kinema.request.request import GenerationRequest


class Need(BaseModel):
    """The bytes that a kind of work takes, linear in its units: tokens of a step, pixels of a decoded picture."""

    model_config = ConfigDict(frozen=True)

    base_bytes: float
    bytes_per_unit: float

    def bytes_for(self, units: float) -> float:
        """The bytes for so many units."""
        return self.base_bytes + self.bytes_per_unit * units

    def most_units(self, num_bytes: float) -> float:
        """The most units that so many bytes are enough for; 0 when they are not enough for any."""
        left = max(num_bytes - self.base_bytes, 0.0)
        return left / self.bytes_per_unit if left and self.bytes_per_unit else math.inf if left else 0.0


class GuidanceMemory(BaseModel):
    """Both passes of guidance are in memory up to ``tokens_together`` tokens. Above that they take turns, and take what
    ``passes_apart`` of them do."""

    model_config = ConfigDict(frozen=True)

    tokens_together: float = 0.0
    passes_apart: float = 1.0


class Memory(BaseModel):
    """The memory of a device, for the tensors of one process. Sizes are in bytes.

    ``limit_bytes`` bounds all of them. ``residents`` are those that lie there for all videos, by name, and
    ``room_bytes`` is left for a single video when all that can leave has left. ``step`` is what a step takes of that by
    its ``step_units``, and ``decode`` what a decode takes by the pixels of a picture; None before it was measured.
    ``geometry`` is how the worker counts tokens.
    """

    model_config = ConfigDict(frozen=True)

    limit_bytes: int
    residents: dict[str, int]
    room_bytes: int
    step: Need | None = None
    decode: Need | None = None
    guidance: GuidanceMemory = GuidanceMemory()
    geometry: Geometry = Geometry()

    @property
    def is_measured(self) -> bool:
        """Whether it is known what a video takes."""
        return self.step is not None and self.decode is not None

    def step_units(self, request: GenerationRequest) -> float:
        """The tokens of all passes that a step has in memory at once."""
        tokens = self.geometry.num_tokens(request.size, self.geometry.frames_at_once(request.num_frames))
        if request.num_passes == 1:
            return tokens
        is_together = tokens <= self.guidance.tokens_together
        return tokens * (request.num_passes if is_together else self.guidance.passes_apart)

    def bytes_for(self, request: GenerationRequest) -> float:
        """The bytes that the request takes alone, beside what cannot leave; 0 before anything was measured."""
        step = 0.0 if self.step is None else self.step.bytes_for(self.step_units(request))
        return max(step, 0.0 if self.decode is None else self.decode.bytes_for(request.size.pixels))

    def has_room_for(self, request: GenerationRequest) -> bool:
        """Whether the request fits alone."""
        return self.bytes_for(request) <= self.room_bytes

    def most_pixels(self, request: GenerationRequest) -> int:
        """The most pixels of which a single frame fits."""
        tokens_per_pixel = self.step_units(_with_frames(request, 1)) / request.size.pixels
        of_step = math.inf if self.step is None else self.step.most_units(self.room_bytes) / tokens_per_pixel
        of_decode = math.inf if self.decode is None else self.decode.most_units(self.room_bytes)
        return int(min(of_step, of_decode))


def check_memory(request: GenerationRequest, limits: Limits, workers: Sequence[Memory | None]) -> None:
    """Raises UnsupportedRequest when the request fits alone on none of these workers, with the most that would fit.

    A worker that has measured nothing, or of whose memory nothing is known, is taken to have room.
    """
    known = _measured(workers)
    if not known or any(memory.has_room_for(request) for memory in known):
        return
    best = max(known, key=lambda memory: memory.room_bytes - memory.bytes_for(request))
    size, there = request.size, f"{max(best.room_bytes, 0) / 1e9:.3g} GB are there for a video"
    most = _most_frames(request, limits, known)
    if most:
        raise UnsupportedRequest(
            f"{request.num_frames} frames of {size} take {best.bytes_for(request) / 1e9:.3g} GB of the device, and "
            f"{there}; at this size at most {most} frames",
            param="num_frames",
        )
    pixels = max(memory.most_pixels(request) for memory in known)
    raise UnsupportedRequest(
        f"a frame of {size} takes {best.bytes_for(_with_frames(request, 1)) / 1e9:.3g} GB of the device, and {there}; "
        f"a size has at most {pixels} pixels here",
        param="size",
    )


def most_frames(can: Capabilities, workers: Sequence[Memory | None]) -> int | None:
    """The most frames of the preset's size that one of these workers makes; None while one has not measured it."""
    known = _measured(workers)
    if not known:
        return None
    preset, limits = can.preset, can.limits
    request = GenerationRequest(
        model=can.model,
        prompt="",
        negative_prompt="",
        width=preset.size.width,
        height=preset.size.height,
        num_frames=1,
        fps=preset.fps,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
        flow_shift=preset.flow_shift,
        seed=0,
    )
    most = min(limits.max_frames, limits.max_volume // request.size.pixels)
    return _most_frames(_with_frames(request, most), limits, known)


def _most_frames(request: GenerationRequest, limits: Limits, workers: Sequence[Memory]) -> int:
    """The most frames of the request's size, up to its own, that fit on one of the workers; 0 when none does."""
    last = limits.frames_up_to(request.num_frames)
    for num_frames in range(last, 0, -limits.frame_step):
        shorter = _with_frames(request, num_frames)
        if any(memory.has_room_for(shorter) for memory in workers):
            return num_frames
    return 0


def _measured(workers: Sequence[Memory | None]) -> list[Memory]:
    """All of them; none while one of them has measured nothing."""
    known = [memory for memory in workers if memory is not None and memory.is_measured]
    return known if len(known) == len(workers) else []


def _with_frames(request: GenerationRequest, num_frames: int) -> GenerationRequest:
    return request.model_copy(update={"num_frames": num_frames})
