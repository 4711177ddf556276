"""The world the tiny model knows: one flat shape, one motion, one background.

Clips are drawn as plain numbers on the CPU (`sample_clips`) and rendered from signed distances wherever the frames
are needed (`render`), so a training machine never reads a video file.
This module knows nothing of words (`language`), of networks, or of how results are judged (`detector`).

Lengths are in units of the short side of the frame, y grows downwards, angles turn clockwise on screen.
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
COLOURS = {
    "red": (228, 38, 38),
    "green": (36, 176, 66),
    "blue": (44, 92, 236),
    "yellow": (250, 214, 36),
    "orange": (248, 136, 24),
    "purple": (146, 58, 200),
    "pink": (250, 128, 190),
    "cyan": (32, 206, 226),
    "white": (246, 246, 246),
    "black": (16, 16, 18),
}
# Two colours per background: at the top and at the bottom of the frame.
BACKGROUNDS = {
    "black": ((10, 10, 12), (10, 10, 12)),
    "white": ((246, 246, 246), (246, 246, 246)),
    "gray": ((128, 128, 132), (128, 128, 132)),
    "navy": ((16, 26, 84), (16, 26, 84)),
    "beige": ((236, 216, 180), (236, 216, 180)),
    "sky": ((96, 168, 240), (214, 236, 252)),
    "grass": ((150, 206, 250), (112, 148, 40)),
}
HORIZON = 0.7  # the grass begins here; the sky instead blends from top to bottom
MOTIONS = ("right", "left", "up", "down", "bounce", "grow", "shrink", "spin", "orbit", "still")
SIZES = ("normal", "small", "large")
SPEEDS = ("normal", "slow", "fast")

MIN_CONTRAST = 72  # largest channel difference below which a shape would hardly be seen
MARGIN = 0.02
OUTLINE = 0.045  # how wide the line of an outlined shape is
EXTENT = 1.12  # no shape reaches further from its centre than this many radii
_UNSEEN_PAIRS = {("white", "sky"), ("cyan", "sky"), ("black", "navy"), ("white", "beige")}


def is_visible(colour: str, background: str) -> bool:
    """Whether a shape of this colour stands out from this background everywhere."""
    if (colour, background) in _UNSEEN_PAIRS:
        return False
    rgb = np.array(COLOURS[colour])
    return all(np.abs(rgb - np.array(part)).max() >= MIN_CONTRAST for part in BACKGROUNDS[background])


def is_held_out(shape: int, colour: int, motion: int) -> bool:
    """One in sixteen (shape, colour, motion) triples is never rendered in training; a Latin pattern spreads them."""
    return (shape + 3 * colour + 7 * motion) % 16 == 5


@lru_cache(maxsize=2)
def combinations(held_out: bool) -> np.ndarray:
    """Every permitted (shape, colour, motion, background) as indices, int64 (n, 4)."""
    rows = [
        (s, c, m, b)
        for s, shape in enumerate(SHAPES)
        for c, colour in enumerate(COLOURS)
        for m, motion in enumerate(MOTIONS)
        for b, background in enumerate(BACKGROUNDS)
        if is_visible(colour, background)
        and not (motion == "spin" and shape in ("circle", "ring"))
        and is_held_out(s, c, m) == held_out
    ]
    return np.array(rows)


@dataclass(frozen=True)
class Clips:
    """A batch of clips as numbers, sorted by shape so that rendering needs no index arithmetic on the device.

    path is float32 (n, f, 4): centre x, centre y, radius, angle. The other fields are index arrays (n,).
    """

    shape: np.ndarray
    colour: np.ndarray
    motion: np.ndarray
    background: np.ndarray
    size: np.ndarray
    speed: np.ndarray
    path: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)

    def shape_counts(self) -> list[int]:
        return np.bincount(self.shape, minlength=len(SHAPES)).tolist()

    def rgb(self) -> np.ndarray:
        """Shape colours in [-1, 1], float32 (n, 3)."""
        return _palette()[self.colour]


@lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    return np.array(list(COLOURS.values()), dtype=np.float32) / 127.5 - 1


def sample_clips(
    rng: np.random.Generator, n: int, num_frames: int, aspect: tuple[float, float] = (1.0, 1.0), held_out: bool = False
) -> Clips:
    """Draw n clips; aspect is (width, height) in short sides. Training never asks for held_out ones."""
    combos = combinations(held_out)
    rows = combos[rng.integers(len(combos), size=n)]
    shape, colour, motion, background = rows[np.argsort(rows[:, 0], kind="stable")].T
    size = rng.choice(3, size=n, p=(0.76, 0.12, 0.12))
    speed = rng.choice(3, size=n, p=(0.76, 0.12, 0.12))
    resizing = (motion == MOTIONS.index("grow")) | (motion == MOTIONS.index("shrink"))
    size[resizing] = 0  # a shape that changes its size has no size worth naming
    speed[motion == MOTIONS.index("still")] = 0
    paths = [
        _path(rng, MOTIONS[m], SIZES[z], SPEEDS[v], num_frames, aspect)
        for m, z, v in zip(motion, size, speed, strict=True)
    ]
    return Clips(shape, colour, motion, background, size, speed, np.stack(paths).astype(np.float32))


def _path(
    rng: np.random.Generator, motion: str, size: str, speed: str, num_frames: int, aspect: tuple[float, float]
) -> np.ndarray:
    """One trajectory, (f, 4): centre x, centre y, radius, angle."""
    low, high = {"normal": (0.12, 0.25), "small": (0.085, 0.12), "large": (0.25, 0.31)}[size]
    if speed == "fast" and size == "normal":
        high = 0.18  # leaves room for a long way
    radius = rng.uniform(low, high)
    time = np.linspace(0, 1, num_frames)
    if motion in ("right", "left", "up", "down"):
        return _straight(rng, motion, speed, radius, time, aspect)
    if motion == "bounce":
        return _bounce(rng, speed, radius, time, aspect)
    if motion == "orbit":
        return _orbit(rng, speed, radius, time, aspect)
    if motion in ("grow", "shrink"):
        return _resize(rng, motion, speed, time, aspect)
    turn = _turn(rng, speed, num_frames) if motion == "spin" else 0.0
    x, y = (_place(rng, radius, length) for length in aspect)
    return _stack(x, y, radius, turn * time, num_frames)


def _stack(x: object, y: object, radius: object, angle: object, num_frames: int) -> np.ndarray:
    return np.stack([np.broadcast_to(np.asarray(v, float), num_frames) for v in (x, y, radius, angle)], axis=-1)


def _place(rng: np.random.Generator, reach: float, length: float) -> float:
    """A coordinate whose neighbourhood of EXTENT reaches stays within [0, length]."""
    room = min(EXTENT * reach + MARGIN, length / 2)
    return float(rng.uniform(room, length - room))


def _straight(
    rng: np.random.Generator, motion: str, speed: str, radius: float, time: np.ndarray, aspect: tuple[float, float]
) -> np.ndarray:
    along = 0 if motion in ("right", "left") else 1
    sign = 1 if motion in ("right", "down") else -1
    room = aspect[along] - 2 * (EXTENT * radius + MARGIN)
    way = min(rng.uniform(*{"normal": (0.28, 0.55), "slow": (0.16, 0.26), "fast": (0.55, 0.75)}[speed]), room)
    middle = aspect[along] / 2 + rng.uniform(-0.5, 0.5) * (room - way)
    line = middle + sign * way * (time - 0.5)
    across = _place(rng, radius, aspect[1 - along])
    x, y = (line, across) if along == 0 else (across, line)
    return _stack(x, y, radius, 0, len(time))


def _bounce(
    rng: np.random.Generator, speed: str, radius: float, time: np.ndarray, aspect: tuple[float, float]
) -> np.ndarray:
    """Parabolic hops on an unseen floor low in the frame."""
    lowest = max(0.76 * aspect[1], 2 * EXTENT * radius + 0.24)  # leaves every shape a fifth of the frame to hop
    floor = rng.uniform(lowest, max(lowest, 0.96 * aspect[1])) - EXTENT * radius
    height = min(rng.uniform(0.25, 0.5), floor - EXTENT * radius - MARGIN)
    hops = rng.uniform(*{"normal": (1.6, 2.6), "slow": (1.1, 1.5), "fast": (2.8, 4.0)}[speed])
    hops = min(hops, max(1.0, (len(time) - 1) / 4))  # fewer than four frames a hop would not read as one
    phase = (hops * time + rng.uniform()) % 1
    return _stack(_place(rng, radius, aspect[0]), floor - 4 * height * phase * (1 - phase), radius, 0, len(time))


def _orbit(
    rng: np.random.Generator, speed: str, radius: float, time: np.ndarray, aspect: tuple[float, float]
) -> np.ndarray:
    """Clockwise on a circle around the middle of the frame."""
    way = min(rng.uniform(0.18, 0.3), 0.5 - EXTENT * radius - MARGIN + 0.04)
    turns = rng.uniform(*{"normal": (0.95, 1.25), "slow": (0.65, 0.8), "fast": (1.5, 2.0)}[speed])
    turns = min(turns, max(0.6, (len(time) - 1) / 8))
    angle = 2 * np.pi * (turns * time + rng.uniform())
    x, y = (length / 2 + rng.uniform(-0.03, 0.03) for length in aspect)
    return _stack(x + way * np.cos(angle), y + way * np.sin(angle), radius, 0, len(time))


def _resize(
    rng: np.random.Generator, motion: str, speed: str, time: np.ndarray, aspect: tuple[float, float]
) -> np.ndarray:
    factor = rng.uniform(*{"normal": (1.8, 2.5), "slow": (1.5, 1.75), "fast": (2.5, 3.0)}[speed])
    largest = min(rng.uniform(0.2, 0.36), 0.14 * factor)
    grown = time if motion == "grow" else 1 - time
    radius = largest / factor + (largest - largest / factor) * grown
    x, y = (_place(rng, largest, length) for length in aspect)
    return _stack(x, y, radius, 0, len(time))


def _turn(rng: np.random.Generator, speed: str, num_frames: int) -> float:
    """The whole turn in radians; at most 22 degrees a frame, or a square would seem to turn backwards."""
    degrees = rng.uniform(*{"normal": (180, 400), "slow": (95, 150), "fast": (420, 700)}[speed])
    return float(np.radians(min(degrees, 22 * max(num_frames - 1, 1))))


# Signed distances in units of the radius; y points upwards here. Exact near the edge, where it counts.


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-y, x.abs() * 0.8660254 + y * 0.5) - 0.55


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one half of one point, whose edge is a single line."""
    outer, inner, half = 1.12, 0.47, np.pi / 5
    angle = ((torch.atan2(x, y) + half) % (2 * half) - half).abs()
    length = torch.sqrt(x * x + y * y)
    along, across = length * angle.cos(), length * angle.sin()
    edge = np.array([inner * np.cos(half) - outer, inner * np.sin(half)])
    edge = edge / np.linalg.norm(edge)
    return (along - outer) * edge[1] - across * edge[0]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner and a circle on each of its upper edges."""
    a = 0.84
    y = y + 0.1 * a
    corner = (x.abs() + y.abs() - a) * 0.70710678
    lobe = torch.sqrt((x.abs() - a / 2) ** 2 + (y - a / 2) ** 2) - a * 0.70710678
    return torch.minimum(corner, lobe)


_DISTANCES = {
    "circle": lambda x, y: torch.sqrt(x * x + y * y) - 0.95,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": lambda x, y: (x.abs() / 0.72 + y.abs() / 1.08 - 1) * 0.599,
    "ring": lambda x, y: (torch.sqrt(x * x + y * y) - 0.7).abs() - 0.25,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
}


@lru_cache(maxsize=4)
def _backdrop_table(device: torch.device) -> Tensor:
    return (torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 127.5 - 1).to(device)


def backdrop(background: Tensor, rows: Tensor) -> Tensor:
    """Background colours (n, 3, h) in [-1, 1]; background (n,) indices, rows (n, h) heights from 0 to 1."""
    top, bottom = _backdrop_table(rows.device)[background].unbind(1)
    is_grass = (background == list(BACKGROUNDS).index("grass"))[:, None]
    blend = torch.where(is_grass, ((rows - HORIZON) * 128 + 0.5).clamp(0, 1), rows)[:, None]
    return top[..., None] * (1 - blend) + bottom[..., None] * blend


def distances(path: Tensor, counts: list[int], size: tuple[int, int], scale_px: float, offset_px: Tensor) -> Tensor:
    """Signed distance in pixels to each clip's shape, float32 (n, f, h, w).

    path is (n, f, 4) in short sides of scale_px pixels; clips are sorted by shape, counts says how many of each;
    offset_px (n, 2) is where the window of size (h, w) begins in the scene, x then y.
    """
    height, width = size
    centre_x, centre_y, radius, angle = path.unbind(-1)
    offset_x, offset_y = offset_px[:, None].unbind(-1)
    columns = torch.arange(width, device=path.device) + 0.5
    rows = torch.arange(height, device=path.device) + 0.5
    radius_px = radius[..., None, None] * scale_px
    x = (columns + (offset_x - centre_x * scale_px)[..., None])[..., None, :] / radius_px
    y = (rows + (offset_y - centre_y * scale_px)[..., None])[..., :, None] / radius_px
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    parts, start = [], 0
    for name, count in zip(SHAPES, counts, strict=True):
        own = slice(start, start + count)
        start += count
        if count:
            right, down = x[own] * cos[own] + y[own] * sin[own], y[own] * cos[own] - x[own] * sin[own]
            parts.append(_DISTANCES[name](right, -down))
    return torch.cat(parts) * radius_px


def outline(distance_px: Tensor, scale_px: float) -> Tensor:
    """The distance to a line along the inside of a shape's edge, from the distance to the shape."""
    width_px = OUTLINE * scale_px
    return (distance_px + width_px / 2).abs() - width_px / 2


