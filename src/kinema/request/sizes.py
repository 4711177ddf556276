"""The size of a video, from the size that was asked for, the size of the input and what the model makes.

Pure arithmetic.
"""

from __future__ import annotations

import math

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.capabilities import Limits, Preset
from kinema.request.shapes import FilmShape, Size

# No Wan model was trained on longer strips; a longer image is cropped to this.
_MAX_ASPECT = 4.0


def choose_size(
    asked: str | None, preset: Preset, limits: Limits, image_size: Size | None = None, film: FilmShape | None = None
) -> Size:
    """Return the asked size, else the film's, else the image's shape at the preset's area, else the preset's.

    Raises InvalidRequest for a size that no model makes, UnsupportedRequest for one that this model does not make.
    """
    if asked is None:
        if film is not None and _is_made(film.size, limits):
            return film.size
        return _default_size(preset, limits, image_size if film is None else film.size)
    size = Size.parse(asked, preset.size)
    if limits.sizes and size not in limits.sizes:
        made = ", ".join(map(str, limits.sizes))
        raise UnsupportedRequest(f"size {size}: this model makes {made} alone", param="size")
    step = limits.size_multiple
    if min(size.width, size.height) < limits.min_side:
        raise UnsupportedRequest(
            f"size {size}: both sides must be at least {limits.min_side}{_instance(size, preset)}", param="size"
        )
    if size.pixels > limits.max_pixels:
        raise UnsupportedRequest(
            f"size {size} has {size.pixels} pixels; this model makes at most {limits.max_pixels}"
            f"{_instance(size, preset)}",
            param="size",
        )
    if size.width % step or size.height % step:
        raise InvalidRequest(
            f"size {size}: both sides must be multiples of {step}; the nearest is {_nearest_size(size, limits)}",
            param="size",
        )
    return size


def _instance(size: Size, preset: Preset) -> str:
    """An example; none when the model's own size is in question, as when its files are checked."""
    return "" if size == preset.size else f", for instance {preset.size}"


def _is_made(size: Size, limits: Limits) -> bool:
    if limits.sizes:
        return size in limits.sizes
    is_multiple = not (size.width % limits.size_multiple or size.height % limits.size_multiple)
    return is_multiple and min(size.width, size.height) >= limits.min_side and size.pixels <= limits.max_pixels


def _nearest_size(size: Size, limits: Limits) -> Size:
    """Return the nearest size that the model makes; both sides are rounded down where it would have too many pixels."""
    step = limits.size_multiple
    least = math.ceil(limits.min_side / step) * step
    nearest = Size(
        width=max(round_to(size.width, step), least),
        height=max(round_to(size.height, step), least),
    )
    if nearest.pixels <= limits.max_pixels:
        return nearest
    return Size(width=max(_floor_to(size.width, step), least), height=max(_floor_to(size.height, step), least))


def _default_size(preset: Preset, limits: Limits, image_size: Size | None) -> Size:
    """Return the preset's size, or the image's shape at its area (Wan2.1 ``wan/image2video.py``, ``max_area``)."""
    if image_size is None or preset.image_size == "fixed":
        return preset.size
    shape = min(max(image_size.height / image_size.width, 1 / _MAX_ASPECT), _MAX_ASPECT)
    step = limits.size_multiple
    height = _floor_to(math.sqrt(preset.size.pixels * shape), step)
    width = _floor_to(math.sqrt(preset.size.pixels / shape), step)
    return Size(width=max(width, limits.min_side), height=max(height, limits.min_side))


def round_to(value: float, step: int, low: int | None = None) -> int:
    """Return the multiple of ``step`` nearest to ``value``, ties upwards, and at least one step (or ``low``)."""
    return max(math.floor(value / step + 0.5) * step, step if low is None else low)


def _floor_to(value: float, step: int) -> int:
    return max(int(value) // step * step, step)
