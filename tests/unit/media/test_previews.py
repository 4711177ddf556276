"""Thumbnails and sheets of frames."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kinema.media.planes import to_yuv
from kinema.media.previews import Previews, sheet_frames
from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]


def grey(num_frames: int, width: int = 64, height: int = 48) -> UInt8Array:
    """Each frame a little brighter than the one before."""
    levels = np.linspace(0, 240, num_frames).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


def previews_of(frames: UInt8Array, num_frames: int | None = None, chunk: int = 4) -> Previews:
    previews = Previews(Size(width=frames.shape[2], height=frames.shape[1]), num_frames or len(frames))
    for start in range(0, len(frames), chunk):
        previews.add(frames[start : start + chunk])
    return previews


def opened(data: bytes, kind: str) -> UInt8Array:
    picture = Image.open(io.BytesIO(data))
    assert picture.format == kind
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("num_frames", "grid"),
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (3, (2, 1)),
        (5, (2, 2)),
        (8, (3, 2)),
        (9, (3, 3)),
        (13, (4, 3)),
        (17, (4, 4)),
        (161, (4, 4)),
    ],
)
def test_a_sheet_is_a_full_grid_from_the_first_frame_to_the_last(num_frames: int, grid: tuple[int, int]) -> None:
    """Columns and rows without an empty tile, the frames in reading order and evenly spaced."""
    frames = grey(num_frames)
    sheet = opened(previews_of(frames).spritesheet(), "JPEG")
    columns, rows = grid
    assert sheet.shape == (48 * rows, 64 * columns, 3)
    tiles = sheet.reshape(rows, 48, columns, 64, 3).swapaxes(1, 2).reshape(-1, 48, 64, 3)
    chosen = sheet_frames(num_frames)
    assert np.abs(tiles.mean(axis=(1, 2, 3)) - frames[chosen].mean(axis=(1, 2, 3))).max() < 2
    assert (chosen[0], chosen[-1]) == (0, num_frames - 1 if num_frames > 1 else 0)
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_the_thumbnail_is_the_middle_frame() -> None:
    """However the frames come."""
    frames = grey(17)
    assert np.abs(opened(previews_of(frames).thumbnail(), "WEBP").astype(int) - frames[8]).max() <= 2
    assert previews_of(frames, chunk=1).thumbnail() == previews_of(frames).thumbnail()
    assert previews_of(frames, chunk=5).spritesheet() == previews_of(frames).spritesheet()


@pytest.mark.parametrize(
    ("width", "height", "thumbnail", "tile"),
    [(832, 480, (512, 295), (320, 185)), (480, 832, (295, 512), (185, 320)), (64, 48, (64, 48), (64, 48))],
)
def test_previews_are_small(width: int, height: int, thumbnail: tuple[int, int], tile: tuple[int, int]) -> None:
    """The shape of the film, its long side bounded; a small film is not made larger."""
    previews = previews_of(grey(1, width, height))
    assert opened(previews.thumbnail(), "WEBP").shape == (*thumbnail[::-1], 3)
    assert opened(previews.spritesheet(), "JPEG").shape == (*tile[::-1], 3)


@pytest.mark.parametrize(("width", "height"), [(832, 480), (64, 48)])
def test_previews_of_planes_are_those_of_their_rgb(width: int, height: int) -> None:
    """In size, and to a few levels in colour."""
    rgb = np.broadcast_to(np.array((200, 30, 90), np.uint8), (5, height, width, 3)).copy()
    rgb[:, : height // 2] = (10, 90, 200)
    planes = np.stack([to_yuv(pixels).to_ndarray() for pixels in rgb])
    size = Size(width=width, height=height)
    made, expected = Previews(size, 5), Previews(size, 5)
    made.add(planes)
    expected.add(rgb)
    for ours, theirs, kind in (
        (made.thumbnail(), expected.thumbnail(), "WEBP"),
        (made.spritesheet(), expected.spritesheet(), "JPEG"),
    ):
        assert np.abs(opened(ours, kind).astype(int) - opened(theirs, kind)).mean() < 3


def test_fewer_frames_than_were_said() -> None:
    """The previews are made of those that came."""
    previews = previews_of(grey(5), num_frames=161)
    assert opened(previews.thumbnail(), "WEBP").mean() < 2
    assert opened(previews.spritesheet(), "JPEG").shape == (48, 64, 3)


def test_no_frame_is_no_preview() -> None:
    """As with the film itself."""
    for make in (Previews(Size(width=64, height=48), 5).thumbnail, Previews(Size(width=64, height=48), 5).spritesheet):
        with pytest.raises(ValueError, match="at least one frame"):
            make()
