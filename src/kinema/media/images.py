"""Input images: from untrusted bytes to pixels of the right size.

The bytes decide the format, never a name or a declared type. The size is read from the header and checked before
anything is decoded, and the decoded image is made small before it is converted. So a small file cannot use much memory:
an image takes the memory of its own pixels once (WebP three times) and little more. Pillow's global settings are not
read or changed: the format classes are called directly, because ``Image.open`` warns through process-wide filters.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kinema.errors import InvalidRequest
from kinema.media.picture_boxes import head_of_boxes
from kinema.media.picture_colours import PictureColours, colours_of
from kinema.media.png_chunks import SIGNATURE, CleanPng, cleaned
from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]

# In base64 it still fits into the default limit of a request body, 32 MB.
MAX_BYTES = 20 * 1024 * 1024
# A 24-megapixel camera; decoded with alpha this is 100 MB.
MAX_PIXELS = 25_000_000
# The fields in which images come.
FIRST_FRAME, LAST_FRAME = "input_reference", "last_frame"
_KINDS, _KINDS_WITH_HEIC = "a PNG, JPEG, WebP, AVIF or GIF image", "a PNG, JPEG, WebP, AVIF, GIF or HEIC image"
_LIMITS = "of at most 20 MiB and 25 million pixels is accepted"
# A JPEG is decoded once for each of its scans. Cameras write one, programs ten, and some try sixty for the last byte.
_MAX_SCANS = 100
# The next marker of a JPEG that is not a part of the compressed pixels; ITU-T T.81, table B.1.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_SCAN, _END = 0xDA, 0xD9
_OPAQUE = 255
# Bits and kind in the header of a PNG: 16 for each of three colours, without and with transparency.
_DEEP_COLOURS = (b"\x10\x02", b"\x10\x06")
# What tells of a gain map: an item in the boxes of an AVIF or HEIC, and the names of Adobe, Apple and ISO 21496-1.
_GAIN_MAPS = (b"ns.adobe.com/hdr-gain-map", b"aux:hdrgainmap", b"iso:ts:21496")
_GAIN_MAP_ITEM = b"tmap"
_BOXED = ("AVIF", "HEIF")
_MAX_BRANDS = 4096
# Pixels that are converted at a time: 4 MB, and 4 MB more for each intermediate step.
_BAND_PIXELS = 2**20
# The operation that turns a stored image upright, by its EXIF orientation (TIFF 6.0, tag 274).
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class FittedImage:
    """Pixels (h, w, 3) uint8 RGB, and a sentence about the changes to the image, or None when there were none."""

    pixels: UInt8Array
    note: str | None


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image within the limits, by the name of its field.

    ``size`` is its size after EXIF rotation; the stored pixels may lie sideways. ``notes`` has a sentence for each
    thing that is left out, or changed at any size.
    """

    field: str
    stored: Image.Image
    orientation: int
    size: Size
    colours: PictureColours
    notes: tuple[str, ...]

    def fit(self, size: Size) -> FittedImage:
        """Scale the image until it covers ``size``, and crop the rest evenly on both sides.

        An image of exactly that size keeps its pixels bit for bit. Its colours become sRGB, and
        transparent parts white. Raises
        InvalidRequest when the image is not complete.
        """
        want = (size.height, size.width) if self.orientation in _SIDEWAYS else (size.width, size.height)
        if isinstance(self.stored, JpegImageFile):  # it is decoded at 1/2, 1/4 or 1/8 of its size
            self.stored.draft(None, (2 * want[0], 2 * want[1]))
        _load(self.stored, self.field)
        covering = _cover(self.stored, want, self.colours)
        turn = _TURNS.get(self.orientation)
        upright = covering if turn is None else covering.transpose(turn)
        return FittedImage(np.array(upright, dtype=np.uint8), fit_note(self.field, self.size, size))


def open_image(data: bytes, field: str = FIRST_FRAME) -> InputImage:
    """Read the header of the image that came in this field.

    The pixels are decoded when they are needed; those of a PNG, and of what may be transparent, at once.

    Raises InvalidRequest for anything but a PNG, JPEG, WebP, AVIF, GIF or, where its extra is installed, HEIC image
    within the limits. Whatever Pillow raises on hostile bytes, the client gets one sentence.
    """
    if len(data) > MAX_BYTES:
        raise refused(f"is {len(data)} bytes", field)
    if not data:
        raise refused("is empty", field)
    try:
        png = cleaned(data) if data.startswith(SIGNATURE) else None
        data = data if png is None else png.data
        stored = _open(data, field)
    except InvalidRequest:
        raise
    except Exception as exc:
        raise refused("cannot be read", field) from exc
    width, height = stored.size
    _check_pixels(width, height, field)
    if isinstance(stored, PngImageFile):
        _load(stored, field)  # its EXIF may come after the pixels
    colours = colours_of(stored, data)
    notes = tuple(f"{field} {said}" for said in (*_left_out(stored, data, png, field), colours.note) if said)
    orientation = _orientation(stored)
    if orientation in _SIDEWAYS:
        width, height = height, width
    pixels = _rounded(stored, data, field) if png and data[24:26] in _DEEP_COLOURS else stored
    return InputImage(field, pixels, orientation, Size(width=width, height=height), colours, notes)


