"""What the numbers of a picture mean: by its profile, or by what a PNG says in chunks of its own.

A picture in another encoding than sRGB is converted by littlecms, through Pillow, or by ``colours.py``.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.PngImagePlugin import PngImageFile

from kinema.media.colours import SRGB_PRIMARIES, Encoding, to_srgb
from kinema.media.picture_boxes import main_property
from kinema.media.png_chunks import png_chunks

# Colours at the corners and the middles of the cube, by which a profile is compared with sRGB.
_SAMPLES = bytes(
    value for r in range(0, 256, 51) for g in range(0, 256, 51) for b in range(0, 256, 51) for value in (r, g, b)
)
_SRGB_GAMMA = 0.45455
# ITU-T H.273.
_UNSPECIFIED, _NARROW = 2, 0
_NCLX = ">4xHH"
_NO_COLOURS = "has a gamma or primaries that cannot be used; its colours were taken as sRGB"
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


@dataclass(frozen=True, slots=True)
class PictureColours:
    """How a picture becomes sRGB. ``space`` is the mode that the conversion takes; ``note`` is what there is to say."""

    space: str = "RGB"
    transform: ImageCms.ImageCmsTransform | None = None
    encoding: Encoding = Encoding()  # noqa: RUF009 - it is frozen
    note: str | None = None

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The opaque picture as sRGB."""
        if image.mode != self.space:  # converting copies
            image = image.convert(self.space)
        if self.transform is not None:
            return ImageCms.applyTransform(image, self.transform) or image
        if not self.encoding.is_srgb:
            return Image.fromarray(to_srgb(np.asarray(image, np.uint8), self.encoding))
        return image if image.mode == "RGB" else image.convert("RGB")


def colours_of(image: ImageFile.ImageFile, data: bytes) -> PictureColours:
    """The colours of a picture whose chunks or boxes were read. Of several statements the strongest counts: cICP, a
    profile, sRGB, gamma; W3C PNG, third edition, section 4.3."""
    codes = _codes(image, data)
    if codes is not None:
        encoding = Encoding.of_codes(*codes[:2])
        note = None
        if encoding.is_bright:
            note = "has a high dynamic range; it was tone-mapped to that of an ordinary screen"
        elif codes[2:] == (_NARROW,):
            note = "has numbers of a narrow range, which were taken for those of the full one"
        return PictureColours(encoding=encoding, note=note)
    if profile := image.info.get("icc_profile"):
        return _of_profile(profile, image.mode)
    if isinstance(image, PngImageFile) and "srgb" not in image.info:
        return _of_chunks(image)
    if image.mode == "CMYK":
        return PictureColours("CMYK", note="has ink colours without a profile, so its colours are a guess")
    return PictureColours()


def _of_profile(data: bytes, mode: str) -> PictureColours:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = _SPACES[profile.profile.xcolor_space]
        if int.from_bytes(data[:4], "big") > len(data):
            raise ValueError("its end is missing")
        if (space == "CMYK") != (mode == "CMYK") or (space == "L" and mode not in ("1", "L", "LA", "I", "I;16")):
            raise ValueError(space)
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
        if space == "RGB" and _is_srgb(transform):
            return PictureColours()
    except (ImageCms.PyCMSError, KeyError, ValueError, OSError, TypeError):
        return PictureColours("RGB", note="has a colour profile that cannot be used; its colours were taken as sRGB")
    return PictureColours(space, transform)


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    samples = Image.frombytes("RGB", (len(_SAMPLES) // 3, 1), _SAMPLES)
    there = ImageCms.applyTransform(samples, transform)
    return there is not None and np.abs(np.asarray(there, int) - np.asarray(samples, int)).max() <= 1


def _of_chunks(image: PngImageFile) -> PictureColours:
    """By gAMA and cHRM."""
    gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity")
    transfer: float = 13 if not gamma or abs(gamma - _SRGB_GAMMA) < 0.005 else 1 / gamma
    known = SRGB_PRIMARIES
    if primaries is not None:
        white, colours = primaries[:2], primaries[2:]
        given = (*colours, *white)
        if max(abs(one - other) for one, other in zip(given, SRGB_PRIMARIES, strict=True)) > 0.005:
            known = given
    encoding = Encoding(known, transfer if 0.1 <= transfer <= 13 else 13)
    try:
        with np.errstate(divide="raise", invalid="raise"):
            to_srgb(np.zeros((1, 1, 3), np.uint8), encoding)
    except (np.linalg.LinAlgError, FloatingPointError, ZeroDivisionError):
        return PictureColours(note=_NO_COLOURS)
    return PictureColours(encoding=encoding, note=None if encoding.transfer == transfer else _NO_COLOURS)


def _codes(image: ImageFile.ImageFile, data: bytes) -> tuple[int, ...] | None:
    """The codes of primaries and transfer, and of a PNG the range, by cICP of a PNG or nclx of an AVIF or HEIC."""
    if isinstance(image, PngImageFile):
        for kind, start, _ in png_chunks(data):
            if kind == b"cICP" and data[start : start + 2] != bytes([_UNSPECIFIED, _UNSPECIFIED]):
                return data[start], data[start + 1], data[start + 3]
            if kind == b"IDAT":
                break
        return None
    if image.info.get("icc_profile"):
        return None
    codes = _nclx(image, data)
    return None if codes == (_UNSPECIFIED, _UNSPECIFIED) else codes


def _nclx(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int] | None:
    """The codes in the box of an AVIF, or of a HEIC as its library gives them."""
    if given := image.info.get("nclx_profile"):
        return int(given["color_primaries"]), int(given["transfer_characteristics"])
    colours = main_property(data, b"colr") if image.format == "AVIF" else None
    if colours is None or not colours.startswith(b"nclx") or len(colours) < struct.calcsize(_NCLX):
        return None
    return struct.unpack_from(_NCLX, colours)
