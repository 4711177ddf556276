"""The defaults and bounds of a checkpoint, from its configs.

Values of a ``kinema.json`` beside ``model_index.json`` come first; for all others the architecture says which published
Wan model this is. Figures: Wan2.1 and Wan2.2 ``wan/configs`` and ``generate.py``, and the diffusers pages of the
checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kinema.engines.wan.configs import (
    SolverConfig,
    TransformerConfig,
    VaeConfig,
    check_steps,
    explain,
    quoted,
    validated,
)
from kinema.errors import ConfigError, RequestError
from kinema.request.capabilities import Capabilities, Limits, Preset, Tier
from kinema.request.fields import MAX_LORAS
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve_alone
from kinema.request.shapes import Size

OVERRIDES = "kinema.json"
# Wan is trained with prompts padded to this length; longer ones are cut off.
MAX_TEXT_TOKENS = 512

# The negative prompt that the Wan models were tuned with (Wan2.1 wan/configs/shared_config.py, sample_neg_prompt).
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_WAN_21 = Preset(
    size=Size(width=832, height=480),
    num_frames=81,
    fps=16,
    num_inference_steps=50,
    guidance_scale=5.0,
    flow_shift=3.0,
    negative_prompt=_NEGATIVE_PROMPT,
)
_WAN_21_IMAGE = _WAN_21.model_copy(update={"num_inference_steps": 40})
_SIZE_720P = {"size": Size(width=1280, height=720)}
_WAN_21_IMAGE_720P = _WAN_21_IMAGE.model_copy(update={**_SIZE_720P, "flow_shift": 5.0})
_WAN_21_FIRST_LAST = _WAN_21.model_copy(update={**_SIZE_720P, "flow_shift": 16.0})
_WAN_22_A14B = _WAN_21.model_copy(
    update={"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 12.0}
)
_WAN_22_A14B_IMAGE = _WAN_22_A14B.model_copy(update={"guidance_scale": 3.5, "guidance_scale_2": 3.5, "flow_shift": 5.0})
_WAN_22_TI2V = _WAN_21.model_copy(
    update={"size": Size(width=1280, height=704), "num_frames": 121, "fps": 24, "flow_shift": 5.0}
)
# The largest frame that any published Wan model was trained on.
_MAX_PIXELS = 1280 * 720
_MAX_FRAMES = 161
LIMIT_KEYS = ("max_pixels", "max_frames", "max_volume", "max_steps", "min_side")


def preset_of(
    name: str,
    root: Path,
    index: dict[str, Any],
    transformer: TransformerConfig,
    solver: SolverConfig,
    overrides: dict[str, Any],
) -> Preset:
    """The defaults of the checkpoint ``name``: ``flow_shift`` is its solver's own. Raises ConfigError for a
    ``kinema.json`` that does not fit.
    """
    published = _published(name, index, transformer)
    if solver.own_shift is not None:
        published = published.model_copy(update={"flow_shift": solver.own_shift})
    own = {key: value for key, value in overrides.items() if key not in LIMIT_KEYS}
    return validated(Preset, {**dict(published), **own}, root, OVERRIDES, is_strict=True)


def check_preset(root: Path, can: Capabilities) -> None:
    """Raises ConfigError when the model does not make its own defaults."""
    preset, limits = can.preset, can.limits
    least = -(-limits.min_side // limits.size_multiple) * limits.size_multiple
    if least**2 > limits.max_pixels:
        raise ConfigError(
            f"the model folder {root}: {OVERRIDES}: max_pixels = {limits.max_pixels} and min_side = {limits.min_side}: "
            f"the smallest size, {least}x{least}, has {least**2} pixels"
        )
    defaults = dict(preset) | {"size": str(preset.size)}
    experts = set() if can.has_two_experts else {"guidance_scale_2", "boundary_ratio"}
    fields = {
        key: value for key, value in defaults.items() if key in GenerationOptions.model_fields and key not in experts
    }
    try:
        options = GenerationOptions(prompt="a prompt", **fields)
        resolved = resolve_alone(options, can)
    except RequestError as exc:
        raise ConfigError(f"the model folder {root}: {OVERRIDES}: {exc.message}") from exc
    if resolved.request.num_frames != preset.num_frames:
        raise ConfigError(f"the model folder {root}: {OVERRIDES}: {resolved.warnings[0]}")


def tiers_of(root: Path, tables: object) -> tuple[Tier, ...]:
    """The tiers of a ``kinema.json``, from its table of tables. Raises ConfigError for one that does not fit."""
    where = f"the model folder {root}: {OVERRIDES}"
    if not isinstance(tables, dict):
        raise ConfigError(f"{where}: tiers = {quoted(tables)}: it must be an object with an object for each name")
    tiers = []
    for name, values in tables.items():
        if not isinstance(values, dict) or "name" in values:
            raise ConfigError(f"{where}: tiers.{quoted(name)} must be an object without a name in it")
        try:
            # By its JSON: there is no tuple in JSON, and a number in quotes is refused.
            tiers.append(Tier.model_validate_json(json.dumps({**values, "name": name}), strict=True))
        except ValidationError as exc:
            raise ConfigError(f"{where}: tiers.{quoted(name)}: {explain(exc)}") from exc
    return tuple(tiers)


def check_tiers(root: Path, can: Capabilities, num_train_timesteps: int) -> None:
    """Raises ConfigError for a tier that no request could have."""
    for tier in can.tiers:
        try:
            _check_tier(tier, can, num_train_timesteps)
        except (ValueError, RequestError) as exc:
            raise ConfigError(f"the model folder {root}: {OVERRIDES}: tiers.{tier.name}: {exc}") from exc


def _check_tier(tier: Tier, can: Capabilities, num_train_timesteps: int) -> None:
    """Raises ValueError or RequestError."""
    if tier.timesteps is not None and tier.num_inference_steps is not None:
        raise ValueError("give num_inference_steps or timesteps, and not both")
    check_steps(tier.solver, tier.timesteps, len(tier.timesteps or ()), num_train_timesteps)
    if len(tier.loras) > MAX_LORAS or len(tier.lora_names) < len(tier.loras):
        raise ValueError(f"loras must be at most {MAX_LORAS}, each once")
    if not can.has_two_experts and any(lora.scale_2 is not None for lora in tier.loras):
        raise ValueError("scale_2 is for models with two experts, and this one has one")
    # The folder of LoRAs is not known here.
    bare = can.model_copy(update={"tiers": (tier.model_copy(update={"loras": ()}),)})
    resolve_alone(GenerationOptions(prompt="a prompt", tier=tier.name), bare)


def limits_of(root: Path, transformer: TransformerConfig, vae: VaeConfig, overrides: dict[str, Any]) -> Limits:
    """The checkpoint's bounds. Sides are multiples of the VAE's factor times the patch, and of 16, as diffusers'
    WanPipeline wants them; frames are a multiple of the VAE's temporal factor plus 1.

    Raises ConfigError for a ``kinema.json`` that does not fit.
    """
    values = {
        "size_multiple": math.lcm(16, vae.scale_factor_spatial * transformer.patch_size[1]),
        "max_pixels": _MAX_PIXELS,
        "frame_step": vae.scale_factor_temporal,
        "max_frames": _MAX_FRAMES,
        "max_volume": _MAX_PIXELS * _MAX_FRAMES,
        "max_prompt_tokens": MAX_TEXT_TOKENS,
        **{key: overrides[key] for key in LIMIT_KEYS if key in overrides},
    }
    limits = validated(Limits, values, root, OVERRIDES, is_strict=True)
    if "max_volume" in overrides:
        return limits
    return limits.model_copy(update={"max_volume": limits.max_pixels * limits.max_frames})


def _published(name: str, index: dict[str, Any], transformer: TransformerConfig) -> Preset:
    if index.get("boundary_ratio") is not None:
        two_experts = _WAN_22_A14B_IMAGE if transformer.has_image_channels else _WAN_22_A14B
        return two_experts.model_copy(update={"boundary_ratio": float(index["boundary_ratio"])})
    if index.get("expand_timesteps"):
        return _WAN_22_TI2V
    published = _of_wan_21_image(name, transformer) if transformer.has_image_channels else _WAN_21
    if transformer.width in (1536, 5120):
        return published
    # An architecture that nobody published.
    return published.model_copy(update={"flow_shift": 1.0})


def _of_wan_21_image(name: str, transformer: TransformerConfig) -> Preset:
    """The preset of Wan 2.1 image-to-video. FLF2V alone has positions for two pictures; the others have one
    architecture, and differ by their names."""
    words = name.lower()
    if transformer.num_pictures > 1 or "flf2v" in words:
        return _WAN_21_FIRST_LAST
    return _WAN_21_IMAGE_720P if "720p" in words else _WAN_21_IMAGE
