"""Find a model for diffusers by its name and say, without torch, what it can make.

A model is a folder with a ``model_index.json`` that names a pipeline of the library. ``families.py`` says what that
makes; for any other pipeline ``kinema.json`` must say it, and its signature which inputs it takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from kinema.engines.diffusers.families import Family, family_of
from kinema.engines.diffusers.signatures import Signature, pipelines_folder, signature_of
from kinema.engines.diffusers.stated import Stated, stated_in
from kinema.engines.wan.checkpoint import is_component, locate, refuse_own_code
from kinema.engines.wan.configs import quoted, read_json, reading_files, require, validated
from kinema.engines.wan.fingerprint import sample_weights
from kinema.engines.wan.lora.keys import SECOND
from kinema.engines.wan.presets import LIMIT_KEYS, OVERRIDES, check_preset
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.engines.wan.tokenizer_files import refuse_unconverted
from kinema.engines.wan.weight_files import GGUF, files_in_folder, header_of, refuse_pickle, variant_of
from kinema.errors import ConfigError
from kinema.request.capabilities import Capabilities, Limits, Preset
from kinema.request.shapes import Size

_TEXTS = (".json", ".model", ".txt")
# A frame of 1280x720; families whose own preset is larger have that.
_MAX_PIXELS = 1280 * 720
_LIBRARIES = ("diffusers", "transformers")
# More of them crowd a film.
_MAX_REFERENCES = 4
# Beside one of these, a config.json belongs to what reads texts or pictures, without weights.
_OF_NO_NETWORK = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# What kinema.json must have for a pipeline without a row.
_REQUIRED = ("size", "num_frames", "fps", "num_inference_steps", "guidance_scale", "frame_step")
_TIERS = "tiers"
_BOUNDARY = "boundary_ratio"


class _Geometry(BaseModel):
    """The keys of ``kinema.json`` that say which videos a pipeline without a row makes."""

    model_config = ConfigDict(frozen=True)

    frame_step: PositiveInt
    frame_offset: NonNegativeInt = 1
    size_multiple: PositiveInt = 16


@dataclass(frozen=True)
class Model:
    """A folder of diffusers with its JSON files read.

    ``name`` is what clients call it. ``transformer`` is a file that is read in place of the folder of this name.
    """

    name: str
    path: Path
    index: dict[str, Any]
    family: Family
    overrides: dict[str, Any]
    flow_shift: float | None
    stated: Stated = field(default_factory=Stated)
    transformer: Path | None = None

    @property
    def pipeline(self) -> str:
        """The class that the folder names."""
        return str(self.index["_class_name"])

    @property
    def stored_bytes(self) -> int:
        """The size of all files of weights."""
        return sum(path.stat().st_size for path in self._files(".safetensors"))

    def variant(self) -> str | None:
        """The variant of the networks whose folders have no plain files, as ``fp16``; None where all have these.

        Raises ConfigError for two, of which the library reads one.
        """
        replaced = None if self.transformer is None else "transformer"
        names = [name for name in self.index if is_component(self.index, name) and name != replaced]
        networks = [name for name in names if _is_network(self.path / name)]
        found = {variant_of(files_in_folder(self.path, name)[0]): name for name in networks}
        found.pop(None, None)
        if len(found) > 1:
            told = " and ".join(f"{name} as {variant}" for variant, name in found.items())
            raise ConfigError(
                f"the model folder {self.path} has {told}, without plain files; diffusers reads one variant of a folder"
            )
        return next(iter(found), None)

    def weights_digest(self) -> str:
        """A digest of the components' files: small ones whole, weights by their header and the start of each tensor.

        Raises OSError or DamagedFile.
        """
        digest = hashlib.sha256()
        for path in self._files(*_TEXTS, ".safetensors"):
            name = "transformer" if path == self.transformer else path.relative_to(self.path).as_posix()
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            for part in [path.read_bytes()] if path.suffix in _TEXTS else sample_weights(path):
                digest.update(part)
        return digest.hexdigest()[:16]

    def capabilities(self) -> Capabilities:
        """What the model can make. Raises ConfigError for a ``kinema.json`` that does not fit."""
        family, overrides = self.family, dict(self.overrides)
        description = overrides.pop("description", "")
        can = validated(
            Capabilities,
            {
                "model": self.name,
                "engine": "diffusers",
                "is_text_to_video": family.text is not None or (family.control is not None and family.image is None),
                "is_image_to_video": family.image is not None,
                "is_first_last_frame_to_video": family.first_last is not None,
                "is_video_to_video": family.film is not None,
                "control_videos": tuple(family.controls.values()),
                "needs_control_video": family.needs_control,
                "max_reference_images": _MAX_REFERENCES if family.references else 0,
                "takes_conditioning": family.frames is not None,
                "edits_whole_films": not family.has_strength,
                "has_checkpoints": False,
                "has_previews": False,
                "has_sound": family.has_sound,
                "has_two_experts": self.has_two_experts,
                "fixed_options": self._fixed_options(),
                "description": description,
                "preset": self._preset(overrides),
                "limits": self._limits(overrides),
                "geometry": self.family.geometry,
            },
            self.path,
            OVERRIDES,
        )
        check_preset(self.path, can)
        return can

    @property
    def has_two_experts(self) -> bool:
        """Whether one transformer makes the first steps and another one the rest, as in Wan 2.2 A14B."""
        return is_component(self.index, SECOND) and self.index.get(_BOUNDARY) is not None

    def _fixed_options(self) -> tuple[str, ...]:
        absent = {"guidance_scale": self.family.has_guidance, "negative_prompt": self.family.has_negative_prompt}
        fixed = () if self.flow_shift is None else ("flow_shift",)
        if self.has_two_experts:  # pipelines take it from the folder
            fixed = (*fixed, _BOUNDARY)
        return (*fixed, *(name for name, is_taken in absent.items() if not is_taken))

    def _preset(self, overrides: dict[str, Any]) -> Preset:
        own = {key: value for key, value in overrides.items() if key not in (*LIMIT_KEYS, *_Geometry.model_fields)}
        self._check_experts(own)
        boundary = {_BOUNDARY: self.index[_BOUNDARY]} if self.has_two_experts else {}
        values = {**dict(self.family.preset), **self.stated.preset, "flow_shift": self.flow_shift, **boundary, **own}
        return validated(Preset, values, self.path, OVERRIDES, is_strict=True)

    def _check_experts(self, own: dict[str, Any]) -> None:
        """Raises ConfigError for what a ``kinema.json`` says of a second expert that is not there, or says otherwise
        than the folder."""
        where = f"the model folder {self.path}: {OVERRIDES}"
        boundary = self.index.get(_BOUNDARY)
        is_part = isinstance(boundary, (int, float)) and boundary is not True and 0 <= boundary <= 1
        if self.has_two_experts and not is_part:
            raise ConfigError(
                f"the model folder {self.path}: model_index.json: {_BOUNDARY} = {quoted(boundary)}: it must be a "
                "number from 0 to 1"
            )
        if not self.has_two_experts and (given := own.keys() & {"guidance_scale_2", _BOUNDARY}):
            raise ConfigError(
                f"{where} has {' and '.join(sorted(given))}, for a model with two experts; this one has no {SECOND} "
                f"with a {_BOUNDARY} in model_index.json, so leave it out"
            )
        if own.get(_BOUNDARY, boundary) != boundary:
            raise ConfigError(
                f"{where}: {_BOUNDARY} = {quoted(own[_BOUNDARY])}: it is {boundary} in model_index.json, which the "
                "pipeline reads; leave it out"
            )

    def _limits(self, overrides: dict[str, Any]) -> Limits:
        family = self.family
        size = self.stated.preset.get("size", family.preset.size)
        max_pixels, max_frames = max(_MAX_PIXELS, family.preset.size.pixels, size.pixels), family.max_frames
        values = {
            "size_multiple": family.size_multiple,
            "frame_step": family.frame_step,
            "frame_offset": family.frame_offset,
            "sizes": tuple(map(Size.parse, family.sizes)),
            "max_pixels": max_pixels,
            "max_frames": max_frames,
            "min_steps": family.min_steps,
            "max_prompt_tokens": family.prompt_tokens,
            **{key: value for key, value in overrides.items() if key in LIMIT_KEYS},
        }
        limits = validated(Limits, {"max_volume": 1, **values}, self.path, OVERRIDES, is_strict=True)
        if "max_volume" in values:
            return limits
        return limits.model_copy(update={"max_volume": limits.max_pixels * limits.max_frames})

    def _files(self, *suffixes: str) -> Iterator[Path]:
        components = sorted(name for name in self.index if is_component(self.index, name))
        for path in (path for name in components for path in sorted((self.path / name).rglob("*"))):
            is_replaced = self.transformer is not None and path.parent == self.path / "transformer"
            if path.suffix in suffixes and path.is_file() and not (is_replaced and path.suffix not in _TEXTS):
                yield path
        if self.transformer is not None:
            yield self.transformer


@reading_files()
def inspect(name: str, transformer: Path | None = None) -> Model:
    """The model of this name: a folder, or a hub repository, which is downloaded when it is not cached. With a
    ``transformer`` that file is read in place of the weights in the folder of this name.

    Raises ConfigError when it is not found, has code of its own, or is nothing that diffusers makes videos with.
    """
    name, path = locate(name)
    index = read_json(path, "model_index.json")
    if transformer is not None:
        _check_transformer(path, index, transformer)
    _check_components(path, index, is_replaced=transformer is not None)
    overrides = read_json(path, OVERRIDES) if (path / OVERRIDES).exists() else {}
    family = _family(path, index.get("_class_name"), overrides)
    stated = stated_in(path, str(index["_class_name"]), family)
    if overrides.pop(_TIERS, None):
        told = f"the model folder {path}: {OVERRIDES} has {_TIERS}, which are for the engine wan and not offered here"
        stated = replace(stated, differences=(*stated.differences, told))
    return Model(
        name=name,
        path=path,
        index=index,
        family=family,
        overrides=overrides,
        flow_shift=_flow_shift(path),
        stated=stated,
        transformer=transformer,
    )


def _check_transformer(path: Path, index: dict[str, Any], transformer: Path) -> None:
    """Raises ConfigError for a file that is no safetensors or GGUF, and for a model that has nothing of this name."""
    where = f"engine.diffusers.transformer = {str(transformer)!r}"
    if not is_component(index, "transformer"):
        raise ConfigError(f"{where}: the model folder {path} has no transformer; leave the setting out")
    if not transformer.is_file():
        raise ConfigError(f"{where}: no such file; give a .safetensors or {GGUF} file")
    refuse_pickle(transformer)
    try:
        header_of(transformer)
    except (OSError, DamagedFile) as exc:
        raise ConfigError(f"{where} cannot be read: {exc}") from exc


def _family(path: Path, pipeline: object, overrides: dict[str, Any]) -> Family:
    """The row of the pipeline, or one that is made of its signature. Raises ConfigError."""
    where = f"the model folder {path}: model_index.json: _class_name is {quoted(pipeline)}"
    family = family_of(str(pipeline)) if isinstance(pipeline, str) else None
    if family is not None:
        if family.needs is not None:
            raise ConfigError(
                f"{where}; {family.name} needs {family.needs}, which requests of this version do not have"
            )
        for key in _Geometry.model_fields:
            if overrides.get(key, own := getattr(family, key)) != own:
                raise ConfigError(
                    f"the model folder {path}: {OVERRIDES}: {key} = {quoted(overrides[key])}: it is {own} for every "
                    f"{family.name}; leave it out"
                )
        return family
    if not isinstance(pipeline, str) or (signature := signature_of(pipeline)) is None:
        raise ConfigError(
            f"{where}; the installed diffusers has no such pipeline, and code of a model's own is never run"
        )
    if not signature.has_bar:
        raise ConfigError(f"{where}, which does not say when a step is done, so its videos could not take turns")
    if missing := [key for key in _REQUIRED if key not in overrides]:
        raise ConfigError(
            f"{where}, whose videos are not known here; a {OVERRIDES} that says {', '.join(missing)} is missing"
        )
    return _family_of_signature(path, pipeline, signature, overrides)


def _family_of_signature(path: Path, pipeline: str, signature: Signature, overrides: dict[str, Any]) -> Family:
    """A row for a pipeline that nobody described. Raises ConfigError when it needs more than a prompt and a picture."""
    arguments, required = signature.arguments, signature.required
    if needed := required - {"prompt", "image"}:
        raise ConfigError(
            f"the model folder {path}: {pipeline} needs {', '.join(sorted(needed))}, which requests of this version do "
            "not have"
        )
    if "num_frames" not in arguments:
        raise ConfigError(f"the model folder {path}: {pipeline} takes no num_frames, so it makes no videos here")
    own = {key: overrides[key] for key in _Geometry.model_fields if key in overrides}
    geometry = validated(_Geometry, own, path, OVERRIDES, is_strict=True)
    defaults = {key: overrides[key] for key in _REQUIRED[:-1]}
    preset = validated(Preset, defaults, path, OVERRIDES, is_strict=True)
    return Family(
        name=pipeline,
        text=None if "image" in required else pipeline,
        image=pipeline if "image" in arguments else None,
        first_last=pipeline if {"image", "last_image"} <= arguments else None,
        preset=preset,
        preset_from=OVERRIDES,
        checkpoint=path.name,
        licence="",
        token_side=geometry.size_multiple,
        token_frames=geometry.frame_step,
        max_frames=max(161, preset.num_frames),
        prompt_tokens=signature.prompt_tokens,
        has_prompt="prompt" in arguments,
        has_guidance="guidance_scale" in arguments,
        has_negative_prompt="negative_prompt" in arguments,
        **dict(geometry),
    )


def _check_components(path: Path, index: dict[str, Any], *, is_replaced: bool) -> None:
    """Raises ConfigError for a component of another library, for code of the folder's own, which is never run, and for
    one whose files are missing."""
    for name, entry in index.items():
        if name.startswith("_") or not is_component(index, name):
            continue
        library = next(iter(entry), None)
        if not _is_of_diffusers(library):
            raise ConfigError(
                f"the model folder {path}: model_index.json: {name} is of the library {quoted(library)}; only "
                f"{' and '.join(_LIBRARIES)} are known, and code of a model's own is never run"
            )
        refuse_own_code(path, name)
        if is_replaced and name == "transformer":
            require(path, f"{name}/config.json")
        else:
            _check_files(path, name)
        refuse_unconverted(path, name)


def _check_files(path: Path, component: str) -> None:
    """Raises ConfigError when the component's folder is missing, or has no weights where it is of a network."""
    folder = path / component
    if not folder.is_dir():
        raise ConfigError(f"the model folder {path}: model_index.json names {component}, and that folder is missing")
    if _is_network(folder):
        files_in_folder(path, component)


def _is_network(folder: Path) -> bool:
    """Whether the component has weights."""
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in _OF_NO_NETWORK)


def _is_of_diffusers(library: object) -> bool:
    """Whether it is a library that is known, or that of one of diffusers' pipelines with classes of its own."""
    if not isinstance(library, str):
        return False
    folder = pipelines_folder()
    is_pipelines = folder is not None and library.isidentifier() and (folder / library / "__init__.py").is_file()
    return library in _LIBRARIES or library.startswith("diffusers.") or is_pipelines


def _flow_shift(path: Path) -> float | None:
    """The shift of the folder's solver, which no request changes here; None where it has none. Raises ConfigError for
    one that is no number above 0."""
    name = "scheduler/scheduler_config.json"
    config = read_json(path, name) if (path / name).is_file() else {}
    for key in ("flow_shift", "shift"):
        shift = config.get(key)
        if isinstance(shift, (int, float)) and shift is not True and 0 < shift < math.inf:
            return float(shift)
        if shift is not None:
            raise ConfigError(f"the model folder {path}: {name}: {key} = {quoted(shift)}: it must be a number above 0")
    return None
