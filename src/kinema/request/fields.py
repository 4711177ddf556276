"""The types of a request's fields. They are strict about the value and accept several ways to write it.

A number may come as text, since multipart has nothing else, and an empty text stands for an absent number. A number
that is not finite becomes one that is outside of every range, so that the answer names the range.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from kinema.errors import InvalidRequest
from kinema.ids import JobId
from kinema.request.json_text import check_text, parse_json
from kinema.request.options import LoraAsk

ReadT = TypeVar("ReadT")

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d{1,40}", re.ASCII)
# As clients read it; the bytes decide, and media/images.py has what this server reads.
PICTURE_KINDS = "PNG, JPEG, WebP, AVIF, GIF, or HEIC where the server reads it"
# Above every limit there is.
_TOO_LARGE = 10**40
_SPACE = b" \t\r\n"
# RFC 4648, section 5: the alphabet for URLs and file names.
_STANDARD = bytes.maketrans(b"-_", b"+/")
# A multiple of four characters, which are decoded in two milliseconds.
_SLICE_BYTES = 2**20
# The longest text that is read as a number or a flag: all digits of the longest float, and more.
_MAX_SHORT_CHARS = 400
# Entries of a list; no list of ours has a use for more.
_MAX_ENTRIES = 100
# The words for a flag, in bodies and in queries; the last ones are those of a checkbox.
TRUTHS = {"true": True, "1": True, "false": False, "0": False, "on": True, "off": False}
FILM_FORMS = 'send a file part in multipart/form-data, or the id of a video as {"id": "video_..."}'
# Each takes memory beside the model, and time in each step.
MAX_LORAS = 4
_LORA_FORMS = 'for instance ["NAME"] or [{"name": "NAME", "scale": 0.8}]'
_IMAGE_FORMS = 'send a data: URL, base64, {"image_url": "data:..."}, or a file part in multipart/form-data'


# A model has one or two films of control, a few pictures of what is to be seen, and frames to lead through.
_MAX_FILMS, _MAX_REFERENCES, _MAX_CONDITIONING = 4, 8, 16
_MAX_FRAME_DIGITS = 6
_CONDITIONING_FORMS = (
    'send {"0": "data:...", "40": "data:..."}, or file parts conditioning[0], conditioning[40] in multipart/form-data'
)


def _number(value: object) -> int | float | None:
    if value is None or (isinstance(value, str) and len(value) <= _MAX_SHORT_CHARS and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong("must be a number")
    if not isinstance(value, str):
        return value
    text = value.strip() if len(value) <= _MAX_SHORT_CHARS else ""
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return float(text)
    raise _wrong(f"must be a number, not {value.strip()[:40]!r}")


def _whole(value: object) -> int | None:
    number = _number(value)
    if number is None or isinstance(number, int):
        return number
    if not math.isfinite(number):
        return _TOO_LARGE
    if not number.is_integer():
        raise _wrong(f"must be a whole number, not {number:g}")
    return int(number)


def _real(value: object) -> float | None:
    number = _number(value)
    return None if number is None else float(number)


def _flag(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= _MAX_SHORT_CHARS and (not value or value.strip().lower() in TRUTHS):
        return TRUTHS[value.strip().lower()] if value else None
    raise _wrong("must be true or false")


def _text(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong("must be text")
    try:
        return check_text("the text", value)
    except InvalidRequest as exc:
        raise _wrong(f"cannot be used: {exc.message}") from exc


def _choice(value: object) -> str | None:
    text = _text(value)
    return text if text is None or text.strip() else None


def _json_text(value: object) -> object:
    """Return an object, which multipart carries as JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value, "the text")
        except InvalidRequest as exc:
            raise _wrong(f"must be an object: {exc.message}") from exc
    if value is not None and not isinstance(value, dict):
        raise _wrong('must be an object, for instance {"fps": 16}')
    return value


def _loras(value: object) -> object:
    """Return a list of objects: of one name, a list of names and objects, or the JSON text of any of these."""
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _loras_of_json(value) if value.lstrip().startswith(("[", "{")) else value
    listed = value if isinstance(value, list) or value is None else [value]
    if listed is not None and len(listed) > MAX_LORAS:
        raise _wrong(f"has {len(listed):,} entries; at most {MAX_LORAS} are used together")
    return None if listed is None else [_lora(one) for one in listed]


def _lora(value: object) -> dict[str, Any]:
    if isinstance(value, str):
        value = _loras_of_json(value) if value.lstrip().startswith("{") else {"name": value}
    if not isinstance(value, dict):
        raise _wrong(f"must be names or objects; {_LORA_FORMS}")
    return value


def _loras_of_json(text: str) -> object:
    try:
        return parse_json(text, "the text")
    except InvalidRequest as exc:
        raise _wrong(f"cannot be read: {exc.message}; {_LORA_FORMS}") from exc


