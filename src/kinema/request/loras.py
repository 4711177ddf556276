"""The LoRAs of a request: from the names that a client gives to those that the model has now.

A client gives names, never paths. A request keeps the digest of each, so that another file of the same name is never
taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.capabilities import Capabilities, LoraInfo
from kinema.request.fields import MAX_LORAS
from kinema.request.options import GenerationOptions, LoraAsk
from kinema.request.request import LoraUse

MAX_SCALE = 10.0
# An error names so many of the LoRAs that there are.
_MAX_TOLD = 5


def resolve_loras(asked: Sequence[LoraAsk], can: Capabilities, warnings: list[str]) -> tuple[LoraUse, ...]:
    """The LoRAs with their digests and strengths. One whose strength is 0 is left out, and ``warnings`` say so.

    Raises InvalidRequest for a name that is given twice, too many LoRAs or a strength out of range, UnsupportedRequest
    for a LoRA that the model does not have, or no longer has.
    """
    if len(asked) > MAX_LORAS:
        raise InvalidRequest(f"loras has {len(asked)} entries; at most {MAX_LORAS} are used together", param="loras")
    names = [ask.name for ask in asked]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"the LoRA {name[:100]!a} is given more than once", param="loras")
    uses = []
    for ask in asked:
        info = _find(ask, can)
        use = LoraUse(
            name=info.name,
            digest=info.digest,
            scale=_scale("scale", ask, ask.scale, info.scale),
            scale_2=None if ask.scale_2 is None else _scale("scale_2", ask, ask.scale_2, 0.0),
        )
        if any(_strengths(use, info)):
            uses.append(use)
        else:
            warnings.append(f"the LoRA {info.name} was left out: its strength is 0")
    return tuple(uses)


def split_model(model: str, known: Collection[str]) -> tuple[str, str | None, tuple[str, ...]]:
    """Take ``base@tier``, ``base:lora,lora2`` or ``base@tier:lora`` apart, where ``base`` is a known model. A model's
    own name wins. Spaces around names do not count."""
    before, colon, names = model.rpartition(":")
    for head, loras in (
        (model, ()),
        *([(before.rstrip(), tuple(name.strip() for name in names.split(",")))] if colon else []),
    ):
        base, _, tier = (part.strip() for part in head.rpartition("@"))
        if head in known:
            return head, None, loras
        if tier and ":" not in tier and base in known:
            return base, tier, loras
    return model, None, ()


def with_loras(options: GenerationOptions, names: Sequence[str]) -> GenerationOptions:
    """The options with these LoRAs before their own. One that they have already stays as they have it."""
    own = options.loras or ()
    added = [LoraAsk(name=name) for name in names if name not in {ask.name for ask in own}]
    return options.model_copy(update={"loras": (*added, *own)}) if added else options


def merge_loras(can: Capabilities, other: Capabilities) -> Capabilities:
    """The capabilities with the LoRAs that another worker of the model has beside theirs."""
    if can.loras == other.loras:
        return can
    by_name = {info.name: info for info in (*other.loras, *can.loras)}
    return can.model_copy(update={"loras": tuple(by_name[name] for name in sorted(by_name))})


def _find(ask: LoraAsk, can: Capabilities) -> LoraInfo:
    if not can.loras:
        raise UnsupportedRequest(
            f"{can.model} has no LoRAs here; leave loras out, or send an empty list", param="loras"
        )
    info = next((info for info in can.loras if info.name == ask.name), None)
    if info is None:
        there = ", ".join(info.name for info in can.loras[:_MAX_TOLD])
        more = len(can.loras) - _MAX_TOLD
        there += f" and {more} more" if more > 0 else ""
        raise UnsupportedRequest(f"{can.model} has no LoRA {ask.name[:100]!a}; there are {there}", param="loras")
    if ask.digest not in (None, info.digest):
        raise UnsupportedRequest(
            f"the LoRA {info.name} is not the file that is asked for: its digest is {info.digest}", param="loras"
        )
    if ask.scale_2 is not None and not can.has_two_experts:
        raise UnsupportedRequest(
            f"scale_2 of the LoRA {info.name} is for models with two experts; {can.model} has one", param="loras"
        )
    return info


def _scale(field: str, ask: LoraAsk, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and abs(value) <= MAX_SCALE):
        raise InvalidRequest(
            f"{field} of the LoRA {ask.name} must be a number from {-MAX_SCALE:g} to {MAX_SCALE:g}", param="loras"
        )
    return float(value)


def _strengths(use: LoraUse, info: LoraInfo) -> Sequence[float]:
    """The strengths that have an effect."""
    first, second = use.scale, use.scale if use.scale_2 is None else use.scale_2
    match info.is_for:
        case "both":
            return first, second
        case "low_noise":
            return (second,)
    return (first,)
