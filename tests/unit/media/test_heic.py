"""HEIC pictures, as phones take them; pillow-heif writes those of the tests."""

from __future__ import annotations

import io
import sys

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps

import kinema.media
from kinema.errors import InvalidRequest
from kinema.media.images import open_image
from kinema.request.shapes import Size
from tests.unit.media.test_picture_colours import COLOURS, chunk, png, taken, wide_profile

# Large enough that no colour of a stripe reaches the middle of the next one.
STRIPES = COLOURS.repeat(32, axis=0).repeat(16, axis=1)
WHOLE = Size(width=64, height=32)
# Red, green and blue as they are: nothing is lost in the file.
EXACT = {"quality": -1, "chroma": 444, "matrix_coefficients": 0, "full_range_flag": 1}


def heic(picture: Image.Image | npt.NDArray[np.uint8], **options: object) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    pillow_heif.encode(image.mode, image.size, image.tobytes(), buffer, **options)
    return buffer.getvalue()


def notes(data: bytes) -> tuple[str, ...]:
    return open_image(data).notes


@pytest.mark.parametrize(("primaries", "transfer"), [(1, 13), (12, 13), (9, 16), (9, 18), (1, 8)])
def test_its_codes_count_as_those_of_a_png(primaries: int, transfer: int) -> None:
    """The same numbers with the same codes are the same colours, and the same is said."""
    of_heic = heic(STRIPES, color_primaries=primaries, transfer_characteristics=transfer, **EXACT)
    of_png = png(STRIPES, chunk(b"cICP", bytes([primaries, transfer, 0, 1])))
    assert np.array_equal(taken(of_heic, WHOLE), taken(of_png, WHOLE))
    assert notes(of_heic) == notes(of_png)


def test_its_profile_is_converted_to_srgb() -> None:
    """As Pillow's colour management does."""
    data = heic(STRIPES, icc_profile=wide_profile(), **EXACT)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(wide_profile()))
    shown = ImageCms.profileToProfile(Image.fromarray(STRIPES), profile, ImageCms.createProfile("sRGB"))
    assert np.array_equal(taken(data, WHOLE), np.asarray(shown))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_once(orientation: int) -> None:
    """By its boxes, though its EXIF says the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(STRIPES)
    picture.paste((0, 0, 0), (0, 0, 32, 8))  # no way to turn it is like another
    data = heic(picture, exif=exif.tobytes(), **EXACT)
    picture.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(picture)
    opened = open_image(data)
    assert (opened.size.width, opened.size.height) == upright.size
    assert np.array_equal(opened.fit(opened.size).pixels, np.asarray(upright))


def test_transparent_parts_are_white() -> None:
    """As those of a PNG."""
    clear = np.dstack([STRIPES, np.full((32, 64, 1), 255, np.uint8)])
    clear[16:, :, 3] = 0
    pixels = taken(heic(clear, **EXACT), WHOLE)
    assert pixels[16:].min() == 255
    assert np.array_equal(pixels[:16], STRIPES[:16])


def test_what_is_left_out_is_named() -> None:
    """A gain map, which is stored as transparency is, and further pictures."""
    clear = heic(np.dstack([STRIPES, np.full((32, 64, 1), 128, np.uint8)]))
    # A name as long as that of transparency, which ends like Apple's.
    changed = clear.replace(b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:xx:aux:hdrgainmap")
    assert notes(changed) == ("input_reference has a gain map for bright screens, which was left out",)
    several = pillow_heif.from_pillow(Image.fromarray(STRIPES))
    several.add_from_pillow(Image.fromarray(STRIPES[::-1]))
    buffer = io.BytesIO()
    several.save(buffer, primary_index=1, **EXACT)
    assert notes(buffer.getvalue()) == ("input_reference has more than one picture; the main one was taken",)
    assert np.array_equal(taken(buffer.getvalue(), WHOLE), STRIPES[::-1])


@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.9])
def test_a_damaged_one_is_refused(part: float) -> None:
    """In one sentence."""
    data = heic(STRIPES)
    with pytest.raises(InvalidRequest, match=r"^input_reference (cannot be read|is truncated or damaged); .* HEIC"):
        open_image(data[: int(part * len(data))]).fit(WHOLE)


def test_without_its_extra_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to install."""
    data = heic(STRIPES)
    monkeypatch.setattr(kinema.media, "heic", None, raising=False)
    monkeypatch.delitem(sys.modules, "kinema.media.heic", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InvalidRequest, match=r"is a HEIC picture, .* pip install 'kinema\[heic\]'; .* or GIF image"):
        open_image(data)
    monkeypatch.delitem(sys.modules, "kinema.media.heic")
