"""Input images: from bytes that nobody vouches for to pixels of the right size.

The bytes decide what they are, never a name or a declared type. Size is read from the header and checked before
anything is decoded, so a small file cannot claim a large memory. No global setting of Pillow is read or changed: the
format classes are called directly, because ``Image.open`` warns through the process-wide warning filters.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kinema.capabilities import Size
from kinema.errors import InvalidRequest

UInt8Array = npt.NDArray[np.uint8]

# In base64 it still fits the default cap on a request body, 32 MB.
MAX_BYTES = 20 * 1024 * 1024
# A 50-megapixel camera; decoded with alpha this is 200 MB.
MAX_PIXELS = 50_000_000
_ACCEPTED = "a PNG, JPEG or WebP image of at most 20 MiB and 50 million pixels is accepted"


@dataclass(frozen=True, slots=True)
class FittedImage:
    """Pixels (h, w, 3) uint8 RGB, and a sentence about what was done to the image; None when it fitted as it was."""

    pixels: UInt8Array
    note: str | None


def read_size(data: bytes) -> Size:
    """The size of the image as it is looked at, after its EXIF orientation.

    Decodes it as well, so an image that passes here is whole. Raises InvalidRequest for anything but a complete
    PNG, JPEG or WebP image within the caps.
    """
    image = _decode(data)
    return Size(width=image.width, height=image.height)


def fit(data: bytes, size: Size) -> FittedImage:
    """Scale the image until it covers ``size`` and crop what sticks out, evenly on both sides.

    An image of exactly that size keeps its pixels bit for bit. Transparency is laid on white. Raises as ``read_size``.
    """
    image = _to_rgb(_decode(data))
    if image.size == (size.width, size.height):
        return FittedImage(np.array(image, dtype=np.uint8), None)
    box = _cover_box(image.size, size)
    scaled = image.resize((size.width, size.height), Image.Resampling.LANCZOS, box=box)
    is_cropped = box != (0.0, 0.0, float(image.width), float(image.height))
    done = "scaled and cropped" if is_cropped else "scaled"
    note = f"input_reference {image.width}x{image.height} was {done} to {size}"
    return FittedImage(np.array(scaled, dtype=np.uint8), note)


def encode_png(pixels: UInt8Array) -> bytes:
    """Pixels (h, w, 3) uint8 RGB as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8Array:
    """Pixels (h, w, 3) uint8 RGB of what ``encode_png`` made. Raises InvalidRequest when it is not a whole image."""
    return np.array(_to_rgb(_decode(data)), dtype=np.uint8)


def _decode(data: bytes) -> Image.Image:
    """The decoded and upright image. Whatever Pillow raises on hostile bytes, the client gets one sentence."""
    if len(data) > MAX_BYTES:
        raise _refused(f"is {len(data)} bytes")
    if not data:
        raise _refused("is empty")
    try:
        image = _open(data)
    except InvalidRequest:
        raise
    except Exception as exc:
        raise _refused("cannot be read") from exc
    _check_pixels(image.width, image.height)
    try:
        image.load()
    except Exception as exc:
        raise _refused("is truncated or damaged") from exc
    return _upright(image)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read the header; only these three decoders ever see the bytes."""
    file = io.BytesIO(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(file)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(file)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        # libwebp reserves the canvas when it opens the file, so the header is read here first.
        _check_pixels(*_webp_size(data))
        return WebPImageFile(file)
    raise _refused("is not an image of a known kind")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk; RFC 9649 sections 2.5 to 2.7."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _refused(f"is {width}x{height}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about how the pixels are turned; they are whole
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow clips 16 bits to 255 instead of scaling them.
        deep = np.asarray(image, dtype=np.uint32)
        return Image.fromarray(((deep + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _cover_box(have: tuple[int, int], want: Size) -> tuple[float, float, float, float]:
    """The centred part of ``have`` that has the shape of ``want``, as (left, top, right, bottom)."""
    width, height = have
    if width * want.height > height * want.width:
        part = height * want.width / want.height
        return ((width - part) / 2, 0.0, (width + part) / 2, float(height))
    part = width * want.height / want.width
    return (0.0, (height - part) / 2, float(width), (height + part) / 2)


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"input_reference {problem}; {_ACCEPTED}", param="input_reference")
