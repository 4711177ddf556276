"""Find a checkpoint by name and say, without torch, what it is and whether it is whole.

A checkpoint is a folder in the diffusers layout. The bundled tiny model is one; so is every ``Wan-AI/...-Diffusers``
repository of the hub. Reading the small JSON files is enough to know what the model can make, so a bad folder stops
the start in milliseconds, before a single weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.capabilities import Capabilities
from kinema.engines.wan.presets import limits_of, preset_of
from kinema.errors import ConfigError

BUNDLED = {"tiny-wan": Path(__file__).parent / "tiny"}
# What a hub download takes: weights as safetensors only, never a pickle.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_TOKENIZERS = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder, its configs parsed."""

    name: str
    path: Path
    index: dict[str, Any]
    transformer: dict[str, Any]
    vae: dict[str, Any]
    solver: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def is_expand_timesteps(self) -> bool:
        """Wan 2.2 TI2V: every token has its own timestep, so a clean first frame can stand among noisy ones."""
        return bool(self.index.get("expand_timesteps", False))

    @property
    def has_two_experts(self) -> bool:
        return is_component(self.index, "transformer_2")

    def capabilities(self) -> Capabilities:
        overrides = dict(self.overrides)
        description = overrides.pop("description", "")
        return Capabilities(
            model=self.name,
            engine="wan",
            is_text_to_video=True,
            is_image_to_video=self.is_expand_timesteps,
            has_two_experts=self.has_two_experts,
            preset=preset_of(self.index, self.transformer, self.solver, overrides),
            limits=limits_of(self.transformer, self.vae, overrides),
            description=description,
        )


def inspect(name: str) -> Checkpoint:
    """The checkpoint of this name: a bundled name, a folder, or a hub repository (downloaded when it is not cached).

    Raises ConfigError when it is not found, is incomplete (names the missing file), or is no Wan text-to-video model.
    """
    path = _locate(name)
    index = _read_json(path / "model_index.json", path)
    components = ["transformer", "vae", "text_encoder"]
    if is_component(index, "transformer_2"):
        components.append("transformer_2")
    for component in components:
        _check_weights(path / component, path)
    _check_tokenizer(path)
    checkpoint = Checkpoint(
        name=name,
        path=path,
        index=index,
        transformer=_read_json(path / "transformer" / "config.json", path),
        vae=_read_json(path / "vae" / "config.json", path),
        solver=_read_json(path / "scheduler" / "scheduler_config.json", path),
        overrides=_read_json(path / "kinema.json", path) if (path / "kinema.json").exists() else {},
    )
    _check_supported(checkpoint)
    return checkpoint


def is_component(index: dict[str, Any], name: str) -> bool:
    """model_index.json lists an absent component as [null, null]."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _locate(name: str) -> Path:
    if name in BUNDLED:
        return BUNDLED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = ", ".join(BUNDLED)
        raise ConfigError(f"engine.model = {name!r}: no such folder; give a folder, a hub name or one of: {known}")
    return _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub names need the hub's client

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as exc:
        raise ConfigError(f"engine.model = {name!r}: hub names need pip install 'kinema[wan]'") from exc
    except Exception as exc:  # the hub client raises many kinds; all mean that the folder is not to be had
        raise ConfigError(f"engine.model = {name!r}: no such folder, and the hub did not give it: {exc}") from exc


def _read_json(file: Path, root: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"the model folder {root} is incomplete: {file.relative_to(root)} is missing")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the model folder {root}: {file.relative_to(root)} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"the model folder {root}: {file.relative_to(root)} is not a JSON object")
    return value


def _check_weights(folder: Path, root: Path) -> None:
    _read_json(folder / "config.json", root)
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    for name in _WEIGHTS:
        shard_list = folder / f"{name}.index.json"
        if shard_list.is_file():
            shards = sorted(set(_read_json(shard_list, root)["weight_map"].values()))
            for shard in shards:
                _require(folder / shard, root)
            return
    expected = _WEIGHTS[1] if folder.name == "text_encoder" else _WEIGHTS[0]
    _require(folder / expected, root)


def _check_tokenizer(root: Path) -> None:
    _require(root / "tokenizer" / "tokenizer_config.json", root)
    if not any((root / "tokenizer" / name).is_file() for name in _TOKENIZERS):
        _require(root / "tokenizer" / _TOKENIZERS[0], root)


def _require(file: Path, root: Path) -> None:
    if not file.is_file():
        raise ConfigError(f"the model folder {root} is incomplete: {file.relative_to(root)} is missing")


def _check_supported(checkpoint: Checkpoint) -> None:
    config = checkpoint.transformer
    class_name = config.get("_class_name")
    if class_name != "WanTransformer3DModel":
        raise ConfigError(f"{checkpoint.name} is a {class_name}; the wan engine runs WanTransformer3DModel")
    if config.get("in_channels") != config.get("out_channels"):
        raise ConfigError(
            f"{checkpoint.name} is a channel-conditioned image-to-video model; this version runs "
            "text-to-video and TI2V checkpoints"
        )