def cover(pixels: UInt8Array, size: Size) -> UInt8Array:
    """Pixels (h, w, 3) uint8 RGB in that size, by the rule of ``fit``. Pixels of that size are returned unchanged."""
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    return np.array(_cover(Image.fromarray(pixels), (size.width, size.height), PictureColours()), dtype=np.uint8)


def fit_note(name: str, have: Size, want: Size) -> str | None:
    """A sentence about how fitting changes an input of that name, or None when it changes nothing."""
    if have == want:
        return None
    is_cropped = have.width * want.height != have.height * want.width
    return f"{name} {have} was {'scaled and cropped' if is_cropped else 'scaled'} to {want}"


def encode_png(pixels: UInt8Array) -> bytes:
    """The PNG file of pixels (h, w, 3) uint8 RGB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8Array:
    """The pixels (h, w, 3) uint8 RGB of a file from ``encode_png``. Raises InvalidRequest for a damaged file."""
    image = open_image(data)
    return image.fit(image.size).pixels


def _open(data: bytes, field: str) -> ImageFile.ImageFile:
    """Read the header. Only these decoders see the bytes."""
    file = io.BytesIO(data)
    if data.startswith(SIGNATURE):
        return PngImageFile(file)
    if data.startswith(b"\xff\xd8\xff"):
        _check_scans(data, field)
        return JpegImageFile(file)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        # libwebp reserves memory for the whole picture when it opens the file, so the header is read here first.
        _check_pixels(*_webp_size(data), field)
        return WebPImageFile(file)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return GifImageFile(file)
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), _MAX_BRANDS)]
        if b"avif" in brands or b"avis" in brands:
            return AvifImageFile(file)
        if b"hei" in brands or b"hev" in brands:
            return _open_heic(data, field)
    raise refused("is not an image of a known kind", field)


def _open_heic(data: bytes, field: str) -> ImageFile.ImageFile:
    from kinema.media.heic import IS_INSTALLED, open_heic  # noqa: PLC0415 - most pictures need no libheif

    if not IS_INSTALLED:
        raise refused("is a HEIC picture, which a server reads after pip install 'kinema[heic]'", field)
    return open_heic(data)


def _check_scans(data: bytes, field: str) -> None:
    at = num_scans = 0
    while (found := _MARKER.search(data, at)) is not None and found[1][0] != _END:
        num_scans += found[1][0] == _SCAN
        if num_scans > _MAX_SCANS:
            raise refused(f"has more than {_MAX_SCANS} scans", field)
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk; RFC 9649 sections 2.5 to 2.7."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_pixels(width: int, height: int, field: str) -> None:
    if width * height > MAX_PIXELS:
        raise refused(f"is {width}x{height}", field)


def _load(image: Image.Image, field: str) -> None:
    try:
        image.load()
    except Exception as exc:
        raise refused("is truncated or damaged", field) from exc


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the EXIF is damaged, so there is no rotation; the pixels are complete
        return 1


def _cover(image: Image.Image, want: tuple[int, int], colours: PictureColours) -> Image.Image:
    """The centre of the image with the shape of ``want``, scaled to that size, as RGB."""
    left, top, right, bottom = _cover_box(image.size, want)
    x, y = math.floor(left), math.floor(top)
    # Average whole pixels down to twice the size; a good filter does the rest.
    factor = max(1, int((right - left) / (2 * want[0])))
    small = _shrink(image, (x, y, math.ceil(right), math.ceil(bottom)), factor, colours)
    if small.size == want:
        return small
    box = ((left - x) / factor, (top - y) / factor, (right - x) / factor, (bottom - y) / factor)
    return small.resize(want, Image.Resampling.LANCZOS, box=box)


def _shrink(image: Image.Image, box: tuple[int, int, int, int], factor: int, colours: PictureColours) -> Image.Image:
    """The given part of the image as RGB, with its sides divided by ``factor``.

    It is converted in bands of rows, because each conversion makes a copy.
    """
    left, top, right, bottom = box
    small = Image.new("RGB", (math.ceil((right - left) / factor), math.ceil((bottom - top) / factor)))
    rows = factor * max(1, _BAND_PIXELS // ((right - left) * factor))
    for start in range(top, bottom, rows):
        band = image.crop((left, start, right, min(start + rows, bottom)))
        small.paste(_to_rgb(band, colours).reduce(factor), (0, (start - top) // factor))
    return small


def _to_rgb(image: Image.Image, colours: PictureColours) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow clips 16 bits to 255 instead of scaling them.
        deep = np.asarray(image, dtype=np.uint32)
        grey = Image.fromarray(((deep + 128) // 257).clip(0, 255).astype(np.uint8))
        if image.info.get("transparency") is not None:
            grey.putalpha(Image.fromarray(np.where(deep == image.info["transparency"], 0, 255).astype(np.uint8)))
        return _to_rgb(grey, colours)
    if not image.has_transparency_data:
        return colours.to_rgb(image)
    alpha = image.convert("RGBA")
    opaque = colours.to_rgb(image if image.mode == "LA" else alpha.convert("RGB"))
    opaque.putalpha(alpha.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")


def _rounded(high: ImageFile.ImageFile, data: bytes, field: str) -> Image.Image:
    """A PNG with 16 bits for each of its colours in 8 bits, rounded; Pillow reads the upper bytes alone.

    So it is read again for the lower ones. A value is 257 times its upper byte and the difference of the two.
    """
    low = PngImageFile(io.BytesIO(data))
    low.tile = [tile._replace(args=str(tile.args).replace("16B", "16L")) for tile in low.tile]
    _load(low, field)
    key = high.info.get("transparency")
    is_keyed = isinstance(key, tuple) and high.mode == "RGB"
    image = Image.new("RGBA" if is_keyed else high.mode, high.size)
    image.info |= {name: value for name, value in high.info.items() if name != "transparency"}
    rows = max(1, _BAND_PIXELS // high.width)
    for top in range(0, high.height, rows):
        box = (0, top, high.width, min(top + rows, high.height))
        upper, lower = (np.asarray(one.crop(box), np.int16) for one in (high, low))
        band = Image.fromarray((upper + (lower - upper + 128) // 257).clip(0, 255).astype(np.uint8))
        if is_keyed:
            is_clear = (upper.astype(np.int32) * 256 + lower == np.array(key)).all(axis=-1)
            band.putalpha(Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8)))
        image.paste(band, box)
    return image


def _left_out(image: ImageFile.ImageFile, data: bytes, png: CleanPng | None, field: str) -> Iterator[str]:
    """What a file has beside the picture that is taken, as the end of a sentence."""
    if png and png.damaged:
        yield f"has chunks that are damaged, which were left out: {', '.join(png.damaged)}"
    head = data if isinstance(image, JpegImageFile) else head_of_boxes(data) if image.format in _BOXED else b""
    if any(sign in head for sign in _GAIN_MAPS) or (image.format in _BOXED and _GAIN_MAP_ITEM in head):
        yield "has a gain map for bright screens, which was left out"
    elif "mp" in image.info:
        yield "has more than one picture; the first was taken"
    if image.info.get("depth_images"):
        yield "has a map of depths, which was left out"
    if image.format == "HEIF" and getattr(image, "is_animated", False):
        yield "has more than one picture; the main one was taken"
    elif getattr(image, "is_animated", False) or (png and png.is_animated):
        yield "is an animation; its first picture was taken"
    if _is_transparent(image, field):
        yield "is transparent; it was laid on white"


def _is_transparent(image: ImageFile.ImageFile, field: str) -> bool:
    """Whether a pixel is. Many files have such a channel, and many GIFs such a colour, for nothing: its pixels tell."""
    if not image.has_transparency_data:
        return False
    _load(image, field)
    if image.mode not in ("LA", "RGBA", "P"):  # one colour was given for it, which may have 16 bits
        return True
    least = (image.convert("RGBA") if image.mode == "P" else image).getchannel("A").getextrema()[0]
    return isinstance(least, (int, float)) and least < _OPAQUE


def _cover_box(have: tuple[int, int], want: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centre of ``have`` with the shape of ``want``, as (left, top, right, bottom)."""
    width, height = have
    if width * want[1] > height * want[0]:
        part = height * want[0] / want[1]
        return ((width - part) / 2, 0.0, (width + part) / 2, float(height))
    part = width * want[1] / want[0]
    return (0.0, (height - part) / 2, float(width), (height + part) / 2)


def refused(problem: str, field: str) -> InvalidRequest:
    """The error of an image that is not accepted; the problem follows the name of the field in which it came."""
    kinds = _KINDS_WITH_HEIC if find_spec("pillow_heif") else _KINDS
    return InvalidRequest(f"{field} {problem}; {kinds} {_LIMITS}", param=field)
