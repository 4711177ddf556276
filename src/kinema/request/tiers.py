"""The tiers of a model: from the name that a client gives to the values of a request.

A request is complete without its tier. So a video can be made again by its values when the model has other tiers.
"""

from __future__ import annotations

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.capabilities import Capabilities, Tier
from kinema.request.options import GenerationOptions, LoraAsk

# The values that a tier may set, besides its LoRAs.
TIER_VALUES = ("num_inference_steps", "timesteps", "guidance_scale", "guidance_scale_2", "flow_shift", "solver")
_MAX_TOLD = 5


def named_tier(options: GenerationOptions, name: str | None) -> GenerationOptions:
    """The options with the tier that the model's name has behind an @. Raises InvalidRequest when they name another."""
    if name is None or name in (options.tier, options.kept_tier):
        return options
    if options.tier is not None:
        raise InvalidRequest("tier and the tier in model differ; send one of them", param="tier")
    return options.model_copy(update={"tier": name})


def apply_tier(options: GenerationOptions, can: Capabilities) -> GenerationOptions:
    """The options with the values of their tier where they have none, and its LoRAs before their own.

    Raises UnsupportedRequest for a tier that is not offered, and for an option that contradicts it.
    """
    if not options.tier:
        _check_kept(options, can)
        return options
    tier = _find(options.tier, can)
    _check_guidance(options, tier)
    if tier.timesteps is not None:
        _check_listed(options, tier)
    values = {name: getattr(tier, name) for name in TIER_VALUES if getattr(options, name) is None}
    if tier.timesteps is not None:
        values["num_inference_steps"] = len(tier.timesteps)
    own, asked = {lora.name for lora in tier.loras}, options.loras or ()
    for ask in asked:
        if ask.name in own:
            raise UnsupportedRequest(
                f"the tier {tier.name} has the LoRA {ask.name} with its own strength; leave that out", param="loras"
            )
    loras = (*(LoraAsk(**lora.model_dump()) for lora in tier.loras), *asked)
    return options.model_copy(update=values | {"loras": loras})


def _find(name: str, can: Capabilities) -> Tier:
    tier = next((tier for tier in can.tiers if tier.name == name), None)
    offered = can.offered_tiers
    if tier is None:
        there = ", ".join(tier.name for tier in offered[:_MAX_TOLD])
        hint = f"there are {there}" if there else "leave tier out"
        raise UnsupportedRequest(f"{can.model} has no tier {name[:100]!a} here; {hint}", param="tier")
    if tier not in offered:
        here = {info.name for info in can.loras}
        gone = ", ".join(lora.name for lora in tier.loras if lora.name not in here)
        raise UnsupportedRequest(
            f"the tier {name} of {can.model} is not offered now: it needs LoRAs that are not here ({gone})",
            param="tier",
        )
    return tier


def _check_kept(options: GenerationOptions, can: Capabilities) -> None:
    """Raises UnsupportedRequest where values of a video that is made again do not go together."""
    if options.timesteps is not None and options.num_inference_steps != len(options.timesteps):
        raise UnsupportedRequest(
            f"num_inference_steps must be {len(options.timesteps)}: the video has a timestep for each; leave it out, "
            "or name another tier",
            param="num_inference_steps",
        )
    kept = next((tier for tier in can.tiers if tier.name == options.kept_tier), None)
    if kept is not None:
        _check_guidance(options, kept)


def _check_guidance(options: GenerationOptions, tier: Tier) -> None:
    """A model that was distilled to run without guidance is not run with it."""
    if (options.guidance_scale or 0) > 1 and tier.guidance_scale is not None and tier.guidance_scale <= 1:
        raise UnsupportedRequest(
            f"the tier {tier.name} is made without guidance; leave guidance_scale out, or leave tier out",
            param="guidance_scale",
        )


def _check_listed(options: GenerationOptions, tier: Tier) -> None:
    """The noise levels of a tier that lists its timesteps are fixed: their number, and the shift that moves them."""
    assert tier.timesteps is not None
    fixed = {"num_inference_steps": len(tier.timesteps), "flow_shift": tier.flow_shift}
    for name, has in fixed.items():
        if getattr(options, name) not in (None, has):
            raise UnsupportedRequest(
                f"the tier {tier.name} has timesteps of its own; leave {name} out, or leave tier out", param=name
            )
