"""What a client asked for and what it sent along, as it came: every field except the prompt may be absent."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class GenerationOptions(BaseModel):
    """The parameters that a client asked for. None means that the model's preset decides."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    negative_prompt: str | None = None
    size: str | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    strength: float | None = None
    seed: int | None = None
    preview_every: int | None = None
    priority: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """The file that came with a request, as the client sent it or as it was stored for an earlier job; at most one.

    ``image`` is the first frame, ``continues`` the film to go on from, ``edits`` the film to edit.
    """

    image: bytes | None = None
    continues: bytes | None = None
    edits: bytes | None = None

    def __bool__(self) -> bool:
        return any(data is not None for data in (self.image, self.continues, self.edits))


NOTHING_GIVEN = Given()
