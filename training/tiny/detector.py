"""Says what a clip shows, from its frames alone: the judge of the tiny model.

Plain numpy, written independently of the renderer, the language and the networks: it has its own palette, its own
outlines and its own idea of each motion, so that a mistake in training cannot hide itself here.

The steps: the background from the border, the shape's mask by its difference from it, the colour by the median inside
the mask, the motion from the path, the area and the turning of the mask, the shape by overlap with turned outlines.
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

PALETTE = {
    "red": (228, 38, 38), "green": (36, 176, 66), "blue": (44, 92, 236), "yellow": (250, 214, 36),
    "orange": (248, 136, 24), "purple": (146, 58, 200), "pink": (250, 128, 190), "cyan": (32, 206, 226),
    "white": (246, 246, 246), "black": (16, 16, 18),
}  # fmt: skip
# The colours in the upper and in the lowest part of the frame, away from any gradient's middle.
BACKDROPS = {
    "black": ((10, 10, 12), (10, 10, 12)), "white": ((246, 246, 246), (246, 246, 246)),
    "gray": ((128, 128, 132), (128, 128, 132)), "navy": ((16, 26, 84), (16, 26, 84)),
    "beige": ((236, 216, 180), (236, 216, 180)), "sky": ((106, 173, 241), (202, 229, 251)),
    "grass": ((150, 206, 250), (112, 148, 40)),
}  # fmt: skip
MASK_LEVEL = 0.5  # of the way from the colour behind to the shape's: where its mask begins
GRID = 40  # masks are compared on a grid of this many cells a side
REACH = 2.4  # which spans this many times the root of the shape's area
MIN_AREA = 0.004  # of the frame; less is no shape
STEADY = ("right", "left", "up", "down", "grow", "shrink")  # the motions of which is_steady is true


@dataclass(frozen=True)
class Sighting:
    """What was seen; None where nothing could be told. ``hollow`` is how much of what the shape's edge encloses shows
    what is behind it, from 0 to 1."""

    background: str | None
    colour: str | None
    shape: str | None
    motion: str | None
    hollow: float = 0.0


def look(frames: NDArray[np.uint8], is_outlined: bool = False) -> Sighting:
    """Judge a clip of (f, h, w, 3) uint8 frames. An outlined shape is taken for what its line encloses, so that a ring
    is a circle."""
    video = frames.astype(np.float32)
    behind = _rows_behind(video)
    background = _nearest_backdrop(behind)
    masks = _masks(video, behind)
    if masks is None:
        return Sighting(background, None, None, None)
    enclosed = _enclosed(masks)
    hollow = float(np.median(1 - masks.sum((1, 2)) / np.maximum(enclosed.sum((1, 2)), 1)))
    patches, path, areas = _normalised(enclosed if is_outlined else masks)
    return Sighting(background, _colour(video, masks), _shape(patches), _motion(patches, path, areas), hollow)


def is_steady(frames: NDArray[np.uint8]) -> bool:
    """Whether the shape goes, grows or shrinks from its first state to its last without turning back or jumping.

    One of these three must be what the clip shows. No frame may lose more than 3 % of the whole change, and none may
    bring more than four times its share.
    """
    video = frames.astype(np.float32)
    masks = _masks(video, _rows_behind(video))
    if masks is None:
        return False
    _, path, areas = _normalised(masks)
    way, size = path[-1] - path[0], np.sqrt(areas)
    is_going = np.linalg.norm(way) > 0.1
    state = path @ way if is_going else size
    change = state[-1] - state[0]
    steps = np.diff(state) * np.sign(change)
    return bool(steps.min() > -0.03 * abs(change) and steps.max() < 4 * abs(change) / len(steps))


def _rows_behind(video: Array) -> Array:
    """The background's colour in each row, (h, 3): the median of the frames' left and right borders over time."""
    border = max(2, video.shape[2] // 24)
    edges = np.concatenate([video[:, :, :border], video[:, :, -border:]], axis=2)
    return np.median(edges, axis=(0, 2)).astype(np.float32)


def _nearest_backdrop(rows: Array) -> str:
    height = len(rows)
    seen = np.concatenate([np.median(rows[: height // 6], axis=0), np.median(rows[-height // 6 :], axis=0)])
    names = list(BACKDROPS)
    known = np.array([BACKDROPS[name] for name in names], dtype=np.float32).reshape(len(names), 6)
    return names[int(np.abs(known - seen).sum(1).argmin())]


def _masks(video: Array, rows: Array) -> NDArray[np.bool_] | None:
    """Where the shape is, (f, h, w), or None without one: pixels nearer to its colour than to what is behind."""
    difference = np.abs(video - rows[:, None]).max(-1)
    strong = np.quantile(difference, 1 - MIN_AREA / 2)  # such differences belong to the shape, if there is one
    if strong < 24:
        return None
    inside = np.median(video[difference > 0.75 * strong], axis=0)
    contrast = np.abs(inside - rows).max(-1)[:, None]  # in front of each row: grass and sky differ from it unlike
    masks = difference > MASK_LEVEL * np.maximum(contrast, 40)
    masks = _without_specks(masks)
    large_enough = masks.mean(axis=(1, 2)) >= MIN_AREA
    return masks if large_enough.mean() > 0.7 else None


def _without_specks(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep pixels most of whose 3 x 3 neighbours are set too."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return masks & (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] >= 4)


def _enclosed(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The masks, and what has some of its mask to the left, to the right, above and below."""
    before = [np.maximum.accumulate(masks, axis=axis) for axis in (1, 2)]
    after = [np.flip(np.maximum.accumulate(np.flip(masks, axis), axis=axis), axis) for axis in (1, 2)]
    return before[0] & before[1] & after[0] & after[1]


