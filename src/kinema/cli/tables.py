"""What ``kinema models`` and ``kinema config`` print: blocks for people, tab-separated lines or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kinema.cli.jobs_view import print_plain
from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.engines.registry import known_models, lora_names, stored_bytes_of
from kinema.request.capabilities import Capabilities, Preset, Tier
from kinema.settings import EngineSettings
from kinema.settings_sources import SettingRow

_INDENT = (0, 0, 0, 4)


def show_models(settings: EngineSettings, out: Console) -> None:
    """Show the models that can be served from here without a download. Raises ConfigError."""
    for can, own in known_models(settings):
        facts, names = [*_facts_of(can), ("memory", _memory_of(own))], lora_names(own)
        loras, tiers = ", ".join(names), "; ".join(_told(tier) for tier in can.tiers if tier.lora_names <= set(names))
        if not out.is_terminal:
            print_plain("\t".join([can.model, *(value for _name, value in facts), can.description, loras, tiers]))
            continue
        out.print(Text(can.model, "bold"))
        if can.description:
            out.print(Padding(Text(can.description), _INDENT), soft_wrap=False)
        for name, value in [*facts, ("LoRAs", loras or "none"), ("tiers", tiers or "none")]:
            out.print(Padding(Text(f"{name:<12}{value}"), _INDENT), soft_wrap=False)
    if out.is_terminal:
        out.print("\nOther checkpoints in diffusers' format: --model FOLDER or HUB/NAME; --families lists their kinds")


def show_families(out: Console) -> None:
    """Show the kinds of models that the engine diffusers runs, and what the known others need."""
    for family in FAMILIES:
        takes = ", ".join(family.modes) if family.needs is None else f"not served: it needs {family.needs}"
        facts = {
            "made from": takes,
            "by default": _default_of(family.preset),
            "preset from": family.preset_from,
            "for instance": family.checkpoint,
            "memory": memory_of(family),
            "licence": family.licence,
            "also needs": f"the packages {', '.join(family.packages)}" if family.packages else "",
        }
        if not out.is_terminal:
            print_plain("\t".join([family.name, *facts.values()]))
            continue
        out.print(Text(family.name, "bold"))
        for name, value in facts.items():
            if value:
                out.print(Padding(Text(f"{name:<14}{value}"), _INDENT), soft_wrap=False)


def memory_of(family: Family) -> str:
    """What the weights of the row's checkpoint take of the device, with its encoders offloaded and without. A video
    takes more beside them."""
    if family.weights_gb is None:
        return "not known"
    denoiser, encoders = family.weights_gb
    return f"{denoiser + encoders:.1f} GB of weights in bfloat16, {denoiser:.1f} GB with engine.offload = text"


def show_settings(rows: Iterable[SettingRow], out: Console, *, is_json: bool) -> None:
    """Show each setting; a secret is masked."""
    if is_json:
        print_plain(json.dumps([_as_json(row) for row in rows], indent=2))
        return
    for row in rows:
        if out.is_terminal:
            _show_setting(row, out)
        else:
            print_plain("\t".join([row.key, str(row), row.origin, row.variable, row.description]))


def _facts_of(can: Capabilities) -> Iterator[tuple[str, str]]:
    preset, limits = can.preset, can.limits
    modes = (
        ("text", can.is_text_to_video),
        ("image", can.is_image_to_video),
        ("first and last image", can.is_first_last_frame_to_video),
        ("video", can.is_video_to_video),
    )
    yield "made from", ", ".join(name for name, is_made in modes if is_made)
    yield "by default", _default_of(preset)
    yield "at most", f"{limits.max_pixels:,} pixels per frame, {limits.max_frames} frames"


def _default_of(preset: Preset) -> str:
    return (
        f"{preset.size}, {preset.num_frames} frames at {preset.fps} fps, {preset.num_inference_steps} steps, "
        f"guidance {preset.guidance_scale:g}"
    )


def _told(tier: Tier) -> str:
    """The tier, what it sets, and its description, on one line."""
    steps = tier.num_inference_steps if tier.timesteps is None else len(tier.timesteps)
    words = [
        None if steps is None else f"{steps} steps",
        None if tier.guidance_scale is None else f"guidance {tier.guidance_scale:g}",
        None if tier.flow_shift is None else f"flow shift {tier.flow_shift:g}",
        tier.solver,
        *(f"LoRA {lora.name}" for lora in tier.loras),
        " ".join(tier.description.split()),
    ]
    return f"{tier.name}: " + ", ".join(word for word in words if word)


def _memory_of(settings: EngineSettings) -> str:
    """What the model's weights take, and the bound. What lies on a device is known to a service alone."""
    size_bytes = stored_bytes_of(settings)
    weights = "no weights" if size_bytes is None else f"{size_bytes / 1e9:.3g} GB of weights in files"
    return (
        weights if settings.wan.memory_gb is None else f"{weights}, {settings.wan.memory_gb:g} GB of each GPU at most"
    )


def _show_setting(row: SettingRow, out: Console) -> None:
    """Never cut or broken: the name, the value, and the environment variable."""
    out.print(
        Text.assemble((row.key, "bold"), " = ", str(row) or "not set", (f"  ({row.origin})", "dim")), soft_wrap=True
    )
    out.print(Padding(Text(row.description), _INDENT), soft_wrap=False)
    out.print(Text(f"    {row.variable}", "dim"), soft_wrap=True)


def _as_json(row: SettingRow) -> dict[str, object]:
    return {
        "key": row.key,
        "value": row.plain,
        "source": row.origin,
        "environment": row.variable,
        "description": row.description,
    }
