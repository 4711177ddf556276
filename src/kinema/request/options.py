"""What a client asked for and what it sent along, as it came: every field except the prompt may be absent."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pydantic import BaseModel, ConfigDict


class LoraAsk(BaseModel):
    """A LoRA that a client asked for, by its name.

    Without a ``scale`` it has its own. ``scale_2`` is for the low-noise expert of a model with two; without it,
    ``scale`` is for both. With a ``digest`` it must be that file.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    scale: float | None = None
    scale_2: float | None = None
    digest: str | None = None


class GenerationOptions(BaseModel):
    """The parameters that a client asked for. None means that the model's preset decides.

    ``tier`` chooses values of the model. ``kept_tier`` is only a name: that of the tier whose values are given here,
    for a video that is made again. ``kept_num_frames`` is the length of such a video: that of a film which is sent for
    it counts where it is less. No client gives these two, ``solver`` and ``timesteps``.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    negative_prompt: str | None = None
    size: str | None = None
    num_frames: int | None = None
    kept_num_frames: int | None = None
    seconds: float | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    strength: float | None = None
    seed: int | None = None
    tier: str | None = None
    kept_tier: str | None = None
    solver: str | None = None
    timesteps: tuple[float, ...] | None = None
    loras: tuple[LoraAsk, ...] | None = None
    output_format: str | None = None
    preview_every: int | None = None
    priority: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """The files that came with a request, as the client sent them or as they were stored for an earlier job.

    ``image`` is the first frame, ``last_frame`` the last one, ``continues`` the film to go on from, ``edits`` the film
    to edit; these two come alone. ``control_video`` are films that say frame by frame what is to be seen, in the order
    in which the model takes them, ``reference_images`` pictures of what is to be seen somewhere, ``conditioning``
    pictures of single frames with the number of each, from 0, and ``audio`` a sound.
    """

    image: bytes | None = None
    last_frame: bytes | None = None
    continues: bytes | None = None
    edits: bytes | None = None
    control_video: tuple[bytes, ...] = ()
    reference_images: tuple[bytes, ...] = ()
    conditioning: tuple[tuple[int, bytes], ...] = ()
    audio: bytes | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> frozenset[str]:
        """The places in which something was given; an empty file is something too."""
        return frozenset(one.name for one in fields(self) if getattr(self, one.name) not in (None, ()))

    @property
    def is_picture(self) -> bool:
        """Whether there are a first and a last frame alone, which are decoded in milliseconds."""
        return not self.names & _NEED_A_FILMS_TIME

    def over(self, older: Given) -> Given:
        """These files, and those of ``older`` in the places that are empty here."""
        given = self.names
        return Given(**{one.name: getattr(self if one.name in given else older, one.name) for one in fields(self)})


# Many pictures may take as long as a film.
_NEED_A_FILMS_TIME = {"continues", "edits", "control_video", "reference_images", "conditioning", "audio"}
NOTHING_GIVEN = Given()