def _colour(video: Array, masks: NDArray[np.bool_]) -> str:
    rgb = np.median(video[masks], axis=0)
    names = list(PALETTE)
    return names[int(np.abs(np.array([PALETTE[name] for name in names]) - rgb).sum(1).argmin())]


def _normalised(masks: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Array, Array]:
    """Each frame's mask on a GRID centred on it and scaled by its area (f, GRID * GRID); the path (f, 2) in short
    sides, x then y; and the areas (f,) in pixels."""
    num_frames, height, width = masks.shape
    areas = np.maximum(masks.sum(axis=(1, 2)), 1).astype(np.float32)
    x = (masks.sum(axis=1) * (np.arange(width) + 0.5)).sum(-1) / areas
    y = (masks.sum(axis=2) * (np.arange(height) + 0.5)).sum(-1) / areas
    cells = ((np.arange(GRID) + 0.5) / GRID - 0.5) * REACH
    columns = np.floor(x[:, None] + cells * np.sqrt(areas)[:, None]).astype(int)
    lines = np.floor(y[:, None] + cells * np.sqrt(areas)[:, None]).astype(int)
    inside = ((columns >= 0) & (columns < width))[:, None] & ((lines >= 0) & (lines < height))[..., None]
    index = np.arange(num_frames)[:, None, None]
    patches = masks[index, lines.clip(0, height - 1)[..., None], columns.clip(0, width - 1)[:, None]] & inside
    path = np.stack([x, y], axis=-1).astype(np.float32) / min(height, width)
    return patches.reshape(num_frames, -1), path, areas


def _overlap(masks: NDArray[np.bool_], others: NDArray[np.bool_]) -> Array:
    """Intersection over union of each pair, (n, m) from (n, cells) and (m, cells)."""
    a, b = masks.astype(np.float32), others.astype(np.float32)
    common = a @ b.T
    return common / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - common, 1)


def _shape(patches: NDArray[np.bool_]) -> str:
    """The outline that overlaps best over the clip's frames, each frame turned as suits it."""
    names, outlines = _outlines()
    best = _overlap(patches, outlines.reshape(-1, outlines.shape[-1])).reshape(len(patches), len(names), -1).max(-1)
    return names[int(np.median(best, axis=0).argmax())]


