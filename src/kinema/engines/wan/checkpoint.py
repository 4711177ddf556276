"""Find a checkpoint by its name and say, without torch, what it can make and whether it is whole.

A checkpoint is a folder in the diffusers layout. The bundled tiny model is one, and so is every
``Wan-AI/...-Diffusers`` repository of the hub. Its small JSON files say what the model can make, so a bad folder stops
the start in milliseconds, before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.engines.wan.configs import (
    IndexConfig,
    ShardList,
    SolverConfig,
    TransformerConfig,
    VaeConfig,
    read_json,
    require,
    validated,
)
from kinema.engines.wan.presets import OVERRIDES, check_preset, limits_of, preset_of
from kinema.errors import ConfigError
from kinema.request.capabilities import Capabilities

BUNDLED = {"tiny-wan": Path(__file__).parent / "tiny"}
# The files that are downloaded from the hub: weights as safetensors only, never a pickle.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_TOKENIZERS = ("tokenizer.json", "spiece.model")
# What diffusers calls a Wan checkpoint whose first frame, if any, comes among the tokens.
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_TRANSFORMER = "transformer/config.json"
_SOLVER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with its configs parsed.

    ``name`` is what clients call the model: the bundled or hub name, or the folder's own name without its path, which
    is no client's business. ``solver`` is the scheduler's config as it was read. ``cache`` is a folder where smaller
    copies of the weights may be kept (``weights_cache.py``).
    """

    name: str
    path: Path
    index: dict[str, Any]
    transformer: TransformerConfig
    vae: VaeConfig
    solver: dict[str, Any]
    overrides: dict[str, Any]
    cache: Path | None = None

    @property
    def is_expand_timesteps(self) -> bool:
        """Whether every token has its own timestep, so that a clean first frame can stand among noisy ones (Wan 2.2
        TI2V).
        """
        return bool(self.index.get("expand_timesteps", False))

    @property
    def has_two_experts(self) -> bool:
        return is_component(self.index, "transformer_2")

    @property
    def is_image_conditioned(self) -> bool:
        """Whether the first frame comes in channels of its own, and by CLIP (Wan 2.1 and 2.2 image-to-video)."""
        transformer = self.transformer
        return transformer.in_channels != transformer.out_channels or transformer.added_kv_proj_dim is not None

    def capabilities(self) -> Capabilities:
        """What the model can make. Raises ConfigError for a ``kinema.json`` that does not fit."""
        overrides = dict(self.overrides)
        values = {
            "model": self.name,
            "engine": "wan",
            "is_image_to_video": self.is_expand_timesteps,
            "is_video_to_video": True,
            "has_two_experts": self.has_two_experts,
            "description": overrides.pop("description", ""),
            "preset": preset_of(self.path, self.index, self.transformer, self.solver, overrides),
            "limits": limits_of(self.path, self.transformer, self.vae, overrides),
        }
        can = validated(Capabilities, values, self.path, OVERRIDES)
        check_preset(self.path, can)
        return can


def inspect(name: str, *, is_image_conditioned_allowed: bool = False) -> Checkpoint:
    """The checkpoint of this name: a bundled name, a folder, or a hub repository (downloaded when it is not cached).

    Raises ConfigError when it is not found, is incomplete (names the missing file), or is no Wan model; and for an
    image-conditioned model, unless that is allowed.
    """
    name, path = _locate(name)
    index = read_json(path, "model_index.json")
    components = ["transformer", "vae", "text_encoder"]
    components += [name for name in ("transformer_2", "image_encoder") if is_component(index, name)]
    for component in components:
        _check_weights(path, component)
    _check_tokenizer(path)
    checkpoint = read_configs(name, path)
    if not is_image_conditioned_allowed:
        _check_kind(checkpoint)
    return checkpoint


