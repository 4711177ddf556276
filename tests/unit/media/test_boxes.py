"""MP4 and MOV files whose boxes ask for more than they hold."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np
import pytest

from kinema.errors import InvalidRequest
from kinema.media.boxes import UnfitBoxes, only_pictures, only_sound
from kinema.media.film import open_film

MANY = 40_000_000


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full(name: bytes, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    """A box with a version and flags."""
    return box(name, struct.pack(">I", version << 24 | flags), *content)


def u32(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def nested(names: str, inner: bytes) -> bytes:
    """The box inside the named ones, the outermost first."""
    for name in reversed(names.split()):
        inner = box(name.encode(), inner)
    return inner


def film(num_frames: int = 5, *, sound: str | None = None, **options: str) -> bytes:
    """A small film, with a second of sound in that codec."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov", options=options) as container:
        pictures = container.add_stream("libx264", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        heard = container.add_stream(sound, rate=48000) if sound else None
        for number in range(num_frames):
            shown = np.full((48, 64, 3), 8 * number, np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(pictures.encode(None))
        if heard is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
            samples.sample_rate = 48000
            container.mux(heard.encode(samples))
            container.mux(heard.encode(None))
    return buffer.getvalue()


def table(name: bytes, claimed: int) -> bytes:
    """A table with that number of entries and no byte for them."""
    kinds = {
        b"stsz": full(name, u32(0, claimed)),
        b"stz2": full(name, u32(8, claimed)),
        b"trun": full(name, u32(claimed), flags=0x700),
        b"tfra": full(name, u32(1, 0, claimed)),
        b"saiz": full(name, b"\x00", u32(claimed)),
        b"sbgp": full(name, b"roll", u32(claimed)),
        b"sidx": full(name, u32(1, 1000, 0, 0), struct.pack(">HH", 0, min(claimed, 9000))),
    }
    return kinds.get(name, full(name, u32(claimed)))


PLACES = {
    **dict.fromkeys(("stsd", "stts", "ctts", "stss", "stps", "stsc", "stco", "co64", "stsz", "stz2"), "moov trak stbl"),
    **dict.fromkeys(("saiz", "saio", "sbgp"), "moof traf"),
    "elst": "moov trak edts",
    "trun": "moof traf",
    "tfra": "mfra",
    "sidx": "",
    "keys": "moov meta",
    "dref": "moov",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("claimed", [1, MANY, 2**32 - 1])
def test_a_table_that_its_bytes_cannot_hold_is_refused(name: str, claimed: int) -> None:
    """Whichever it is, and by whatever it is too long."""
    inner = table(name.encode(), claimed)
    if name == "keys":
        inner = full(b"hdlr", u32(0), b"mdta") + inner
    with pytest.raises(UnfitBoxes, match=f"table '{name}' of {claimed if name != 'sidx' else min(claimed, 9000)}"):
        only_pictures(box(b"ftyp", b"isom") + nested(PLACES[name], inner))


BOMBS = {
    "stsz of one size": nested("moov trak mdia minf stbl", full(b"stsz", u32(4, MANY))),
    "many small tables": nested("moov trak mdia minf stbl", full(b"stsz", u32(4, 30_000)) * 4),
    "trun without a field": nested("moof traf", full(b"trun", u32(MANY))),
    "saiz of one size": nested("moof traf", full(b"saiz", b"\x10", u32(MANY))),
    "senc": nested("moof traf", full(b"senc", u32(MANY))),
    "sgpd": nested("moov trak stbl", full(b"sgpd", b"sync", u32(1, MANY), version=1)),
    "in user data": nested("moov udta", full(b"stsz", u32(4, MANY))),
    "in meta": nested("moov meta", full(b"hdlr", bytes(16)) + full(b"stsz", u32(4, MANY))),
    "in a fragment index": nested("mfra", full(b"stsz", u32(4, MANY))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_samples_that_need_no_byte_are_counted(bomb: str) -> None:
    """As they say they are, wherever a demuxer would find them."""
    with pytest.raises(UnfitBoxes, match="samples; at most 100000 are accepted"):
        only_pictures(BOMBS[bomb])


def compressed(header: bytes, size: int | None = None) -> bytes:
    packed = box(b"cmvd", u32(len(header) if size is None else size), zlib.compress(header))
    return nested("moov cmov", box(b"dcom", b"zlib") + packed)


WRONG = {
    "a box past its parent": (nested("moov", u32(64) + b"trak"), "box 'trak' that is larger"),
    "a header past the end": (u32(2**31) + b"moov", "box 'moov' that is larger"),
    "64 bits": (nested("moov", u32(1) + b"trak" + u32(2**31, 0)), "box 'trak' that is larger"),
    "deep": (nested("moov " + "udta " * 10, b""), "more than 10 boxes inside"),
    "many": (nested("moov", box(b"free") * 200_000), "more than 200000 boxes or 20000 fragments"),
    "many fragments": (box(b"moof") * 20_002, "more than 200000 boxes or 20000 fragments"),
    "many in an index": (full(b"sidx", bytes(16), u32(9000), bytes(12 * 9000)) * 4, "boxes or 20000 fragments"),
    "many edits of many samples": (
        nested("moov trak edts", full(b"elst", u32(101), bytes(12 * 101))) + full(b"stsz", u32(4, 10_000)),
        "101 edits of 10000 samples",
    ),
    "a header as free space": (box(b"free", box(b"mvhd")), "header in free space"),
    "a table in a description": (
        nested("moov trak stbl", full(b"stsd", u32(1), box(b"avc1", bytes(78), box(b"stsz", bytes(12))))),
        "table among the descriptions",
    ),
    "a compressed header": (compressed(full(b"stsz", u32(4, MANY))), "samples; at most"),
    "a compressed header with sound": (
        compressed(nested("moov trak mdia", full(b"hdlr", u32(0), b"soun") + full(b"stsz", u32(4, MANY)))),
        "samples; at most",
    ),
    "a header that grows": (compressed(bytes(2**24)), "compressed header of more than"),
    "a header that says so": (compressed(b"", 2**31), "compressed header of more than"),
    "a header in a header": (compressed(compressed(b"")), "more than one compressed header"),
    "a damaged header": (
        nested("moov cmov", box(b"dcom", b"zlib") + box(b"cmvd", bytes(20))),
        "header that is damaged",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_boxes_that_do_not_fit_are_refused(case: str) -> None:
    """Each in a few words; as films they get one sentence."""
    data, problem = WRONG[case]
    with pytest.raises(UnfitBoxes, match=problem):
        only_pictures(data)
    with pytest.raises(InvalidRequest, match=rf"^video .*{problem}.* is accepted"):
        open_film(box(b"ftyp", b"qt  ") + data)


@pytest.mark.parametrize("sound", ["pcm_s16le", "aac"])
@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}])
def test_a_film_with_sound_keeps_its_pictures(sound: str, options: dict[str, str]) -> None:
    """They are those of the same film without sound."""
    heard, silent = (open_film(film(sound=codec, **options)) for codec in (sound, None))
    assert heard.shape == silent.shape
    assert np.array_equal(*(opened.fit(opened.shape.size, 16, 5).frames for opened in (heard, silent)))


def test_two_minutes_of_sound_are_not_counted() -> None:
    """Uncompressed sound has a sample for each of 48,000 times a second."""
    data = bytearray(film(sound="pcm_s16le"))
    count_at = data.index(b"stsz", data.index(b"soun")) + 12
    assert data[count_at : count_at + 4] == u32(48_000)
    data[count_at : count_at + 4] = u32(120 * 48_000)
    assert len(only_pictures(bytes(data))) == len(data)
    assert open_film(bytes(data)).shape.num_frames == 5


def test_a_film_without_sound_is_left_as_it_is() -> None:
    """It is the same object: nothing was copied."""
    data = film()
    assert only_pictures(data) is data


def test_sound_is_read_without_the_pictures() -> None:
    """Each is checked as the other is, and a file of sound alone is left as it is."""
    data = film(sound="aac")
    with av.open(io.BytesIO(only_sound(data)), format="mov") as container:
        assert [stream.type for stream in container.streams] == ["audio"]
    with av.open(io.BytesIO(only_pictures(data)), format="mov") as container:
        assert [stream.type for stream in container.streams] == ["video"]
    with pytest.raises(UnfitBoxes, match="samples"):
        only_sound(film(sound="pcm_s16le").replace(struct.pack(">I", 48000), struct.pack(">I", MANY)))


def test_a_compressed_header_is_read() -> None:
    """As QuickTime writes it; places in the file stay the same when it is the last box."""
    plain = film()
    at = plain.index(b"moov") - 4
    packed = open_film(plain[:at] + compressed(plain[at:]))
    assert packed.shape == open_film(plain).shape
    assert np.array_equal(packed.last_frame(), open_film(plain).last_frame())


@pytest.mark.parametrize("end", [b"", bytes(4), bytes(64), b"a text at the end", box(b"wide"), box(b"what", b"ever")])
def test_what_follows_the_last_box_does_no_harm(end: bytes) -> None:
    """Cameras and programs leave a few bytes there."""
    assert open_film(film() + end).shape.num_frames == 5
