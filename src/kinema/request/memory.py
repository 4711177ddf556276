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


class Memory(BaseModel):
    """The memory of a device, for the tensors of one process. Sizes are in bytes.

    ``limit_bytes`` bounds all of them. ``residents`` are those that lie there for all videos, by name, and
    ``room_bytes`` is left for a single video when all that can leave has left. ``step`` and ``decode`` are what a video
    takes of that, by ``step_units`` and ``decode_units``; None before it was measured.
    """

    model_config = ConfigDict(frozen=True)

    limit_bytes: int
    residents: dict[str, int]
    room_bytes: int
    step: Need | None = None
    decode: Need | None = None

    @property
    def is_measured(self) -> bool:
        """Whether it is known what a video takes."""
        return self.step is not None and self.decode is not None

    def bytes_for(self, request: GenerationRequest) -> float:
        """The bytes that the request takes alone, beside what cannot leave; 0 before anything was measured."""
        step = 0.0 if self.step is None else self.step.bytes_for(step_units(request))
        return max(step, 0.0 if self.decode is None else self.decode.bytes_for(request.size.pixels))

    def most_frames(self, request: GenerationRequest) -> float:
        """The most latent frames of the request's size that fit; less than 1 when not even one does."""
        if self.decode is not None and self.decode.bytes_for(request.size.pixels) > self.room_bytes:
            return 0.0
        if self.step is None:
            return math.inf
        return self.step.most_units(self.room_bytes) / step_units(_with_frames(request, 1))

    def most_pixels(self, request: GenerationRequest) -> int:
        """The most pixels of which a single frame fits."""
        tokens_per_pixel = step_units(_with_frames(request, 1)) / request.size.pixels
        of_step = math.inf if self.step is None else self.step.most_units(self.room_bytes) / tokens_per_pixel
        of_decode = math.inf if self.decode is None else self.decode.most_units(self.room_bytes)
        return int(min(of_step, of_decode))


def step_units(request: GenerationRequest) -> float:
    """The tokens of all passes of a step, as the request counts them."""
    return request.num_passes * request.kilotokens * 1000


def check_memory(request: GenerationRequest, limits: Limits, workers: Sequence[Memory | None]) -> None:
    """Raises UnsupportedRequest when the request fits alone on none of these workers, with the most that would fit.

    A worker that has measured nothing, or of whose memory nothing is known, is taken to have room.
    """
    known = _measured(workers)
    if not known or any(memory.bytes_for(request) <= memory.room_bytes for memory in known):
        return
    best = max(known, key=lambda memory: memory.room_bytes - memory.bytes_for(request))
    size, there = request.size, f"{max(best.room_bytes, 0) / 1e9:.3g} GB are there for a video"
    latent_frames = int(max(memory.most_frames(request) for memory in known))
    if latent_frames >= 1:
        most = (latent_frames - 1) * limits.frame_step + 1
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
    latent_frames = min(max(memory.most_frames(request) for memory in known), (most - 1) // limits.frame_step + 1)
    return (int(latent_frames) - 1) * limits.frame_step + 1 if latent_frames >= 1 else 0


def _measured(workers: Sequence[Memory | None]) -> list[Memory]:
    """All of them; none while one of them has measured nothing."""
    known = [memory for memory in workers if memory is not None and memory.is_measured]
    return known if len(known) == len(workers) else []


def _with_frames(request: GenerationRequest, num_frames: int) -> GenerationRequest:
    return request.model_copy(update={"num_frames": num_frames})
