"""What the frames of the library depend on besides the request, for a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from kinema.engines.hardware import cpu_name
from kinema.engines.sglang.arguments import backend_of, num_gpus
from kinema.manifest import EngineFacts
from kinema.settings import EngineSettings


def facts_of(described: Mapping[str, Any], weights: str, settings: EngineSettings) -> EngineFacts:
    """The facts of a loaded engine; ``described`` are the fields of the library's message ``ready``, ``weights`` is the
    digest of the checkpoint's files."""
    name = cpu_name() if described["device"] == "cpu" else str(described["device_name"])
    return EngineFacts(
        engine="sglang",
        weights=weights,
        dtype=str(described["dtype"]),
        device=" ".join([name, *_split(settings)]),
        threads=described["threads"],
        attention=f"{backend_of(settings)} {settings.sglang.attention or 'default'}",
        versions={**described["versions"], **lora_facts(settings)},
    )


def lora_facts(settings: EngineSettings) -> Mapping[str, str]:
    """The LoRA and its scale: by the digest of its files, or by its name for one on the hub."""
    if settings.sglang.lora is None:
        return {}
    path = Path(settings.sglang.lora)
    digest, files = sha256(), sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
    for each in files:
        with each.open("rb") as content:
            digest.update(file_digest(content, "sha256").digest())
    name = digest.hexdigest()[:16] if files else settings.sglang.lora
    return {"lora": f"{name} x {settings.sglang.lora_scale:g}"}


def _split(settings: EngineSettings) -> list[str]:
    """How several devices share the work, which changes the order of sums and so the frames."""
    if num_gpus(settings) == 1:
        return []
    degrees = {
        "gpus": num_gpus(settings),
        "tp": settings.sglang.tp_size,
        "sp": settings.sglang.sp_degree,
        "ulysses": settings.sglang.ulysses_degree,
        "cfg": settings.sglang.cfg_parallel,
    }
    return [f"{name}={value}" for name, value in degrees.items() if value is not None]
