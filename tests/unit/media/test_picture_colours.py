"""Pictures are taken as their makers meant them, and what is left out is said."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from kinema.errors import InvalidRequest
from kinema.media.decoders import Decoders
from kinema.media.images import open_image
from kinema.request.shapes import Size
from kinema.settings import InputSettings
from tests.unit.media.test_images import PICTURE, PIXELS, SIZE, saved

COLOURS = np.array([[[38, 62, 156], [198, 44, 36], [255, 255, 60], [128, 128, 128]]], np.uint8)
SMALL = Size(width=4, height=1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def broken(whole: bytes) -> bytes:
    """The chunk with another checksum than its own."""
    return whole[:-1] + bytes([whole[-1] ^ 255])


def png(pixels: npt.NDArray[np.generic], *chunks: bytes) -> bytes:
    """A PNG of these numbers in 8 or 16 bits, with these chunks behind its header."""
    height, width, channels = pixels.shape
    depth = 8 * pixels.itemsize
    rows = pixels.astype(">u2" if depth == 16 else np.uint8)
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")])


def taken(data: bytes, size: Size = SMALL) -> npt.NDArray[np.int64]:
    return open_image(data).fit(size).pixels.astype(int)


def wide_profile() -> bytes:
    """A profile with the primaries of Adobe RGB and a gamma of 2.2, version 2."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.6097, 0.3111, 0.0195),
        b"gXYZ": xyz(0.2053, 0.6257, 0.0609),
        b"bXYZ": xyz(0.1492, 0.0632, 0.7446),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, at + len(body), len(tag))
        body += tag
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_profile_is_converted_to_srgb(kind: str) -> None:
    """As Pillow's colour management does."""
    picture = Image.fromarray(COLOURS.repeat(16, axis=0).repeat(16, axis=1))
    options: dict[str, object] = (
        {} if kind == "PNG" else {"quality": 100, **({"subsampling": 0} if kind == "JPEG" else {})}
    )
    data = saved(picture, kind, icc_profile=wide_profile(), **options)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(wide_profile()))
    shown = ImageCms.profileToProfile(Image.open(io.BytesIO(data)), profile, ImageCms.createProfile("sRGB"))
    assert shown is not None
    assert np.array_equal(taken(data, Size(width=64, height=16)), np.asarray(shown))
    assert np.abs(np.asarray(shown)[8, 24].astype(int) - COLOURS[0, 1]).max() > 10


