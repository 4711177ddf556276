"""How a model cuts a video into what it computes: tokens of a step, parts of a long video, turns of a decode.

An engine says it with the capabilities of its model. The work of a request is counted by it, and its time and memory
are predicted by it.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, PositiveInt

from kinema.request.shapes import Size


class Geometry(BaseModel):
    """The units of a model.

    A token is ``token_pixels`` of a picture in ``token_frames`` frames; for a network without tokens it is the
    smallest place that it computes. A model that makes a long video by parts denoises its first ``part_frames``, and
    ``part_step`` further ones in each other part; None is the whole video at once. An engine decodes the first frame
    alone, and then ``chunk_frames`` in each turn; None is the whole video in one turn.

    The defaults are how every video was counted before models stated it. They stand for what an older version stored
    or says.
    """

    model_config = ConfigDict(frozen=True)

    token_pixels: PositiveInt = 256
    token_frames: PositiveInt = 4
    part_frames: PositiveInt | None = None
    part_step: PositiveInt = 1
    chunk_frames: PositiveInt | None = 4

    def num_tokens(self, size: Size, num_frames: int) -> float:
        """The tokens of so many frames of this size. Frames that fill no token have one of their own."""
        return size.pixels / self.token_pixels * math.ceil(num_frames / self.token_frames)

    def num_parts(self, num_frames: int) -> int:
        """The number of parts that a video is denoised in."""
        if self.part_frames is None or num_frames <= self.part_frames:
            return 1
        return 1 + math.ceil((num_frames - self.part_frames) / self.part_step)

    def frames_at_once(self, num_frames: int) -> int:
        """The number of frames that are denoised together."""
        return num_frames if self.part_frames is None else min(num_frames, self.part_frames)

    def num_chunks(self, num_frames: int) -> int:
        """The number of turns that decode a video."""
        return 1 if self.chunk_frames is None else 1 + math.ceil((num_frames - 1) / self.chunk_frames)
