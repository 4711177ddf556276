"""Whether a LoRA file fits a model, by its header alone: every tensor has its place in a transformer, or it is refused.

Nothing is left out in silence. One thing may be left out: changes of modules that the model does not have, when they
are zero. Trainers write them for norms. Only ``reading.py`` sees whether they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.engines.wan.lora.header import by_component, open_header, parse_keys, quoted, told
from kinema.engines.wan.lora.keys import FIRST, SECOND, Key, Kind, normal
from kinema.engines.wan.safetensors_header import Entry, Header
from kinema.errors import InvalidRequest
from kinema.request.json_text import parse_json

# The name and shape of every weight of a transformer, as ``transformer/shapes.py: shapes`` gives them.
Shapes = Mapping[str, tuple[int, ...]]

_FLOATS = ("F16", "BF16", "F32")
_NUMBERS = (*_FLOATS, "F64", "I64", "I32", "I16", "I8", "U8")


@dataclass
class Layer:
    """The keys of the tensors that change one module.

    ``shape`` is that of its weight: (out, in), also for the convolution that reads patches, else that of a norm or a
    table. ``scale`` is for a pair of matrices without an ``alpha``.
    """

    shape: tuple[int, ...]
    keys: dict[Kind, str] = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class Fit:
    """Where the tensors of a file belong.

    ``layers`` has, by the names of transformers, their modules by diffusers' names; two transformers that a file
    changes alike have the same mapping. ``zeros`` are the keys of tensors that must be zero, since the model does not
    have their modules.
    """

    layers: dict[str, dict[str, Layer]]
    zeros: tuple[str, ...]


def files_of(path: Path, only: str | None, second: Path | None) -> list[tuple[Path, str | None]]:
    """The files of a LoRA, and the transformer that each is for where that is said."""
    return [(path, only)] if second is None else [(path, FIRST), (second, SECOND)]


def check_fit(
    path: Path,
    transformers: Mapping[str, Shapes],
    *,
    only: str | None = None,
    second: Path | None = None,
    headers: Mapping[Path, Header] | None = None,
) -> None:
    """Raises InvalidRequest where ``read_lora`` does, except for values. It reads the headers alone, without torch, and
    none of those that are given."""
    known = headers or {}
    for file, component in files_of(path, only, second):
        fit(file.name, known.get(file) or open_header(file), transformers, component)


def fit(file: str, header: Header, transformers: Mapping[str, Shapes], only: str | None = None) -> Fit:
    """Where the tensors of a file belong in these transformers, which stand by the names of their folders.

    A file whose keys name no transformer is for all of them, or for ``only`` one. Raises InvalidRequest, with one
    sentence about what does not fit.
    """
    layers: dict[str, dict[str, Layer]] = {}
    zeros: list[str] = []
    for component, keys in by_component(parse_keys(file, header)).items():
        targets = _targets(file, component, only, transformers)
        distinct: list[Shapes] = []
        for target in targets:  # two experts have the same
            if transformers[target] not in distinct:
                distinct.append(transformers[target])
        placings = [_Placing(file, header, shapes, component or FIRST) for shapes in distinct]
        placed = [placing.place(keys) for placing in placings]
        layers |= dict.fromkeys(targets, placed[0][0])
        zeros += placed[0][1]
    return Fit(layers, tuple(zeros))


def _targets(file: str, component: str | None, only: str | None, transformers: Mapping[str, Shapes]) -> list[str]:
    """The transformers that the tensors of a component are for."""
    if component is not None and only is not None:
        raise InvalidRequest(
            f"the LoRA {file} says itself which transformer it is for, so it cannot be for {only} alone"
        )
    wanted = component or only
    if wanted is not None and wanted not in transformers:
        raise InvalidRequest(f"the LoRA {file} is for the {wanted} of a model with two experts; this model has one")
    return list(transformers) if wanted is None else [wanted]


@dataclass(frozen=True)
class _Placing:
    """Finds the places of a file's tensors in one transformer, whose name in the file's metadata is ``component``."""

    file: str
    header: Header
    shapes: Shapes
    component: str

    def place(self, keys: Mapping[str, Key]) -> tuple[dict[str, Layer], list[str]]:
        """The layers by the names of their modules, and the keys whose tensors must be zero."""
        known = {normal(name): name for name in map(_module_of, self.shapes)}
        layers: dict[str, Layer] = {}
        strange: list[str] = []
        zeros: list[str] = []
        for text, key in keys.items():
            module = known.get(normal(key.module))
            if module is None or not self._has_place(module, key.kind):
                (zeros if key.kind in ("weight", "bias") else strange).append(text)
                continue
            layer = layers.setdefault(module, Layer(self._shape_of(module)))
            if key.kind in layer.keys:
                raise self._refusal(f"has two tensors for one place: {told([layer.keys[key.kind], text])}")
            layer.keys[key.kind] = text
        for module, layer in layers.items():
            self._check(module, layer)
        self._check_types(keys)
        if strange or not layers:
            raise self._refusal(f"changes modules that this model does not have: {told(strange or zeros)}")
        self._scale(layers)
        return layers, zeros

    def _has_place(self, module: str, kind: Kind) -> bool:
        """Whether a change of that kind is possible: norms have no matrices, and some have no bias."""
        if kind in ("bias", "up_bias"):
            return f"{module}.bias" in self.shapes
        return kind == "weight" or len(self.shapes.get(f"{module}.weight", ())) > 1

    def _shape_of(self, module: str) -> tuple[int, ...]:
        shape = self.shapes.get(f"{module}.weight")
        if shape is None:
            return self.shapes[module]
        return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape

    def _check(self, module: str, layer: Layer) -> None:
        """Raises InvalidRequest for a tensor of another shape than the module needs."""
        entries = {kind: self.header.entries[text] for kind, text in layer.keys.items()}
        self._check_pair(module, layer, entries)
        if "alpha" in entries and math.prod(entries["alpha"].shape) != 1:
            raise self._refusal(f"has an alpha that is no single number: {quoted(layer.keys['alpha'])}")
        stored = self.shapes.get(f"{module}.weight", layer.shape)
        expected: dict[Kind, tuple[int, ...]] = {"weight": stored}
        expected |= dict.fromkeys(("bias", "up_bias"), self.shapes.get(f"{module}.bias", ()))
        for kind, shape in expected.items():
            if kind in entries and entries[kind].shape != shape:
                given = list(entries[kind].shape)
                what = "weight" if kind == "weight" else "bias"
                raise self._refusal(
                    f"is for another model: its {what} of {module} has the shape {given}, this model's {list(shape)}"
                )

    def _check_types(self, keys: Mapping[str, Key]) -> None:
        """Raises InvalidRequest for a tensor that cannot be read."""
        for text, key in keys.items():
            dtype, types = self.header.entries[text].dtype, _NUMBERS if key.kind == "alpha" else _FLOATS
            if dtype not in types:
                raise self._refusal(f"has {quoted(text)} in {dtype}; give {', '.join(types)}")

    def _check_pair(self, module: str, layer: Layer, entries: Mapping[Kind, Entry]) -> None:
        """Raises InvalidRequest unless there are two matrices that fit, or none and nothing that belongs to them."""
        down, up = entries.get("down"), entries.get("up")
        if down is None or up is None:
            if lonely := [text for kind, text in layer.keys.items() if kind in ("down", "up", "up_bias", "alpha")]:
                raise self._refusal(f"has {told(lonely)} without the other matrix of the pair")
            return
        kernel = self.shapes[f"{module}.weight"][2:]
        is_convolution = len(down.shape) == len(up.shape) == 2 + len(kernel)
        if not len(down.shape) == len(up.shape) == 2 and not is_convolution:
            what = "is a Conv LoRA" if len(down.shape) > 2 else "has a tensor that is no matrix"
            raise self._refusal(f"{what}: {quoted(layer.keys['down'])} has the shape {list(down.shape)}")
        rank = down.shape[0]
        if rank == 0 or up.shape[1] != rank:
            keys = told([layer.keys["down"], layer.keys["up"]])
            raise self._refusal(f"has the ranks {rank} and {up.shape[1]} in {keys}; both must be the same, at least 1")
        if down.shape[2:] not in ((), kernel) or math.prod(up.shape[2:]) != 1:
            given = list(down.shape[2:])
            raise self._refusal(
                f"is for another model: its patches have the shape {given}, this model's {list(kernel)}"
            )
        outs, ins = up.shape[0], math.prod(down.shape[1:])
        if (outs, ins) != layer.shape:
            raise self._refusal(
                f"is for another model: its {module} has {ins} inputs and {outs} outputs, "
                f"this model's {layer.shape[1]} and {layer.shape[0]}"
            )

    def _scale(self, layers: Mapping[str, Layer]) -> None:
        """Set the scales that PEFT's settings give, which diffusers writes into a file's metadata."""
        settings = _adapter_settings(self.header.metadata, self.component)
        for module, layer in layers.items():
            if "down" in layer.keys and (alpha := self._alpha_of(module, settings)) is not None:
                rank = self.header.entries[layer.keys["down"]].shape[0]
                layer.scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _alpha_of(self, module: str, settings: Mapping[str, Any]) -> float | None:
        alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern")
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            # PEFT matches it as a pattern. From a file it is taken as a name, or the end of one.
            if module == name or module.endswith(f".{name}"):
                alpha = value
        if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
            raise self._refusal(f"has a lora_alpha in its metadata that is no number: {quoted(alpha)}")
        return alpha

    def _refusal(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"the LoRA {self.file} {what}")


def _module_of(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".bias")


def _adapter_settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """PEFT's settings for a transformer; empty when there are none."""
    try:
        values = parse_json(metadata.get("lora_adapter_metadata", "{}"), "it", max_fields=None)
    except (InvalidRequest, TypeError, AttributeError):
        return {}
    named = values.items() if isinstance(values, dict) else ()
    return {name.removeprefix(f"{component}."): value for name, value in named}