def test_a_profile_of_srgb_and_a_damaged_one() -> None:
    """The numbers stay; the damaged one is named."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(taken(saved(PICTURE, "PNG", icc_profile=srgb), SIZE), PIXELS)
    opened = open_image(saved(PICTURE, "PNG", icc_profile=wide_profile()[:200]))
    assert opened.notes == ("input_reference has a colour profile that cannot be used; its colours were taken as sRGB",)
    assert np.array_equal(opened.fit(SIZE).pixels, PIXELS)


def test_a_profile_and_transparency() -> None:
    """What can be seen is converted, and the rest is white."""
    clear = np.dstack([COLOURS, np.array([[255, 255, 255, 0]], np.uint8)])
    opaque = taken(saved(Image.fromarray(COLOURS), "PNG", icc_profile=wide_profile()))
    both = taken(saved(Image.fromarray(clear), "PNG", icc_profile=wide_profile()))
    assert np.array_equal(both[0, :3], opaque[0, :3])
    assert both[0, 3].tolist() == [255, 255, 255]


def test_gamma_and_primaries_of_a_png() -> None:
    """A linear grey of a fifth is 124 in sRGB; the gamma of sRGB itself changes nothing, and sRGB counts for more."""
    grey = np.full((1, 4, 3), 51, np.uint8)
    linear, usual = chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"gAMA", struct.pack(">I", 45455))
    assert np.abs(taken(png(grey, linear)) - 124).max() <= 1
    assert np.array_equal(taken(png(COLOURS, usual)), COLOURS)
    assert np.array_equal(taken(png(COLOURS, chunk(b"sRGB", b"\0"), linear)), COLOURS)
    wide = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600))
    assert taken(png(np.array([[[200, 40, 40]] * 4], np.uint8), usual, wide))[0, 0, 0] > 220
    nonsense = png(COLOURS, usual, chunk(b"cHRM", bytes(32)))
    assert np.array_equal(taken(nonsense), COLOURS)
    assert open_image(nonsense).notes == (
        "input_reference has a gamma or primaries that cannot be used; its colours were taken as sRGB",
    )


LINEAR = chunk(b"gAMA", struct.pack(">I", 100_000))
PACKED = zlib.compress(wide_profile())
DAMAGED = [
    broken(LINEAR),
    *(chunk(b"gAMA", body) for body in (b"", bytes(2), bytes(4), LINEAR[8:12] + b"x")),
    *(chunk(b"cHRM", body) for body in (b"", bytes(31))),
    *(chunk(b"cICP", body) for body in (b"", b"\x09\x10", b"\x09\x10\x09\x01", b"\x09\x10\x00\x02")),
    broken(chunk(b"cICP", b"\x09\x10\x00\x01")),
    *(chunk(b"iCCP", body) for body in (b"", b"icc", b"icc\0\0no", b"icc\0\5" + PACKED, b"icc\0\0" + PACKED[:-9])),
    broken(chunk(b"iCCP", b"icc\0\0" + PACKED)),
    chunk(b"sRGB", b""),
    chunk(b"pHYs", b"\0"),
    chunk(b"tRNS", b"\0"),
    broken(chunk(b"tRNS", struct.pack(">3H", 128, 128, 128))),
    broken(chunk(b"eXIf", b"")),
    chunk(b"zTXt", b"Raw profile type exif\0\0no"),
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no"),
]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_chunk_of_a_png_is_left_out_and_named(damaged: bytes) -> None:
    """Before the pixels and behind them, as browsers do; what else is said counts."""
    whole = png(COLOURS)
    for data in (png(COLOURS, damaged), whole[:-12] + damaged + whole[-12:]):
        opened = open_image(data)
        name = damaged[4:8].decode()
        assert opened.notes == (f"input_reference has chunks that are damaged, which were left out: {name}",)
        assert np.array_equal(opened.fit(SMALL).pixels, COLOURS)
    if damaged[4:8] in (b"cICP", b"cHRM", b"iCCP"):
        assert np.array_equal(taken(png(COLOURS, damaged, LINEAR)), taken(png(COLOURS, LINEAR)))


@pytest.mark.parametrize("kind", [b"acTL", b"fcTL", b"zTXt", b"iTXt", b"tIME", b"prVt"])
def test_a_chunk_that_nobody_needs_is_not_looked_at(kind: bytes) -> None:
    """Whatever is in it."""
    opened = open_image(png(COLOURS, chunk(kind, b"x")))
    assert (opened.notes, opened.fit(SMALL).pixels.tolist()) == ((), COLOURS.tolist())


def test_codes_that_say_nothing_leave_the_word_to_other_chunks() -> None:
    """And a chunk before the header is no picture."""
    unknown = chunk(b"cICP", bytes([2, 2, 0, 1]))
    assert np.array_equal(taken(png(COLOURS, unknown, LINEAR)), taken(png(COLOURS, LINEAR)))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        open_image(png(COLOURS)[:8] + chunk(b"sRGB", b""))


def test_cicp_of_a_png_counts_most() -> None:
    """PQ is brought to an ordinary screen, and said; sRGB by its codes is as it is."""
    white = np.full((1, 4, 3), round(0.5807 * 65535), np.uint16)  # 203 nits
    opened = open_image(png(white, chunk(b"cICP", bytes([9, 16, 0, 1]))))
    assert opened.fit(SMALL).pixels.min() > 225
    assert opened.notes == (
        "input_reference has a high dynamic range; it was tone-mapped to that of an ordinary screen",
    )
    linear = chunk(b"gAMA", struct.pack(">I", 100_000))
    assert np.array_equal(taken(png(COLOURS, chunk(b"cICP", bytes([1, 13, 0, 1])), linear)), COLOURS)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_rounded(channels: int) -> None:
    """Every value to the nearest of 256."""
    deep = np.random.default_rng(2).integers(0, 65536, (31, 64, channels), dtype=np.uint16)
    deep[0, :4] = np.array([0, 128, 129, 65535])[:, None]
    if channels == 4:
        deep[..., 3] = 65535
    size = Size(width=64, height=31)
    expected = np.rint(deep[..., :3] / 257)
    assert np.array_equal(taken(png(deep), size), np.broadcast_to(expected, (31, 64, 3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_value_of_sixteen_bits_is_white(channels: int) -> None:
    """That value alone, and not its neighbour."""
    deep = np.array([[1000, 1001, 1000, 30000]], np.uint16)[..., None].repeat(channels, axis=-1)
    pixels = taken(png(deep, chunk(b"tRNS", struct.pack(f">{channels}H", *([1000] * channels)))))
    assert pixels[0, :, 0].tolist() == [255, 4, 255, 117]


def test_ink_without_a_profile_is_named() -> None:
    """Its colours are a guess."""
    assert open_image(saved(PICTURE.convert("CMYK"), "JPEG")).notes == (
        "input_reference has ink colours without a profile, so its colours are a guess",
    )


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "AVIF"])
def test_the_first_picture_of_an_animation_is_taken_and_that_is_said(kind: str) -> None:
    """Also through the process that decodes."""
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "lime")]
    data = saved(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=100)
    opened = open_image(data)
    assert opened.notes == ("input_reference is an animation; its first picture was taken",)
    assert np.abs(opened.fit(SIZE).pixels.astype(int) - [255, 0, 0]).max() < 6
    assert open_image(saved(pictures[0], kind)).notes == ()


def test_a_gain_map_and_further_pictures_are_named() -> None:
    """A sentence for each kind of file."""
    packet = b'<x xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"/>'
    jpeg = saved(PICTURE, "JPEG", xmp=packet)
    assert open_image(jpeg).notes == ("input_reference has a gain map for bright screens, which was left out",)
    several = saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    assert open_image(several).notes == ("input_reference has more than one picture; the first was taken",)


def test_the_notes_come_from_the_process_that_decodes(tmp_path: Path) -> None:
    """With the same pixels."""
    data = saved(Image.fromarray(COLOURS), "AVIF", icc_profile=wide_profile())
    decoders = Decoders(InputSettings())
    try:
        with decoders.for_picture() as decoder:
            opened = decoder.open_image(data)
            assert opened.notes == open_image(data).notes
            assert np.array_equal(opened.fit(SMALL).pixels, taken(data))
    finally:
        decoders.stop()