def _image(value: object) -> bytes | None:
    if isinstance(value, bytes) and value[:5].lower() == b"data:":
        value = value.decode("latin-1")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        return _image(_image_url(value))
    if not isinstance(value, str):
        raise _wrong(f"must be an image; {_IMAGE_FORMS}")
    value = value.strip()
    if value.startswith("{"):
        return _image(_json_text(value))
    if value[:6].lower().startswith(("http:", "https:")):
        raise _wrong(f"is not fetched from other servers; {_IMAGE_FORMS}")
    return _from_base64(_payload(value))


def _pictures(value: object) -> tuple[bytes, ...] | None:
    """Return the first frame; of a list of two, the first and the last frame."""
    value = _listed(value)
    if not isinstance(value, list):
        picture = _image(value)
        return None if picture is None else (picture,)
    if len(value) not in (1, 2):
        raise _wrong(f"has {len(value):,} pictures; one is the first frame, a second one the last frame")
    pictures = tuple(picture for one in value if (picture := _image(one)) is not None)
    if len(pictures) != len(value):
        raise _wrong(f"must have an image in each place of the list; {_IMAGE_FORMS}")
    return pictures


def _listed(value: object) -> object:
    """Return a list, of which a form may have the JSON text, or the value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value, "the text")
    except InvalidRequest as exc:
        raise _wrong(f"cannot be read: {exc.message}") from exc


def _image_url(value: dict[str, Any]) -> object:
    if set(value) != {"image_url"} or value["image_url"] is None:
        raise _wrong(f"must have image_url and nothing else; {_IMAGE_FORMS}")
    url = value["image_url"]
    if isinstance(url, dict):  # as in OpenAI's chat; detail is for models that look at pictures
        url = url.get("url") if set(url) <= {"url", "detail"} else None
    if not isinstance(url, str):
        raise _wrong(f"must have a text in image_url, or an object with url; {_IMAGE_FORMS}")
    return url


def _payload(text: str) -> str:
    """Return what follows the comma of a data: URL (RFC 2397), or the whole text."""
    if text[:5].lower() != "data:":
        return text
    head, comma, payload = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _wrong("is a data: URL without base64; 'data:image/png;base64,...' is accepted")
    return unquote(payload) if "%" in payload else payload


def _from_base64(text: str) -> bytes:
    try:
        packed = text.encode("ascii").translate(_STANDARD, _SPACE)
        if b"=" in packed[:-2]:
            raise ValueError("padding in the middle")
        packed += b"=" * (-len(packed) % 4)
        # In slices, between which other threads get the interpreter.
        slices = (packed[start : start + _SLICE_BYTES] for start in range(0, len(packed), _SLICE_BYTES))
        return b"".join(base64.b64decode(some, validate=True) for some in slices)
    except ValueError as exc:  # binascii's own errors are ValueErrors
        raise _wrong(f"is not valid base64; {_IMAGE_FORMS}") from exc


def _film(value: object) -> bytes | JobId | None:
    """Return the bytes of a file, or the id of a video of this server."""
    if isinstance(value, list):
        raise _wrong(f"must be one film; {FILM_FORMS}")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _json_text(value)
    if isinstance(value, dict) and set(value) == {"id"} and isinstance(value["id"], str):
        value = value["id"]
    if isinstance(value, str) and value[:6].lower().startswith(("http:", "https:")):
        raise _wrong(f"is not fetched from other servers; {FILM_FORMS}")
    if isinstance(value, str) and not value[:5].lower().startswith("data:"):
        return JobId(value)
    raise _wrong(f"must be a film; {FILM_FORMS}")


def _films(value: object) -> tuple[bytes | JobId, ...] | None:
    """Return the films of a list, or of one, or of the JSON text of these."""
    return _each(value, _film, f"film; {FILM_FORMS}", _MAX_FILMS)


def _reference_images(value: object) -> tuple[bytes, ...] | None:
    return _each(value, _image, f"picture; {_IMAGE_FORMS}", _MAX_REFERENCES)


def _each(value: object, read: Callable[[object], ReadT | None], what: str, most: int) -> tuple[ReadT, ...] | None:
    """Read each entry of a list, or what stands alone; None when there is nothing."""
    value = _listed(value)
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    if len(listed) > most:
        raise _wrong(f"has {len(listed):,} entries; at most {most} are taken")
    found = tuple(entry for one in listed if (entry := read(one)) is not None)
    if len(found) != len(listed):
        raise _wrong(f"must have in each place of the list a {what}")
    return found or None


def _conditioning(value: object) -> tuple[tuple[int, bytes], ...] | None:
    """Return pictures with their frames, in the order of these."""
    if isinstance(value, str):
        value = _json_text(value) if value.strip() else None
    if value is None or value == {}:
        return None
    if not isinstance(value, dict) or not all(isinstance(frame, str) for frame in value):
        raise _wrong(f"must be pictures by the numbers of their frames; {_CONDITIONING_FORMS}")
    if len(value) > _MAX_CONDITIONING:
        raise _wrong(f"has {len(value):,} pictures; at most {_MAX_CONDITIONING} are taken")
    found: dict[int, bytes] = {}
    for frame, picture in value.items():
        data = _image(picture)
        if data is None or not (frame.isascii() and frame.isdigit() and len(frame) <= _MAX_FRAME_DIGITS):
            raise _wrong(f"has no picture of a frame in {frame[:40]!r}; {_CONDITIONING_FORMS}")
        if int(frame) in found:
            raise _wrong(f"has the frame {int(frame)} more than once")
        found[int(frame)] = data
    return tuple(sorted(found.items()))


def _audio(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    raise _wrong("must be a file part in multipart/form-data")


def _entries(value: object) -> object:
    """Count a list before its entries are looked at, each of which may be wrong."""
    if isinstance(value, list) and len(value) > _MAX_ENTRIES:
        raise _wrong(f"has {len(value):,} entries; at most {_MAX_ENTRIES} are read")
    return value


def _wrong(what: str) -> PydanticCustomError:
    """Return an error for pydantic. The client reads the name of the field and then ``what``."""
    return PydanticCustomError("field", "{what}", {"what": what})


Whole = Annotated[int | None, BeforeValidator(_whole, json_schema_input_type=int | str | None)]
Real = Annotated[float | None, BeforeValidator(_real, json_schema_input_type=float | str | None)]
Flag = Annotated[bool | None, BeforeValidator(_flag, json_schema_input_type=bool | str | None)]
Text = Annotated[str | None, BeforeValidator(_text)]
# A name or a word, of which there is no empty one: then it is absent, as a number is.
Choice = Annotated[str | None, BeforeValidator(_choice)]
Texts = Annotated[list[str] | None, BeforeValidator(_entries, json_schema_input_type=list[str] | None)]
JsonText = BeforeValidator(_json_text)
Name = Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_text, json_schema_input_type=str)]


class LoraField(LoraAsk):
    """A LoRA, by its name in `/v1/models`."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    scale: Real = Field(None, description="Its strength, from -10 to 10; by default its own.")
    scale_2: Real = Field(None, description="The same for the low-noise expert of a model with two; by default scale.")
    digest: Text = Field(None, description="Refuse the request unless it is this file.")