def read_configs(name: str, path: Path) -> Checkpoint:
    """The checkpoint that a folder's configs describe, without a look for its weights. Raises ConfigError."""
    index = read_json(path, "model_index.json")
    validated(IndexConfig, index, path, "model_index.json")
    return Checkpoint(
        name=name,
        path=path,
        index=index,
        transformer=_read_transformer(path),
        vae=validated(VaeConfig, read_json(path, "vae/config.json"), path, "vae/config.json"),
        solver=_read_solver(path),
        overrides=read_json(path, OVERRIDES) if (path / OVERRIDES).exists() else {},
    )


def _check_kind(checkpoint: Checkpoint) -> None:
    """Raises ConfigError for a checkpoint of another pipeline than the wan engine's own."""
    folder = f"the model folder {checkpoint.path}"
    if checkpoint.is_image_conditioned:
        raise ConfigError(
            f"{folder} has a channel-conditioned image-to-video model; the wan engine runs text-to-video and TI2V "
            "checkpoints, and the engine sglang this one"
        )
    found = checkpoint.index.get("_class_name")
    if found is not None and found not in _PIPELINES:
        accepted = ", ".join(_PIPELINES)
        raise ConfigError(f"{folder}: model_index.json: _class_name is {found!r}; the wan engine runs {accepted}")


def is_component(index: dict[str, Any], name: str) -> bool:
    """Whether the model has the component; model_index.json lists an absent one as [null, null]."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _locate(name: str) -> tuple[str, Path]:
    """The model's name and its folder."""
    if name in BUNDLED:
        return name, BUNDLED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = ", ".join(BUNDLED)
        raise ConfigError(f"engine.model = {name!r}: no such folder; give a folder, a hub name or one of: {known}")
    return name, _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub names need the hub's client

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as exc:
        raise ConfigError(f"engine.model = {name!r}: hub names need pip install 'kinema[wan]'") from exc
    except Exception as exc:  # the hub client raises many kinds; all mean that there is no folder
        raise ConfigError(f"engine.model = {name!r}: no such folder, and the hub did not give it: {exc}") from exc


def _check_weights(root: Path, component: str) -> None:
    read_json(root, f"{component}/config.json")
    weight_files(root, component)


def weight_files(root: Path, component: str) -> list[Path]:
    """The component's file of weights, or all its shards. Raises ConfigError when one is missing."""
    for weights in (f"{component}/{name}" for name in _WEIGHTS):
        if (root / weights).is_file():
            return [root / weights]
        shard_list = f"{weights}.index.json"
        if (root / shard_list).is_file():
            shards = validated(ShardList, read_json(root, shard_list), root, shard_list).weight_map.values()
            names = [f"{component}/{shard}" for shard in sorted(set(shards))]
            for name in names:
                require(root, name)
            return [root / name for name in names]
    name = f"{component}/{_WEIGHTS[component.endswith('_encoder')]}"
    require(root, name)
    return [root / name]


def _check_tokenizer(root: Path) -> None:
    require(root, "tokenizer/tokenizer_config.json")
    if not any((root / "tokenizer" / name).is_file() for name in _TOKENIZERS):
        require(root, f"tokenizer/{_TOKENIZERS[0]}")


def _read_transformer(root: Path) -> TransformerConfig:
    values = read_json(root, _TRANSFORMER)
    _check_class(values, "WanTransformer3DModel", root, _TRANSFORMER)
    return validated(TransformerConfig, values, root, _TRANSFORMER)


def _read_solver(root: Path) -> dict[str, Any]:
    values = read_json(root, _SOLVER)
    _check_class(values, "UniPCMultistepScheduler", root, _SOLVER)
    validated(SolverConfig, values, root, _SOLVER)
    return values


def _check_class(config: dict[str, Any], expected: str, root: Path, name: str) -> None:
    found = config.get("_class_name")
    if found != expected:
        raise ConfigError(f"the model folder {root}: {name}: _class_name is {found!r}; the wan engine runs {expected}")
