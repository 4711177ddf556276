"""A request that is complete: every value is there, and any worker at any attempt makes the same video from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from kinema.request.formats import OutputFormat
from kinema.request.geometry import Geometry
from kinema.request.shapes import Size

Priority = Literal["low", "normal", "high"]


class LoraUse(BaseModel):
    """A LoRA that a video is made with.

    ``digest`` says which file it is, whatever has its name by then. ``scale`` is its strength; where there are two
    experts, that for the low-noise one is ``scale_2`` unless it is None.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    scale: float
    scale_2: float | None = None


class GenerationRequest(BaseModel):
    """A complete request.

    ``image_key`` and ``last_frame_key`` name the first and the last frame in storage: PNGs in the request's size.
    ``continues_key`` names the film that an extension goes on from: the finished video is that film and the new frames,
    whose first is the film's last. ``continues_frames`` is the number of frames of that film. ``edits_key`` names the
    film that an edit begins with, and ``strength``, in (0, 1], says how much of it may change.
    ``control_video_keys``, ``reference_image_keys`` and ``conditioning_keys`` name the files of those inputs, films as
    they were sent and PNGs; ``conditioning_frames`` are the numbers of the frames that the last ones are.

    ``solver`` is None for the model's own. ``timesteps``, one for each step, fall from at most the model's number of
    training steps to more than 0; ``flow_shift`` moves them, where the model has one. None is even steps. ``tier`` is
    the name of the tier that these values came from; it decides nothing. ``output_format`` is the kind of file that the
    video is stored as. ``geometry`` is the model's: how its work is counted.

    Three fields change nothing in the video: ``preview_every`` is the number of steps from one preview to the next;
    ``priority`` and ``deadline_s`` (seconds from the submission) say when the video is wanted.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    tier: str | None = None
    solver: str | None = None
    timesteps: tuple[float, ...] | None = None
    seed: int
    image_key: str | None = None
    last_frame_key: str | None = None
    continues_key: str | None = None
    continues_frames: int = 0
    edits_key: str | None = None
    strength: float | None = None
    control_video_keys: tuple[str, ...] = ()
    reference_image_keys: tuple[str, ...] = ()
    conditioning_keys: tuple[str, ...] = ()
    conditioning_frames: tuple[int, ...] = ()
    loras: tuple[LoraUse, ...] = ()
    output_format: OutputFormat = "mp4"
    preview_every: int | None = None
    priority: Priority = "normal"
    deadline_s: float | None = None
    geometry: Geometry = Geometry()

    @property
    def input_keys(self) -> tuple[str, ...]:
        """The keys of all inputs."""
        keys = (self.image_key, self.last_frame_key, self.continues_key, self.edits_key)
        others = (*self.control_video_keys, *self.reference_image_keys, *self.conditioning_keys)
        return (*(key for key in keys if key is not None), *others)

    def with_keys(self, keys: Iterable[tuple[str, str]]) -> Self:
        """The same with the keys of its inputs, each beside the name of its field; those of a field in their order."""
        found: dict[str, str | tuple[str, ...]] = {}
        for field, key in keys:
            is_list = isinstance(getattr(self, field), tuple)
            found[field] = (*found.get(field, ()), key) if is_list else key
        return self.model_copy(update=found)

    @property
    def size(self) -> Size:
        return Size(width=self.width, height=self.height)

    @property
    def seconds(self) -> float:
        """The length of the finished film. An extension has the frame that joins both parts once."""
        return (self.num_frames + max(self.continues_frames - 1, 0)) / self.fps

    @property
    def num_denoising_steps(self) -> int:
        """The number of steps that are taken, for all parts of the video. An edit takes the last ones of each, as
        diffusers' WanVideoToVideoPipeline does.
        """
        steps = self.num_inference_steps
        taken = steps if self.strength is None else min(int(steps * self.strength), steps)
        return taken * self.geometry.num_parts(self.num_frames)

    @property
    def num_passes(self) -> int:
        """How often the model runs in one step: twice with classifier-free guidance, else once."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def work(self) -> float:
        """The amount of computing, in runs of the model over a thousand of its tokens. Times are predicted from it.

        Attention grows with the square of the tokens. At 20,000 tokens it is taken to cost as much as everything else:
        the number is (6 d + 2 f) / 2 for a model of width d with a feed-forward layer of width f, so 13,600 for one of
        1.3 billion parameters (Wan 2.1) and 29,200 for one of 14.
        """
        return self.num_denoising_steps * self.step_work + self.decoding_work

    @property
    def step_work(self) -> float:
        """The part of ``work`` that is one step."""
        thousands = self.geometry.num_tokens(self.size, self.geometry.frames_at_once(self.num_frames)) / 1000
        return self.num_passes * thousands * (1 + thousands / 20)

    @property
    def decoding_work(self) -> float:
        """The part of ``work`` after the last step.

        To decode a token takes about as long as five runs of the model over it: less for a large model, more for a
        large VAE.
        """
        return 5 * self.geometry.num_tokens(self.size, self.num_frames) / 1000
