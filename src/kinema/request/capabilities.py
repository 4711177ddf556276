"""What a model can make, and its defaults.

Plain data: an engine fills it in from its checkpoint, a worker sends it to the frontends, and these check every request
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from kinema.request.formats import OutputFormat
from kinema.request.geometry import Geometry
from kinema.request.shapes import Size


class Preset(BaseModel):
    """The defaults of a checkpoint.

    ``image_size`` says which size an image-to-video request gets when it names none: ``area`` keeps the image's
    shape at the preset's number of pixels (the rule of Wan's own scripts), ``fixed`` takes the preset's size. A model
    whose solver moves no timesteps has no ``flow_shift``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    num_frames: PositiveInt
    fps: PositiveInt
    num_inference_steps: PositiveInt
    guidance_scale: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    negative_prompt: str = ""
    image_size: Literal["area", "fixed"] = "area"

    @field_validator("size", mode="before")
    @classmethod
    def _size_from_text(cls, value: object) -> object:
        return Size.parse(value) if isinstance(value, str) else value


class Limits(BaseModel):
    """The bounds of what a model makes. ``max_volume`` bounds width x height x frames.

    Videos have ``frame_step`` times a whole number plus ``frame_offset`` frames: 1, 5, 9, ... for 4 and 1. Where
    ``sizes`` are listed, no others are made. The model reads the first ``max_prompt_tokens`` of a prompt; None means
    that it reads the whole prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_multiple: PositiveInt = 16
    min_side: PositiveInt = 64
    max_pixels: PositiveInt
    frame_step: PositiveInt = 4
    frame_offset: NonNegativeInt = 1
    sizes: tuple[Size, ...] = ()
    max_frames: PositiveInt
    max_volume: PositiveInt
    min_steps: PositiveInt = 1
    max_steps: PositiveInt = 200
    max_fps: PositiveInt = 60
    max_guidance_scale: float = 30.0
    max_prompt_chars: PositiveInt = 32_000
    max_prompt_tokens: PositiveInt | None = None

    @property
    def min_frames(self) -> int:
        """The frames of the shortest video."""
        return self.frame_offset or self.frame_step

    @property
    def frame_rule(self) -> str:
        """Which numbers of frames are made, in words."""
        rest = self.frame_offset % self.frame_step
        rule = "a whole number" if self.frame_step == 1 else f"a multiple of {self.frame_step}"
        rule += f" plus {rest}" if rest else ""
        return f"{rule}, at least {self.min_frames}" if self.min_frames > (rest or self.frame_step) else rule

    def frames_up_to(self, most: float) -> int:
        """The largest number of frames that a video has and that is not above ``most``; at least the least."""
        steps = (most - self.frame_offset) // self.frame_step
        return max(int(steps) * self.frame_step + self.frame_offset, self.min_frames)

    def frames_near(self, asked: float) -> int:
        """The number of frames that a video has and that is nearest to this one; of two the larger."""
        below = self.frames_up_to(min(asked, self.max_frames))
        above = below + self.frame_step
        return above if above - asked <= asked - below and above <= self.max_frames else below


Expert = Literal["high_noise", "low_noise", "both"]


class LoraInfo(BaseModel):
    """A LoRA that a model can be asked for by its name.

    ``digest`` says which file it is: SHA-256 in hex. ``scale`` is its strength where a request gives none. ``rank`` is
    0 where it has no matrices of low rank. ``is_for`` says which expert it changes; None for a model with one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    scale: float = 1.0
    trigger_words: tuple[str, ...] = ()
    rank: int = 0
    is_for: Expert | None = None
    size_bytes: int = 0


class TierLora(BaseModel):
    """A LoRA of a tier, by its name; the scales as in a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    scale: float | None = Field(None, ge=-10, le=10)
    scale_2: float | None = Field(None, ge=-10, le=10)


class Tier(BaseModel):
    """A named way to make a video with a model, for instance with a LoRA that was distilled to a few steps.

    What it sets takes the place of the preset's; None leaves the preset's. ``timesteps`` are those of a request, one
    for each step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")
    description: str = Field("", max_length=1000)
    num_inference_steps: PositiveInt | None = None
    timesteps: tuple[float, ...] | None = Field(None, min_length=1, max_length=1000)
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    solver: str | None = None
    loras: tuple[TierLora, ...] = ()

    @property
    def lora_names(self) -> frozenset[str]:
        return frozenset(lora.name for lora in self.loras)


class Capabilities(BaseModel):
    """What one model can make on one engine. Requests may also call the model by one of its ``aliases``.

    ``control_videos`` says, in words, which films a model takes as control, in their order; it may need them.
    Of a model that ``edits_whole_films`` an edit has no strength. The videos of a model that ``has_sound`` come with
    it. A model that is not ``is_interleaved`` makes one video at a time. Without ``has_checkpoints`` a video begins
    again when its worker was lost. A model that ``encodes_whole_film`` makes a film of the video's length from given
    frames, and encodes that. ``fixed_options`` names the parameters of a request that must be as the preset has them.
    ``loras`` are those of this moment. ``tiers`` are all that the model has; those whose LoRAs are here are
    ``offered_tiers``.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    aliases: tuple[str, ...] = ()
    engine: str
    is_text_to_video: bool = True
    is_image_to_video: bool = False
    is_first_last_frame_to_video: bool = False
    is_video_to_video: bool = False
    control_videos: tuple[str, ...] = ()
    needs_control_video: bool = False
    max_reference_images: int = 0
    takes_conditioning: bool = False
    takes_audio: bool = False
    edits_whole_films: bool = False
    has_two_experts: bool = False
    encodes_whole_film: bool = False
    is_interleaved: bool = True
    has_checkpoints: bool = True
    has_previews: bool = True
    fixed_options: tuple[str, ...] = ()
    has_sound: bool = False
    output_formats: tuple[OutputFormat, ...] = ("mp4", "webm", "gif")
    preset: Preset
    limits: Limits
    geometry: Geometry = Geometry()
    description: str = ""
    loras: tuple[LoraInfo, ...] = ()
    tiers: tuple[Tier, ...] = ()

    @property
    def offered_tiers(self) -> tuple[Tier, ...]:
        """The tiers whose LoRAs are here."""
        here = {info.name for info in self.loras}
        return tuple(tier for tier in self.tiers if tier.lora_names <= here)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model, its own name first."""
        return (self.model, *self.aliases)

    def named(self, model: str | None, aliases: Sequence[str]) -> Self:
        """The same under another name, where one is given, and with these aliases."""
        name = model or self.model
        others = tuple(alias for alias in dict.fromkeys(aliases) if alias != name)
        return self.model_copy(update={"model": name, "aliases": others})
