"""The parts of a checkpoint's JSON files that Kinema reads, checked when they are read.

They decide what a model can make and whether this engine can run it; diffusers reads the rest itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from kinema.errors import ConfigError, InvalidRequest

M = TypeVar("M", bound=BaseModel)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True)


class IndexConfig(_Config):
    """``model_index.json``."""

    boundary_ratio: float | None = None
    expand_timesteps: bool = False


class TransformerConfig(_Config):
    """``transformer/config.json``; the defaults are those of WanTransformer3DModel."""

    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt
    ffn_dim: PositiveInt = 13_824  # as diffusers has it
    in_channels: PositiveInt
    out_channels: PositiveInt
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    # All published models have this norm.
    cross_attn_norm: Literal[True] = True
    # Image-to-video models that also attend to CLIP's image states have it.
    added_kv_proj_dim: PositiveInt | None = None


class VaeConfig(_Config):
    """``vae/config.json``; the defaults are those of AutoencoderKLWan."""

    scale_factor_spatial: PositiveInt = 8
    scale_factor_temporal: PositiveInt = 4


class SolverConfig(_Config):
    """``scheduler/scheduler_config.json``, for the solver that ``solver.py`` computes; another one would make noise.

    A dynamic shift is refused, since it would be computed from the video's size in place of the request's
    ``flow_shift``. The defaults are those of UniPCMultistepScheduler.
    """

    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    use_dynamic_shifting: Literal[False] = False
    flow_shift: float | None = None
    solver_order: Literal[1, 2] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: Literal[True] = True
    thresholding: Literal[False] = False
    disable_corrector: tuple[()] = ()
    solver_p: None = None


class ShardList(_Config):
    """``*.safetensors.index.json``: the file of each weight."""

    weight_map: dict[str, str]


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The object in the file ``name`` of the folder ``root``. Raises ConfigError when it cannot be read."""
    require(root, name)
    try:
        value = json.loads((root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the model folder {root}: {name} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"the model folder {root}: {name} is not a JSON object")
    return value


def require(root: Path, name: str) -> None:
    """Raises ConfigError when the folder does not have the file."""
    if not (root / name).is_file():
        raise ConfigError(f"the model folder {root} is incomplete: {name} is missing")


def validated(model: type[M], values: dict[str, Any], root: Path, name: str, *, is_strict: bool = False) -> M:
    """The values, validated by a model. Raises ConfigError with one sentence that names the file and the key.

    With ``is_strict``, a number in quotes is refused.
    """
    try:
        return model.model_validate(values, strict=is_strict)
    except InvalidRequest as exc:
        raise ConfigError(f"the model folder {root}: {name}: {exc.message}") from exc
    except ValidationError as exc:
        raise ConfigError(f"the model folder {root}: {name}: {_explain(exc)}") from exc


def _explain(exc: ValidationError) -> str:
    error = exc.errors()[0]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {error['input']!r}: {error['msg']}"