def paint(behind: Tensor, rgb: Tensor, distance_px: Tensor) -> Tensor:
    """Lay a shape over frames (n, 3, f, h, w); rgb is (n, 3), the edge is one pixel soft."""
    coverage = (0.5 - distance_px).clamp(0, 1)[:, None]
    return torch.lerp(behind, rgb[:, :, None, None, None].expand_as(behind), coverage.expand_as(behind))


def render(
    clips: Clips, height: int, width: int, device: torch.device | str = "cpu", is_outlined: bool = False
) -> Tensor:
    """Frames of whole clips in [-1, 1], float32 (n, 3, f, h, w)."""
    path = torch.from_numpy(clips.path).to(device)
    background = torch.from_numpy(clips.background).to(device)
    offset = torch.zeros(len(clips), 2, device=device)
    distance = distances(path, clips.shape_counts(), (height, width), min(height, width), offset)
    if is_outlined:
        distance = outline(distance, min(height, width))
    rows = ((torch.arange(height, device=device) + 0.5) / height).expand(len(clips), -1)
    behind = backdrop(background, rows)[:, :, None, :, None].expand(-1, -1, path.shape[1], -1, width)
    return paint(behind, torch.from_numpy(clips.rgb()).to(device), distance)


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames (n, 3, f, h, w) in [-1, 1] to uint8 (n, f, h, w, 3)."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