@lru_cache(maxsize=1)
def _outlines() -> tuple[list[str], NDArray[np.bool_]]:
    """Every shape's outline at turns of 6 degrees, centred and scaled as `_normalised` does: (shapes, 60, cells)."""
    size = 129
    y, x = ((np.mgrid[:size, :size] + 0.5) / size - 0.5) * np.array(3.2)
    turns = np.arange(60) * np.pi / 30
    turned = [
        np.stack([inside(x * np.cos(t) + y * np.sin(t), x * np.sin(t) - y * np.cos(t)) for t in turns])
        for inside in _INSIDE.values()
    ]
    return list(_INSIDE), np.stack([_normalised(masks)[0] for masks in turned])


def _in_polygon(x: Array, y: Array, corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Even-odd rule."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _regular(points: int, outer: float, inner: float | None = None) -> NDArray[np.float64]:
    """Corners of a polygon standing on its edge with one corner up; with inner, of a star."""
    count = points * (2 if inner else 1)
    radius = np.where(np.arange(count) % 2, inner or outer, outer)
    angle = np.arange(count) * 2 * np.pi / count
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=-1)


def _in_heart(x: Array, y: Array) -> NDArray[np.bool_]:
    y = y + 0.084
    lobes = (np.abs(x) - 0.42) ** 2 + (y - 0.42) ** 2 < 0.594**2
    return lobes | (np.abs(x) + np.abs(y) < 0.84)


# y points upwards; sizes only matter in proportion
_INSIDE = {
    "circle": lambda x, y: x * x + y * y < 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
    "triangle": lambda x, y: _in_polygon(x, y, _regular(3, 1.1)),
    "star": lambda x, y: _in_polygon(x, y, _regular(5, 1.12, 0.47)),
    "heart": _in_heart,
    "diamond": lambda x, y: abs(x) / 0.72 + abs(y) / 1.08 < 1,
    "ring": lambda x, y: np.abs(np.sqrt(x * x + y * y) - 0.7) < 0.25,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 0.95),
}


def _motion(patches: NDArray[np.bool_], path: Array, areas: Array) -> str:
    """One of the ten motions, from the strongest evidence to the weakest."""
    growth = np.sqrt(_edge_mean(areas[::-1]) / _edge_mean(areas))
    if max(growth, 1 / growth) > 1.28:
        return "grow" if growth > 1 else "shrink"
    way = path[-1] - path[0]
    steps = np.abs(np.diff(path, axis=0)).sum(0)
    extent = np.ptp(path, axis=0)
    if extent.max() < 0.06 + 0.05 * _is_turning(patches):  # a heart's centroid wanders as it turns
        return "spin" if _is_turning(patches) else "still"
    if abs(_winding(path)) > np.pi and extent.min() > 0.1:
        return "orbit"
    main = int(extent.argmax())
    if abs(way[main]) > 0.8 * steps[main] and extent[1 - main] < 0.5 * extent[main]:
        names = (("left", "right"), ("up", "down"))
        return names[main][int(way[main] > 0)]
    if main == 1 and extent[0] < 0.5 * extent[1]:
        return "bounce"
    return "orbit"


def _edge_mean(values: Array) -> float:
    """The mean over the first eighth of a clip."""
    return float(values[: max(1, len(values) // 8)].mean())


def _is_turning(patches: NDArray[np.bool_]) -> bool:
    """Whether some frames' masks differ from the first, though centred and scaled alike."""
    return bool(np.quantile(_overlap(patches[:1], patches)[0], 0.1) < 0.88)


def _winding(path: Array) -> float:
    """The angle swept around the middle of the path's extent, in radians."""
    centred = path - (path.max(0) + path.min(0)) / 2
    angle = np.unwrap(np.arctan2(centred[:, 1], centred[:, 0]))
    return float(angle[-1] - angle[0])
