"""Films and pictures that ask for far more than they hold, made of a few lines each."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full(name: bytes, *numbers: int, flags: int = 0) -> bytes:
    """A box with a version, flags and numbers of four bytes."""
    return box(name, struct.pack(f">{1 + len(numbers)}I", flags, *numbers))


def _samples(num_samples: int, kind: bytes = b"avc1", width: int = 64, height: int = 64, size: int = 4) -> bytes:
    """The table of samples that have one size, one duration and one chunk, and so need no byte each."""
    entry = box(kind, bytes(6), struct.pack(">H", 1), bytes(16), struct.pack(">HH", width, height), bytes(50))
    tables = (
        box(b"stsd", struct.pack(">II", 0, 1), entry),
        full(b"stts", 1, num_samples, 2),
        full(b"stsc", 1, 1, num_samples, 1),
        full(b"stsz", size, num_samples),
        full(b"stco", 1, 0),
    )
    return box(b"stbl", *tables)


def _track(number: int, samples: bytes, duration: int = 0, scale: int = 120) -> bytes:
    heading = full(b"tkhd", 0, 0, number, *([0] * 17), flags=3)
    about = full(b"mdhd", 0, 0, scale, duration, 0) + full(b"hdlr", 0, int.from_bytes(b"vide", "big"), 0, 0, 0)
    return box(b"trak", heading, box(b"mdia", about, box(b"minf", samples)))


_MOVIE = full(b"mvhd", 0, 0, 120, 0, *([0] * 20))


def _file(*boxes: bytes) -> bytes:
    return box(b"ftyp", b"isom", bytes(4), b"isom") + b"".join(boxes)


def stsz_bomb(num_samples: int = 40_000_000, num_tracks: int = 4) -> bytes:
    """1.6 kB for gigabytes: each track says that it has millions of samples of one size."""
    return _file(box(b"moov", _MOVIE, *(_track(1 + at, _samples(num_samples)) for at in range(num_tracks))))


def trun_bomb(num_samples: int = 40_000_000) -> bytes:
    """The same in fragments, whose samples take all of their fields from the defaults."""
    movie = box(b"moov", _MOVIE, _track(1, _samples(0)), box(b"mvex", full(b"trex", 1, 1, 1, 4, 0)))
    run = box(b"traf", full(b"tfhd", 1, flags=0x20000), full(b"trun", num_samples))
    return _file(movie, box(b"moof", full(b"mfhd", 1), run) * 4)


def _zeros(num_blocks: int) -> bytes:
    """So many times 16 MB of zeros, compressed to 16 kB each."""
    packer = zlib.compressobj(9)
    begin, block = packer.flush(zlib.Z_FULL_FLUSH), packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (num_blocks * 2**24 % 65521) << 16 | 1
    return begin + block * num_blocks + zlib.compressobj(9, wbits=-15).flush() + checksum.to_bytes(4, "big")


def cmov_bomb(num_blocks: int = 120) -> bytes:
    """A compressed header of two gigabytes."""
    data = box(b"cmvd", struct.pack(">I", num_blocks * 2**24), _zeros(num_blocks))
    return _file(box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), data)))


def cmov_with_tables(num_samples: int = 40_000_000) -> bytes:
    """A small compressed header with the tables of a bomb."""
    header = stsz_bomb(num_samples)[20:]
    data = box(b"cmvd", struct.pack(">I", len(header)), zlib.compress(header))
    return _file(box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), data)))


def webm_bomb() -> bytes:
    """An index of five million places in 10 MB, of which a demuxer keeps each."""
    index = b"\xbb\x80" * 5_000_000
    cues = b"\x1c\x53\xbb\x6b" + (1 << 56 | len(index)).to_bytes(8, "big") + index
    return b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67" + (1 << 56 | len(cues)).to_bytes(8, "big") + cues


def slow_film(num_frames: int = 7200) -> bytes:
    """A legal film of two minutes in 300 kB whose pictures, each 4096x2304, are one and the same: minutes to decode."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((4096, 2304)).convert("RGB").save(buffer, "JPEG")
    picture = buffer.getvalue()
    places = full(b"stco", num_frames, *([28 + 8] * num_frames))
    samples = _samples(num_frames, b"jpeg", 4096, 2304, len(picture))
    samples = samples.replace(full(b"stco", 1, 0), places).replace(
        full(b"stsc", 1, 1, num_frames, 1), full(b"stsc", 1, 1, 1, 1)
    )
    samples = box(b"stbl", samples[8:])
    return _file(box(b"mdat", picture), box(b"moov", _MOVIE, _track(1, samples, 2 * num_frames)))


def scans_jpeg(num_scans: int = 8000, side: int = 5000) -> bytes:
    """A progressive JPEG of 25 million pixels with thousands of scans, none of which has a bit."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last : last + 10] * num_scans + whole[-2:]


def chunks_png(num_bytes: int = 19 * 2**20) -> bytes:
    """Chunks without content, one and a half million of them."""
    chunk = bytes(4) + b"puNK" + zlib.crc32(b"puNK").to_bytes(4, "big")
    whole = plain_png()
    return whole[:33] + chunk * (num_bytes // len(chunk)) + whole[33:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def text_png(name: bytes, num_blocks: int = 64) -> bytes:
    """A gigabyte of zeros as the compressed text or profile of a small picture."""
    whole = plain_png()
    return whole[:33] + _chunk(name, b"x\x00\x00" + _zeros(num_blocks)) + whole[33:]


def huge_png(side: int = 60_000) -> bytes:
    """A header that says 3.6 billion pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


def frames_webp(num_frames: int = 1500, side: int = 2000) -> bytes:
    """An animation of thousands of large frames."""
    buffer = io.BytesIO()
    one = Image.new("RGB", (side, side), "red")
    small = [Image.new("RGB", (side, side), (number % 256, 0, 0)) for number in range(8)]
    one.save(buffer, "WEBP", save_all=True, append_images=small, method=0, quality=1)
    whole = buffer.getvalue()
    at = whole.rindex(b"ANMF")
    body = whole[12:] + whole[at:] * num_frames
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def plain_png(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()
