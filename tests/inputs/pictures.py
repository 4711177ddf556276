"""Pictures: what each says of itself, and what is to become of it.

All show the same four stripes with a mark at their upper left, so no way to turn one is like another.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from tests.hostile import films as hostile
from tests.inputs.gain_maps import with_gain_map
from tests.integration.test_film_showing import STRIPES
from tests.unit.media.test_heic import EXACT, heic
from tests.unit.media.test_images import saved
from tests.unit.media.test_picture_colours import broken, chunk, png

UInt8Array = npt.NDArray[np.uint8]
PLAIN = Image.fromarray(STRIPES)
# The light of red, green and blue in the space of profiles, whose white is D50; by lindbloom.com.
_ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_BRIGHT = "input_reference has a high dynamic range; it was tone-mapped to that of an ordinary screen"
_GAIN_MAP = "input_reference has a gain map for bright screens, which was left out"
_DAMAGED = "input_reference has chunks that are damaged, which were left out: "
_CLEAR = "input_reference is transparent; it was laid on white"
_ANIMATION = "input_reference is an animation; its first picture was taken"


@dataclass
class Picture:
    """``profile`` is the one by which colour management shows its numbers, where the file has another way to say so.
    ``says`` are the warnings, or a part of the sentence that refuses it. ``is_shown`` is false where the colour
    management of Pillow does not know what to show."""

    make: Callable[[], bytes]
    size: tuple[int, int] = (64, 48)
    says: tuple[str, ...] = ()
    profile: bytes | None = None
    is_refused: bool = False
    is_shown: bool = True

    @cached_property
    def data(self) -> bytes:
        return self.make()


def profile(primaries: tuple[tuple[float, ...], ...] = _ADOBE_RGB, gamma: float | None = 2.2) -> bytes:
    """A profile of version 2 with three primaries, or a grey one without; no gamma is the curve of sRGB."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))

    numbers = np.linspace(0, 1, 1024)
    light = np.where(numbers <= 0.04045, numbers / 12.92, ((numbers + 0.055) / 1.055) ** 2.4)
    table = np.rint(65535 * (light if gamma is None else numbers**gamma)).astype(">u2")
    curve = b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    tags |= {name + b"XYZ": xyz(*values) for name, values in zip((b"r", b"g", b"b"), primaries, strict=False)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",), curve)
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    at, entries, body = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        entries += struct.pack(">4sII", name, at + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "HEIF":
        return heic(PLAIN, exif=exif.tobytes(), **EXACT)
    return saved(PLAIN, kind, exif=exif, quality=100)


def clear() -> Image.Image:
    """The right half is transparent, and a quarter half so."""
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:, 32:48], alpha[:, 48:] = 128, 0
    return Image.fromarray(np.dstack([STRIPES, alpha]))


def moving(kind: str) -> bytes:
    others = [ImageOps.mirror(PLAIN), ImageOps.flip(PLAIN)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return saved(PLAIN, kind, save_all=True, append_images=others, duration=100, quality=100, **lossless)


def heic_with_gain_map() -> bytes:
    data = heic(Image.merge("RGBA", [*PLAIN.split(), Image.new("L", PLAIN.size, 255)]), **EXACT)
    return data.replace(b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:xx:aux:hdrgainmap")


def with_iso_gain_map(kind: str) -> bytes:
    """The colours of its bright version, which is left out, stand before those of the picture."""
    both = PLAIN, PLAIN.convert("L").convert("RGB")
    parts = [
        heic(one, **EXACT) if kind == "HEIF" else saved(one, kind, quality=100, subsampling="4:4:4") for one in both
    ]
    return with_gain_map(*parts, is_bright_first=True)


def jpeg(**options: object) -> bytes:
    return saved(PLAIN, "JPEG", quality=100, subsampling=0, **options)


def deep(*chunks: bytes) -> bytes:
    """16 bits for each number; each is a little above the middle between two of 8 bits."""
    return png(STRIPES.astype(np.uint16) * 257, *chunks)


def cicp(primaries: int, transfer: int) -> bytes:
    return png(STRIPES, chunk(b"cICP", bytes([primaries, transfer, 0, 1])))


def shown_by_pillow(picture: Picture) -> UInt8Array:
    """What Pillow shows with its colour management, upright and on white."""
    image = Image.open(io.BytesIO(picture.data))
    given = picture.profile or image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in ("RGB", "L", "CMYK"):
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    if given is None:
        return np.asarray(upright.convert("RGB"))
    source = ImageCms.ImageCmsProfile(io.BytesIO(given))
    return np.asarray(ImageCms.profileToProfile(upright, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


_P3_PROFILE, _ADOBE_GAMMA = profile(_DISPLAY_P3, None), chunk(b"gAMA", struct.pack(">I", 45455))
_GAMMA_1 = chunk(b"gAMA", struct.pack(">I", 100000))
_ADOBE_CHUNKS = (
    chunk(b"gAMA", struct.pack(">I", 45455 + 1000)),
    chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)),
)

PICTURES: dict[str, Picture] = {
    # What the numbers mean.
    "PNG": Picture(lambda: saved(PLAIN, "PNG")),
    "PNG, Adobe RGB": Picture(lambda: saved(PLAIN, "PNG", icc_profile=profile())),
    "JPEG, Adobe RGB": Picture(lambda: jpeg(icc_profile=profile())),
    "WebP, Display P3": Picture(lambda: saved(PLAIN, "WEBP", lossless=True, icc_profile=_P3_PROFILE)),
    "AVIF, Display P3": Picture(lambda: saved(PLAIN, "AVIF", quality=100, icc_profile=_P3_PROFILE)),
    "HEIC, Display P3 by a profile": Picture(
        lambda: heic(PLAIN, icc_profile=_P3_PROFILE, **EXACT), profile=_P3_PROFILE
    ),
    "HEIC, Display P3 by codes": Picture(
        lambda: heic(PLAIN, color_primaries=12, transfer_characteristics=13, **EXACT), profile=_P3_PROFILE
    ),
    "PNG, Display P3 by codes": Picture(lambda: cicp(12, 13), profile=_P3_PROFILE),
    "grey with a profile": Picture(lambda: saved(PLAIN.convert("L"), "PNG", icc_profile=profile((), 1.8))),
    "PNG, gamma 1": Picture(lambda: png(STRIPES, _GAMMA_1), profile=profile(_SRGB, 1.0)),
    "PNG, Adobe RGB by chunks": Picture(lambda: png(STRIPES, *_ADOBE_CHUNKS), profile=profile(gamma=100000 / 46455)),
    "PNG, PQ": Picture(lambda: cicp(9, 16), says=(_BRIGHT,), is_shown=False),
    "PNG, HLG": Picture(lambda: cicp(9, 18), says=(_BRIGHT,), is_shown=False),
    "HEIC, PQ": Picture(
        lambda: heic(PLAIN, color_primaries=9, transfer_characteristics=16, **EXACT), says=(_BRIGHT,), is_shown=False
    ),
    "PNG, narrow range": Picture(
        lambda: png(STRIPES, chunk(b"cICP", bytes([1, 13, 0, 0]))),
        says=("input_reference has numbers of a narrow range, which were taken for those of the full one",),
    ),
    "a damaged profile": Picture(
        lambda: saved(PLAIN, "PNG", icc_profile=profile()[:200]),
        says=("input_reference has a colour profile that cannot be used; its colours were taken as sRGB",),
        is_shown=False,
    ),
    "a profile of a gigabyte": Picture(
        partial(hostile.text_png, b"iCCP"), (64, 64), says=(_DAMAGED + "iCCP",), is_shown=False
    ),
    "damaged chunks": Picture(
        lambda: png(STRIPES, broken(_GAMMA_1), chunk(b"cICP", b"\x0c\x0d"), broken(chunk(b"tEXt", b"a\0b"))),
        says=(_DAMAGED + "gAMA, cICP, tEXt",),
        is_shown=False,
    ),
    "ink without a profile": Picture(
        lambda: saved(PLAIN.convert("CMYK"), "JPEG", quality=100),
        says=("input_reference has ink colours without a profile, so its colours are a guess",),
    ),
    "16 bits": Picture(deep),
    "16 bits, Adobe RGB by chunks": Picture(lambda: deep(*_ADOBE_CHUNKS), profile=profile(gamma=100000 / 46455)),
    # What is clear.
    "transparency": Picture(lambda: saved(clear(), "PNG"), says=(_CLEAR,)),
    "WebP, transparency": Picture(lambda: saved(clear(), "WEBP", lossless=True, exact=True), says=(_CLEAR,)),
    "a colour of a palette is clear": Picture(
        lambda: saved(PLAIN.quantize(8), "PNG", transparency=2),
        says=(_CLEAR,),
    ),
    # How they lie.
    **{f"JPEG, EXIF {way}": Picture(partial(turned, "JPEG", way), (48, 64) if way > 4 else (64, 48)) for way in (2, 6)},
    **{f"PNG, EXIF {way}": Picture(partial(turned, "PNG", way), (48, 64) if way > 4 else (64, 48)) for way in (3, 5)},
    "AVIF, EXIF 8": Picture(partial(turned, "AVIF", 8), (48, 64)),
    "HEIC, turned by its boxes": Picture(partial(turned, "HEIF", 6), (48, 64)),
    # What is beside them.
    "animated WebP": Picture(partial(moving, "WEBP"), says=(_ANIMATION,)),
    "animated PNG": Picture(partial(moving, "PNG"), says=(_ANIMATION,)),
    "animated GIF": Picture(partial(moving, "GIF"), says=(_ANIMATION,)),
    "animated AVIF": Picture(partial(moving, "AVIF"), says=(_ANIMATION,)),
    "JPEG of two pictures": Picture(
        lambda: saved(PLAIN, "MPO", save_all=True, append_images=[ImageOps.flip(PLAIN)], quality=100, subsampling=0),
        says=("input_reference has more than one picture; the first was taken",),
    ),
    "JPEG with a gain map": Picture(
        lambda: jpeg(xmp=b'<x xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"/>'), says=(_GAIN_MAP,)
    ),
    "HEIC with a gain map": Picture(heic_with_gain_map, says=(_GAIN_MAP,)),
    "AVIF with a gain map of ISO": Picture(partial(with_iso_gain_map, "AVIF"), says=(_GAIN_MAP,)),
    "HEIC with a gain map of ISO": Picture(partial(with_iso_gain_map, "HEIF"), says=(_GAIN_MAP,)),
    # What is none, or asks for too much.
    "400 scans": Picture(lambda: hostile.scans_jpeg(400, 64), is_refused=True, says=("has more than 100 scans",)),
    "60,000 x 60,000": Picture(hostile.huge_png, is_refused=True, says=("is 60000x60000",)),
    "TIFF": Picture(lambda: saved(PLAIN, "TIFF"), is_refused=True, says=("is not an image of a known kind",)),
    "half of a PNG": Picture(lambda: saved(PLAIN, "PNG")[:150], is_refused=True, says=("is truncated or damaged",)),
    "half of a HEIC": Picture(lambda: heic(PLAIN)[:600], is_refused=True, says=("is truncated or damaged",)),
}
