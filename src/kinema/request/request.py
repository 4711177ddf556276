"""A request that is complete: every value is there, and any worker at any attempt makes the same video from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from kinema.request.capabilities import Size

Priority = Literal["low", "normal", "high"]


class GenerationRequest(BaseModel):
    """A complete request.

    ``image_key`` names the first frame in storage, a PNG in the request's size. ``continues_key`` names an MP4 of that
    size whose last frame is the first one here: the finished video is both, one after the other, and
    ``continues_frames`` says how many frames the older one has. ``edits_key`` names an MP4 that is made anew under the
    prompt; ``strength`` in (0, 1] says how much of it may change. Three change nothing in the video: ``preview_every``
    is the number of steps from one preview to the next; ``priority`` and ``deadline_s``, seconds from the submission,
    say when it is wanted.
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
    flow_shift: float
    seed: int
    image_key: str | None = None
    continues_key: str | None = None
    continues_frames: int = 0
    edits_key: str | None = None
    strength: float | None = None
    preview_every: int | None = None
    priority: Priority = "normal"
    deadline_s: float | None = None

    @property
    def size(self) -> Size:
        return Size(width=self.width, height=self.height)

    @property
    def seconds(self) -> float:
        """Of the whole film: one that continues another has the frame between them once."""
        return (self.num_frames + max(self.continues_frames - 1, 0)) / self.fps

    @property
    def num_denoising_steps(self) -> int:
        """How many of the steps are taken: an edit begins in the middle, as in diffusers' WanVideoToVideoPipeline."""
        if self.strength is None:
            return self.num_inference_steps
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def num_passes(self) -> int:
        """How often the model runs in a step: classifier-free guidance takes two."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def kilotokens(self) -> float:
        """Thousands of tokens of 16x16 pixels and four frames. Models whose tokens are larger have as many times
        fewer at every size, so what was measured of one model goes by this as well as by its own."""
        num_latent_frames = (self.num_frames - 1) // 4 + 1
        return (self.width / 16) * (self.height / 16) * num_latent_frames / 1000

    @property
    def work(self) -> float:
        """How much there is to compute, in runs of the model over a thousand tokens: what times are predicted from.

        Attention grows with the square of the tokens; at 20,000 it costs as much as all else (13,600 for Wan 2.1 1.3B,
        29,200 for the 14B: (6 d + 2 f) / 2, with d its width and f that of its inner layer).
        """
        return self.num_denoising_steps * self.step_work + self.decoding_work

    @property
    def step_work(self) -> float:
        """The part of ``work`` that is one step."""
        return self.num_passes * self.kilotokens * (1 + self.kilotokens / 20)

    @property
    def decoding_work(self) -> float:
        """The part of ``work`` after the last step: decoding a token takes as long as about five passes over it, less
        for a large model, more for a large VAE.
        """
        return 5 * self.kilotokens
