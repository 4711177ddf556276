"""What the configs of a folder's networks say about its videos: their size and length.

Some pipelines of diffusers take their defaults from there, so one row of ``families.py`` has checkpoints of several
sizes (CogVideoX and CogVideoX 1.5). What such a checkpoint states comes before its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.engines.diffusers.families import Family
from kinema.engines.wan.configs import read_json
from kinema.request.shapes import Size

# Far above any published model: memory is taken by what a file says.
_MAX_SIDE, _MAX_PIXELS, _MIN_SIDE = 4096, 4 * 1280 * 720, 64


@dataclass(frozen=True)
class _Source:
    """Where a pipeline reads its defaults. ``sides`` are the keys of height and width in latent pixels, ``frames`` that
    of the length, and ``frame_factor`` is the number of frames for each of its units."""

    network: str
    sides: tuple[str, str] | None
    frames: str | None = None
    frame_factor: int = 1


_SIDES = ("sample_height", "sample_width")
_SQUARE = ("sample_size", "sample_size")
# From ``__call__`` of each pipeline of diffusers 0.42.1: ``height or self.transformer.config.sample_height * factor``.
_SOURCES = {
    **dict.fromkeys(
        ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
        _Source("transformer", _SIDES, "sample_frames"),
    ),
    "AllegroPipeline": _Source("transformer", _SIDES, "sample_frames", frame_factor=4),
    "LattePipeline": _Source("transformer", _SQUARE),
    **dict.fromkeys(
        ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "AnimateDiffSDXLPipeline", "TextToVideoSDPipeline"),
        _Source("unet", _SQUARE),
    ),
    "StableVideoDiffusionPipeline": _Source("unet", None, "num_frames"),
}


@dataclass(frozen=True)
class Stated:
    """The ``size`` and ``num_frames`` of the networks' configs, where they have any, and a sentence for each that this
    kind of model cannot make, which is left out."""

    preset: Mapping[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


def stated_in(path: Path, pipeline: str, family: Family) -> Stated:
    """What the folder at ``path`` states. Raises ConfigError for a file that cannot be read."""
    source = _SOURCES.get(pipeline)
    name = "" if source is None else f"{source.network}/config.json"
    if source is None or not (path / name).is_file():
        return Stated()
    config = read_json(path, name)
    size, num_frames = _size(path, config, source), _frames(config, source)
    found = {"size": size, "num_frames": num_frames}
    makes = {"size": _makes_size(family, size), "num_frames": _makes_frames(family, num_frames)}
    differences = (
        f"the model folder {path}: {name} is for a {key} of {value}, which this kind of model does not make here; "
        f"the default is {getattr(family.preset, key)}"
        for key, value in found.items()
        if value is not None and not makes[key]
    )
    return Stated({key: found[key] for key, is_made in makes.items() if is_made}, tuple(differences))


def _size(path: Path, config: Mapping[str, Any], source: _Source) -> Size | None:
    if source.sides is None:
        return None
    height, width = (_count(config.get(key)) for key in source.sides)
    if height is None or width is None:
        return None
    factor = _factor(path)
    return Size(width=width * factor, height=height * factor)


def _frames(config: Mapping[str, Any], source: _Source) -> int | None:
    value = None if source.frames is None else _count(config.get(source.frames))
    return None if value is None else value * source.frame_factor


def _factor(path: Path) -> int:
    """Pixels of a side for one latent pixel: each block of the VAE but the last halves the size."""
    blocks = (
        read_json(path, "vae/config.json").get("block_out_channels") if (path / "vae/config.json").is_file() else ()
    )
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 8 else 8


def _count(value: object) -> int | None:
    """A number that a size or a length may have; None for anything else."""
    return value if type(value) is int and 1 <= value <= _MAX_SIDE else None


def _makes_size(family: Family, size: Size | None) -> bool:
    if size is None:
        return False
    sides = (size.width, size.height)
    is_in_bounds = min(sides) >= _MIN_SIDE and max(sides) <= _MAX_SIDE and size.pixels <= _MAX_PIXELS
    is_listed = not family.sizes or str(size) in family.sizes
    return is_in_bounds and is_listed and all(side % family.size_multiple == 0 for side in sides)


def _makes_frames(family: Family, num_frames: int | None) -> bool:
    if num_frames is None or num_frames > family.max_frames:
        return False
    return num_frames >= (family.frame_offset or family.frame_step) and (
        (num_frames - family.frame_offset) % family.frame_step == 0
    )