Loras = Annotated[
    tuple[LoraField, ...] | None,
    BeforeValidator(_loras, json_schema_input_type=list[LoraField | str] | LoraField | str | None),
    Field(description="Up to four LoRAs of the model: names, or objects with a strength."),
]
_PICTURE_SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "description": "data: URL or base64; in multipart also a file part"},
    {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
]
_LIST_SCHEMA = {"type": "array", "items": {"anyOf": _PICTURE_SCHEMAS}, "minItems": 1, "maxItems": 2}
Pictures = Annotated[
    tuple[bytes, ...] | None,
    BeforeValidator(_pictures),
    WithJsonSchema({"anyOf": [*_PICTURE_SCHEMAS, _LIST_SCHEMA, {"type": "null"}]}),
    Field(
        description=f"First frame ({PICTURE_KINDS}): makes it image-to-video. The second picture of a list is the "
        "last frame."
    ),
]
Picture = Annotated[
    bytes | None,
    BeforeValidator(_image),
    WithJsonSchema({"anyOf": [*_PICTURE_SCHEMAS, {"type": "null"}]}),
]
_FILM_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    {"type": "string", "format": "binary"},
]
Film = Annotated[
    bytes | JobId | None,
    BeforeValidator(_film),
    WithJsonSchema({"anyOf": _FILM_SCHEMAS}),
    Field(description="The video to go on from: the id of a finished one, or an MP4, MOV or WebM file."),
]
Films = Annotated[
    tuple[bytes | JobId, ...] | None,
    BeforeValidator(_films),
    WithJsonSchema(
        {"anyOf": [*_FILM_SCHEMAS, {"type": "array", "items": {"anyOf": _FILM_SCHEMAS}, "maxItems": _MAX_FILMS}]}
    ),
    Field(
        description="The films that say frame by frame what is to be seen, for instance edges, depths or poses: ids of "
        "finished videos, or MP4, MOV or WebM files, in the order that the model's `control_videos` names."
    ),
]
References = Annotated[
    tuple[bytes, ...] | None,
    BeforeValidator(_reference_images),
    WithJsonSchema(
        {
            "anyOf": [
                *_PICTURE_SCHEMAS,
                {"type": "array", "items": {"anyOf": _PICTURE_SCHEMAS}, "maxItems": _MAX_REFERENCES},
            ]
        }
    ),
    Field(description=f"Pictures ({PICTURE_KINDS}) of what is to be seen in the video, for a model that takes them."),
]
Conditioning = Annotated[
    tuple[tuple[int, bytes], ...] | None,
    BeforeValidator(_conditioning),
    WithJsonSchema({"type": "object", "additionalProperties": {"anyOf": _PICTURE_SCHEMAS}}),
    Field(
        description=f"Pictures ({PICTURE_KINDS}) of single frames, by their numbers from 0, for a model that takes "
        "them."
    ),
]
Audio = Annotated[
    bytes | None,
    BeforeValidator(_audio),
    WithJsonSchema({"type": "string", "format": "binary"}),
    Field(description="A sound that the video follows, for a model that takes it; no model of this version does."),
]
