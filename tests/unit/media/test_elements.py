"""WebM and Matroska files whose elements ask for more than they hold."""

from __future__ import annotations

import io
from functools import reduce

import av
import numpy as np
import pytest

from kinema.errors import InvalidRequest
from kinema.media.film import open_film

HEADER, SEGMENT, CLUSTER, CUES, CUE = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1C53BB6B, 0xBB
UNKNOWN = b"\xff"


def element(name: int, *content: bytes, size: bytes | None = None) -> bytes:
    body = b"".join(content)
    told = size or (1 << 56 | len(body)).to_bytes(8, "big")
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + told + body


def film(kind: str = "webm", num_frames: int = 5, **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind, options=options) as container:
        pictures = container.add_stream("libvpx", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            shown = np.full((48, 64, 3), 8 * number, np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(pictures.encode(None))
    return buffer.getvalue()


WRONG = {
    "past the end": (element(SEGMENT, element(CUES, size=b"\x40\xff")), "larger than what is around"),
    "past its parent": (element(SEGMENT, element(CUES, element(CUE, size=b"\x90"))), "larger than what is around"),
    "of no size": (element(SEGMENT, element(CUES, element(CUE), size=UNKNOWN)), "without a size"),
    "no id": (element(SEGMENT, bytes(4)), "without an id"),
    "many": (element(SEGMENT, element(CUES, b"\xbb\x80" * 100_000)), "more than 100000 elements"),
    "many in clusters": (element(SEGMENT, element(CLUSTER, b"\xa3\x80" * 400_000)), "or 400000 with those in clusters"),
    "deep": (reduce(lambda inner, _: element(0xAE, inner), range(20), b""), "inside each other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_elements_that_do_not_fit_are_refused(case: str) -> None:
    """In one sentence about the film."""
    data, problem = WRONG[case]
    with pytest.raises(InvalidRequest, match=rf"^video .*{problem}.* is accepted"):
        open_film(element(HEADER) + data)


@pytest.mark.parametrize("kind", ["webm", "matroska"])
@pytest.mark.parametrize("options", [{}, {"live": "1"}, {"cluster_size_limit": "200"}, {"reserve_index_space": "400"}])
def test_films_are_read(kind: str, options: dict[str, str]) -> None:
    """Also those of a recorder, which does not know how long they become."""
    assert open_film(film(kind, **options)).shape.num_frames == 5


def test_a_film_that_was_cut_short_is_read() -> None:
    """A download that broke off has its first pictures."""
    whole = film(num_frames=30)
    assert 0 < open_film(whole[: len(whole) * 2 // 3]).shape.num_frames < 30
