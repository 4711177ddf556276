"""How a video was made: everything that is needed to make it again.

It is in the MP4 itself and, with the parts that differ from run to run, in a file beside it. Nothing in it is a path or
a key. A manifest from a file is untrusted: its form is checked here, and ``resolve`` checks its values like any
request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from kinema import __version__
from kinema.errors import InvalidRequest
from kinema.events import Timings
from kinema.request.fields import MAX_LORAS
from kinema.request.request import GenerationRequest

MEDIA_TYPE = "application/json"
_KIND = "kinema_manifest"
# Room for the two longest prompts, with four bytes a character and escaped, and for the rest.
_MAX_CHARS = 1024 * 1024


def _one_line(text: str) -> str:
    """Refuse text of more than one line: it may be shown in a terminal."""
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


Name = Annotated[str, StringConstraints(max_length=300), AfterValidator(_one_line)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Role = Literal["first_frame", "last_frame", "continues", "edits", "control_video", "reference_images", "conditioning"]
Content = bytes | npt.NDArray[np.uint8]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Lora(_Part):
    """A LoRA by its name, the digest of its file and its strengths."""

    name: Name
    digest: Digest
    scale: float
    scale_2: float | None = None


class Recipe(_Part):
    """The values of a complete request that decide how the video looks.

    ``solver`` is None for that in ``EngineFacts``. ``tier`` is a name; the values beside it are complete without it.
    """

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
    flow_shift: float | None = None
    tier: Name | None = None
    solver: Name | None = None
    timesteps: Annotated[tuple[float, ...], Field(max_length=1000)] | None = None
    strength: float | None = None
    # The frames that the pictures of conditioning are.
    conditioning_frames: Annotated[tuple[int, ...], Field(max_length=100)] | None = None
    seed: int
    # None for an MP4, so that its manifest is what it was before there were other kinds.
    output_format: Literal["webm", "gif"] | None = None
    # None where there are none, so that a manifest without them is what it was before there were any.
    loras: Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> Self:
        values = request.model_dump(include=set(cls.model_fields) - {"loras", "output_format", "conditioning_frames"})
        return cls(
            **values,
            output_format=None if request.output_format == "mp4" else request.output_format,
            conditioning_frames=request.conditioning_frames or None,
            loras=tuple(Lora(**use.model_dump()) for use in request.loras) or None,
        )


class InputFile(_Part):
    """A file that came with the request, by the SHA-256 of its bytes.

    For a first or last frame these are the bytes of its pixels (h, w, 3) uint8 RGB in the video's size, so any file
    with these pixels is the same input.
    """

    role: Role
    sha256: Digest
    size_bytes: int

    @classmethod
    def of(cls, role: Role, content: bytes | npt.NDArray[np.uint8]) -> Self:
        data = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
        size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
        return cls(role=role, sha256=hashlib.sha256(data).hexdigest(), size_bytes=size_bytes)


def input_files(**contents: Content | Sequence[Content] | None) -> tuple[InputFile, ...]:
    """The given files, by their roles; those of one role in their order."""
    found = []
    for role, content in contents.items():
        files = content if isinstance(content, tuple) else (content,)
        found += [InputFile.of(cast(Role, role), file) for file in files if file is not None]
    return tuple(found)


class EngineFacts(_Part):
    """The parts that compute: the same facts give the same frames for the same request.

    ``weights`` is a digest of the model's files, empty without files. ``threads`` is the number of CPU threads, which
    changes the order of sums. ``gpus`` is the number of GPUs when there are several, and ``parallel`` is how they share
    the work. ``versions`` are those of the engine's libraries. ``decode_dtype`` is the type for decoding where it may
    differ from ``dtype``. Where it is less than ``dtype``, ``linears`` is the type in which large layers multiply, and
    ``weights_dtype`` that in which they are kept. ``step_cache`` says whether some steps are not computed,
    ``vae_tiling`` whether the VAE decodes by tiles, and ``compiled`` whether torch compiled the blocks.
    ``solver`` is that of requests that name none.
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
    weights_dtype: Name | None = None
    step_cache: Literal[True] | None = None
    vae_tiling: Literal[True] | None = None
    compiled: Literal[True] | None = None
    solver: Name | None = None
    versions: Annotated[dict[Name, Name], Field(max_length=50)]


class Manifest(_Part):
    """The manifest in the MP4; it is equal for two runs of one request on one machine.

    ``encoder`` has the libraries and options of the encoder.
    """

    kinema_manifest: Literal[1] = 1
    kinema: Name
    request: Recipe
    inputs: Annotated[tuple[InputFile, ...], Field(max_length=32)] = ()
    made_by: EngineFacts
    encoder: Annotated[dict[Name, Name], Field(max_length=50)]

    @classmethod
    def of(
        cls, request: GenerationRequest, inputs: tuple[InputFile, ...], made_by: EngineFacts, encoder: dict[str, str]
    ) -> Self:
        return cls(kinema=__version__, request=Recipe.of(request), inputs=inputs, made_by=made_by, encoder=encoder)

    @property
    def tags(self) -> dict[str, str]:
        """The tags of the MP4."""
        return {"comment": self.model_dump_json(exclude_none=True)}

    def differences(self, other: Manifest) -> list[str]:
        """The differences that may change the video of the same request and inputs, as ``torch 2.9 (here 2.8)``."""
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
    """The bytes of the MP4, by digest and size."""

    sha256: Digest
    size_bytes: int


class StoredManifest(Manifest):
    """The manifest that is stored beside the MP4: the same, and the parts that differ in each run.

    Times are in seconds since the epoch.
    """

    id: str
    attempt: int
    made_at: float
    timings: Timings
    video: VideoFile


def read_tag(comment: str | None) -> Manifest:
    """The manifest in an MP4's comment. Raises InvalidRequest when there is none, or one of another form."""
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
