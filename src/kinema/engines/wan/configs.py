"""The parts of a checkpoint's JSON files that Kinema reads, checked when they are read.

They decide what a model can make and how this engine computes it.
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
    ffn_dim: PositiveInt = 13_824
    num_layers: PositiveInt = 40
    in_channels: PositiveInt
    out_channels: PositiveInt
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    text_dim: PositiveInt = 4096
    freq_dim: PositiveInt = 256
    rope_max_seq_len: PositiveInt = 1024
    eps: float = 1e-6
    # All published models have these norms.
    cross_attn_norm: Literal[True] = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    # Image-to-video models that also attend to CLIP's image states have it.
    added_kv_proj_dim: PositiveInt | None = None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class VaeConfig(_Config):
    """``vae/config.json``; the defaults are those of AutoencoderKLWan, and so is the spelling."""

    base_dim: PositiveInt = 96
    decoder_base_dim: PositiveInt | None = None
    z_dim: PositiveInt = 16
    dim_mult: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    num_res_blocks: PositiveInt = 2
    # No published model has attention besides that in the middle.
    attn_scales: tuple[()] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    patch_size: PositiveInt | None = None
    scale_factor_spatial: PositiveInt = 8
    scale_factor_temporal: PositiveInt = 4
    # Of Wan 2.1's VAE.
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels before the first level and after each of them."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels before the first level, which is the smallest in space, and after each of them."""
        base = self.decoder_base_dim or self.base_dim
        return tuple(base * factor for factor in (self.dim_mult[-1], *self.dim_mult[::-1]))


class TextEncoderConfig(_Config):
    """``text_encoder/config.json``; the defaults are those of UMT5Config."""

    vocab_size: PositiveInt = 250_112
    d_model: PositiveInt = 512
    d_kv: PositiveInt = 64
    d_ff: PositiveInt = 1024
    num_layers: PositiveInt = 8
    num_heads: PositiveInt = 6
    relative_attention_num_buckets: PositiveInt = 32
    relative_attention_max_distance: PositiveInt = 128
    layer_norm_epsilon: float = 1e-6
    # Another one would be another network.
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"


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
    num_train_timesteps: PositiveInt = 1000
    lower_order_final: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    shift_terminal: float | None = None
    # No published model has noise levels of these kinds.
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False


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
