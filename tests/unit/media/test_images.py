"""Input images: what is accepted, and what becomes of the pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from kinema.errors import InvalidRequest
from kinema.media import images
from kinema.media.images import FittedImage, decode_png, encode_png, open_image
from kinema.media.picture_colours import PictureColours
from kinema.request.shapes import Size

SIZE = Size(width=64, height=48)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def fit(data: bytes, size: Size) -> FittedImage:
    return open_image(data).fit(size)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


PICTURE = Image.fromarray(PIXELS)
WHOLE = {
    "png": saved(PICTURE, "PNG"),
    "jpeg": saved(PICTURE, "JPEG", quality=95),
    "webp": saved(PICTURE, "WEBP"),
    "webp lossless": saved(PICTURE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_the_accepted_kinds(data: bytes) -> None:
    """PNG, JPEG and WebP, told by their bytes."""
    assert open_image(data).size == SIZE
    assert fit(data, SIZE).pixels.shape == (48, 64, 3)


REFUSED = {
    "empty": b"",
    "text": b"hello",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "bmp": saved(PICTURE, "BMP"),
    "tiff": saved(PICTURE, "TIFF"),
    "30,000 x 30,000 png": png_header(30_000, 30_000),
    "png with a side of 0": png_header(0, 10),
    "16,000 x 16,000 webp": webp_header(16_000, 16_000),
    "png signature alone": b"\x89PNG\r\n\x1a\n",
    "jpeg signature alone": b"\xff\xd8\xff",
    "webp signature alone": b"RIFF\0\0\0\0WEBP",
    **{f"half a {name}": data[: len(data) // 2] for name, data in WHOLE.items()},
    **{f"a tenth of a {name}": data[: len(data) // 10] for name, data in WHOLE.items()},
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_everything_else_is_refused_with_what_is_accepted(data: bytes) -> None:
    """One sentence that names the parameter; never another exception, never a warning."""
    with pytest.raises(InvalidRequest, match=r"^input_reference .*PNG, JPEG, WebP, AVIF, GIF or HEIC") as caught:
        fit(data, SIZE)
    assert caught.value.param == "input_reference"


def test_too_many_pixels_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header decides."""

    def decoded(_self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(InvalidRequest, match="30000x30000"):
        open_image(png_header(30_000, 30_000))


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything reads them."""
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(InvalidRequest, match="20 MiB"):
        open_image(WHOLE["png"])


def test_an_image_of_the_right_size_is_untouched() -> None:
    """Bit for bit, and nothing to say about it."""
    fitted = fit(WHOLE["png"], SIZE)
    assert np.array_equal(fitted.pixels, PIXELS)
    assert fitted.note is None


def test_an_image_larger_than_any_video_is_accepted() -> None:
    """A photo of 6000 x 4000 is an everyday input."""
    data = saved(Image.new("L", (6000, 4000)), "PNG")
    assert open_image(data).size == Size(width=6000, height=4000)


def test_the_middle_is_kept_and_the_sides_are_cropped() -> None:
    """Red, green, blue stripes cropped to the shape of the middle one are green."""
    stripes = np.zeros((30, 90, 3), dtype=np.uint8)
    for channel in range(3):
        stripes[:, 30 * channel : 30 * channel + 30, channel] = 255
    fitted = fit(encode_png(stripes), Size(width=10, height=20))
    assert np.array_equal(fitted.pixels, np.broadcast_to(np.array([0, 255, 0], np.uint8), (20, 10, 3)))
    assert fitted.note == "input_reference 90x30 was scaled and cropped to 10x20"
    upright = fit(encode_png(stripes.transpose(1, 0, 2).copy()), Size(width=20, height=10))
    assert (upright.pixels[..., 1] == 255).all()


def test_the_same_shape_is_scaled_without_a_crop() -> None:
    """And the note says so."""
    fitted = fit(WHOLE["png"], Size(width=32, height=24))
    assert fitted.pixels.shape == (24, 32, 3)
    assert fitted.note == "input_reference 64x48 was scaled to 32x24"


def test_transparency_is_laid_on_white() -> None:
    """Half-transparent black is grey; nothing at all is white."""
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    pixels = fit(saved(picture, "PNG"), Size(width=2, height=1)).pixels
    assert pixels[0].tolist() == [[255, 255, 255], [127, 127, 127]]


@pytest.mark.parametrize(
    ("mode", "file_format", "alpha", "is_told"),
    [
        ("RGBA", "PNG", 254, True),
        ("LA", "PNG", 0, True),
        ("RGBA", "PNG", 255, False),
        ("RGBA", "WEBP", 9, True),
        ("RGBA", "AVIF", 9, True),
        ("RGBA", "GIF", 0, True),
    ],
)
def test_transparency_is_told(mode: str, file_format: str, alpha: int, is_told: bool) -> None:
    """Of one pixel, but not of a channel that says nothing."""
    picture = Image.new(mode, (4, 4), (*(5,) * (len(mode) - 1), 255))
    picture.putpixel((3, 1), (*(5,) * (len(mode) - 1), alpha))
    told = ("input_reference is transparent; it was laid on white",) if is_told else ()
    assert open_image(saved(picture, file_format)).notes == told


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF"])
def test_the_channel_of_a_first_picture_without_holes_is_not_told(file_format: str) -> None:
    """The file has it for the pictures that follow."""
    opaque, clear = (Image.new("RGBA", (16, 16), (5, 5, 5, alpha)) for alpha in (255, 0))
    opened = open_image(saved(opaque, file_format, save_all=True, append_images=[clear], duration=100))
    assert opened.stored.mode == "RGBA"
    assert opened.notes == ("input_reference is an animation; its first picture was taken",)


@pytest.mark.parametrize(("file_format", "used"), [("PNG", 1), ("PNG", 0), ("GIF", 1), ("GIF", 0)])
def test_a_transparent_colour_that_no_pixel_has_is_not_told(file_format: str, used: int) -> None:
    picture = Image.new("P", (4, 4), used)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    notes = open_image(saved(picture, file_format, transparency=0, optimize=False)).notes
    assert notes == (() if used else ("input_reference is transparent; it was laid on white",))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_pixel_format_becomes_rgb(mode: str) -> None:
    """A bright and a dark half stay bright and dark."""
    halves = np.zeros((16, 16, 3), dtype=np.uint8)
    halves[:, 8:] = 255
    data = saved(Image.fromarray(halves).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    pixels = fit(data, Size(width=16, height=16)).pixels
    assert pixels[:, :7].max() < 30
    assert pixels[:, 9:].min() > 225


def test_a_palette_with_a_transparent_colour() -> None:
    """The transparent entry is white, whatever its colour."""
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    pixels = fit(saved(picture, "PNG", transparency=0), Size(width=2, height=1)).pixels
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    """Middle grey stays middle grey."""
    deep = np.array([[0, 32768, 65535]], dtype=np.uint16)
    pixels = fit(saved(Image.fromarray(deep), "PNG"), Size(width=3, height=1)).pixels
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_bands_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image converted row by row is the same as one converted at once, cropped and scaled down or not."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (93, 131, 4), dtype=np.uint8), "RGBA")
    sizes = [
        Size(width=131, height=93),
        Size(width=16, height=16),
        Size(width=40, height=8),
        Size(width=200, height=99),
    ]
    whole = [fit(saved(picture, "PNG"), size).pixels for size in sizes]
    monkeypatch.setattr(images, "_BAND_PIXELS", 1)
    for size, pixels in zip(sizes, whole, strict=True):
        assert np.array_equal(fit(saved(picture, "PNG"), size).pixels, pixels)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_large_image_looks_as_if_it_was_scaled_in_one_step(file_format: str) -> None:
    """Decoding a JPEG at a fraction and averaging whole pixels are no more than a shortcut."""
    rows, columns = np.mgrid[0:1500, 0:2000]
    waves = np.stack([rows // 6, columns // 8, 128 + 100 * np.sin(rows / 60 + columns / 90)], axis=-1).astype(np.uint8)
    data = saved(Image.fromarray(waves), file_format)
    fitted = fit(data, Size(width=96, height=96))
    slow = Image.fromarray(waves).resize((96, 96), Image.Resampling.LANCZOS, box=(250, 0, 1750, 1500))
    assert fitted.note == "input_reference 2000x1500 was scaled and cropped to 96x96"
    assert np.abs(fitted.pixels.astype(int) - np.asarray(slow).astype(int)).mean() < 2


def test_an_image_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted is a band: a small file of many pixels takes its pixels once, in their own format."""
    converted: list[int] = []
    to_rgb = images._to_rgb

    def counted(image: Image.Image, colours: PictureColours) -> Image.Image:
        converted.append(image.width * image.height)
        return to_rgb(image, colours)

    monkeypatch.setattr(images, "_to_rgb", counted)
    fit(saved(Image.new("RGBA", (3000, 3000)), "PNG"), Size(width=64, height=48))
    assert max(converted) <= 2**20
    assert sum(converted) == 3000 * 2250  # what is cropped is not even looked at


def test_a_large_jpeg_is_not_decoded_in_full() -> None:
    """libjpeg gives an eighth of it, which is still twice what is asked for."""
    opened = open_image(saved(Image.new("RGB", (4000, 3000)), "JPEG"))
    opened.fit(Size(width=64, height=48))
    assert opened.stored.size == (500, 375)


def test_more_than_25_megapixels_are_refused() -> None:
    """7000 x 7000 in 190 KB is nothing that a video needs."""
    with pytest.raises(InvalidRequest, match=r"is 7000x7000; .* 25 million pixels"):
        open_image(png_header(7000, 7000))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation: int) -> None:
    """As Pillow itself turns it, cropped after that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(PICTURE, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    opened = open_image(data)
    assert np.array_equal(opened.fit(opened.size).pixels, np.asarray(upright))
    scaled, slow = (image.fit(Size(width=20, height=20)) for image in (opened, open_image(saved(upright, "PNG"))))
    assert np.abs(scaled.pixels.astype(int) - slow.pixels.astype(int)).max() <= 2  # each step rounds
    assert scaled.note == slow.note


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_honoured(file_format: str) -> None:
    """A phone's portrait photo is stored lying down: 6 means turn it right to view it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.zeros((16, 32, 3), dtype=np.uint8)
    lying[:, :16] = 255
    data = saved(Image.fromarray(lying), file_format, exif=exif)
    assert open_image(data).size == Size(width=16, height=32)
    pixels = fit(data, Size(width=16, height=32)).pixels
    assert pixels[:14].min() > 200
    assert pixels[18:].max() < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own words, to whoever runs the server
def test_damaged_exif_does_not_lose_the_picture() -> None:
    """Only the orientation is unknown then."""
    assert open_image(saved(PICTURE, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")).size == SIZE


def test_png_round_trip() -> None:
    """What is stored for the worker is exact."""
    assert np.array_equal(decode_png(encode_png(PIXELS)), PIXELS)


def test_pillow_keeps_its_global_settings() -> None:
    """Other users of Pillow in the process see no difference."""
    max_pixels, is_lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    fit(WHOLE["jpeg"], Size(width=16, height=16))
    assert max_pixels == Image.MAX_IMAGE_PIXELS
    assert is_lenient == ImageFile.LOAD_TRUNCATED_IMAGES
