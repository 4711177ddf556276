"""What a video was made from and by: everything that making it again takes.

It stands in the MP4 itself and, with what differs from run to run, in a file beside it. Nothing in it is a path or a
key, and whoever reads one from a file has a stranger's word: it is checked here for its form, and by ``resolve`` like
any request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from kinema import __version__
from kinema.errors import InvalidRequest
from kinema.events import Timings
from kinema.request.request import GenerationRequest

MEDIA_TYPE = "application/json"
_KIND = "kinema_manifest"
# Two prompts as long as any model takes, four bytes a character and escaped, leave room for the rest.
_MAX_CHARS = 1024 * 1024


def _one_line(text: str) -> str:
    """It may be shown in a terminal."""
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


Name = Annotated[str, StringConstraints(max_length=300), AfterValidator(_one_line)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Role = Literal["first_frame", "continues", "edits"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Recipe(_Part):
    """Of a complete request, what decides how the video looks."""

    model: Name
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
    strength: float | None = None
    seed: int

    @classmethod
    def of(cls, request: GenerationRequest) -> Self:
        return cls(**request.model_dump(include=set(cls.model_fields)))


class InputFile(_Part):
    """A file that came with the request, by the SHA-256 of its bytes.

    Of a first frame they are its pixels (h, w, 3) uint8 RGB in the video's size, so any file that gives them will do.
    """

    role: Role
    sha256: Digest
    size_bytes: int

    @classmethod
    def of(cls, role: Role, content: bytes | npt.NDArray[np.uint8]) -> Self:
        data = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
        size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
        return cls(role=role, sha256=hashlib.sha256(data).hexdigest(), size_bytes=size_bytes)


def input_files(**contents: bytes | npt.NDArray[np.uint8] | None) -> tuple[InputFile, ...]:
    """The files that are there, by their roles."""
    given = {role: content for role, content in contents.items() if content is not None}
    return tuple(InputFile.of(cast(Role, role), content) for role, content in given.items())


class EngineFacts(_Part):
    """What computes: the same facts give the same frames for the same request.

    ``weights`` is a digest of the model's files, empty where there are none. ``threads`` are those of a CPU, whose
    sums come out otherwise with another number; ``gpus`` are several, and ``parallel`` is how they share the work.
    ``versions`` are the engine's libraries, ``decode_dtype`` what latents are decoded in where that may be another
    type, ``linears`` what large layers multiply where that is less than ``dtype``, ``step_cache`` whether some steps
    are not computed.
    """

    engine: Name
    weights: Name
    dtype: Name
    decode_dtype: Name | None = None
    device: Name
    threads: int | None = None
    gpus: int | None = None
    parallel: Name | None = None
    attention: Name
    linears: Name | None = None
    step_cache: Literal[True] | None = None
    versions: Annotated[dict[Name, Name], Field(max_length=50)]


class Manifest(_Part):
    """What stands in the MP4; equal for two runs of one request on one machine.

    ``encoder`` are its libraries and options.
    """

    kinema_manifest: Literal[1] = 1
    kinema: Name
    request: Recipe
    inputs: Annotated[tuple[InputFile, ...], Field(max_length=3)] = ()
    made_by: EngineFacts
    encoder: Annotated[dict[Name, Name], Field(max_length=50)]

    @classmethod
    def of(
        cls, request: GenerationRequest, inputs: tuple[InputFile, ...], made_by: EngineFacts, encoder: dict[str, str]
    ) -> Self:
        return cls(kinema=__version__, request=Recipe.of(request), inputs=inputs, made_by=made_by, encoder=encoder)

    @property
    def tags(self) -> dict[str, str]:
        """The MP4's."""
        return {"comment": self.model_dump_json(exclude_none=True)}

    def differences(self, other: Manifest) -> list[str]:
        """What may make another video of the same request and inputs, as ``torch 2.9 (here 2.8)``."""
        there, here = dict(self._makers()), dict(other._makers())
        return [
            f"{name} {there.get(name, 'absent')} (here {here.get(name, 'absent')})"
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name)
        ]

    def _makers(self) -> Iterator[tuple[str, str]]:
        yield "model", self.request.model
        yield "kinema", self.kinema
        for name, value in self.made_by.model_dump(exclude={"versions"}, exclude_none=True).items():
            yield name, str(value)
        yield from self.made_by.versions.items()
        yield from self.encoder.items()


class VideoFile(_Part):
    """The MP4 by its bytes."""

    sha256: Digest
    size_bytes: int


class StoredManifest(Manifest):
    """What is stored beside the MP4: the same, and what is another in the next run. Times are seconds since the
    epoch.
    """

    id: str
    attempt: int
    made_at: float
    timings: Timings
    video: VideoFile


def read_tag(comment: str | None) -> Manifest:
    """The manifest in an MP4's comment. Raises InvalidRequest when there is none, or one that is not as ours are."""
    if comment is None or _KIND not in comment[:100]:
        raise InvalidRequest("has no manifest; videos that this version or a later one made have one")
    if len(comment) > _MAX_CHARS:
        raise InvalidRequest("has a manifest of more characters than one may have")
    try:
        return Manifest.model_validate_json(comment)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ascii(".".join(map(str, first["loc"])))[:100]
        raise InvalidRequest(f"has a broken manifest, or one of a newer version ({where}: {first['msg']})") from exc
