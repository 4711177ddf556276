"""The sglang engine for tests: before a package that stands in for the library, and models for its pipelines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from kinema.engines.sglang.engine import SglangEngine
from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.settings import EngineSettings

STANDIN = Path(__file__).parent / "standin"


def engine_before_standin(model: str = "tiny-wan", **settings: object) -> SglangEngine:
    """Not loaded; on the CPU unless the settings say otherwise. The stand-in comes first on its process' path."""
    return make_engine(model, {"PYTHONPATH": path_with(STANDIN)}, **settings)


def make_engine(model: str, environment: dict[str, str], **settings: object) -> SglangEngine:
    chosen = EngineSettings.model_validate({"name": "sglang", "model": model, "device": "cpu", **settings})
    return SglangEngine(inspect(model, is_for_another_engine=True), chosen, environment)


def path_with(folder: Path) -> str:
    """PYTHONPATH with the folder before what is in it."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def image_pipeline(folder: Path) -> Path:
    """The bundled model as a checkpoint that begins with a picture; diffusers' pipeline for that runs its weights."""
    absent = {"image_encoder": [None, None], "image_processor": [None, None]}
    return changed_model(folder, "model_index.json", {**absent, "_class_name": "WanImageToVideoPipeline"})


def changed_model(folder: Path, name: str, values: dict[str, object]) -> Path:
    """The bundled model with other values in one of its JSON files."""
    model = folder / "tiny-wan-changed"
    shutil.copytree(BUNDLED["tiny-wan"], model)
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    return model
