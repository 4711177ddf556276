"""The bundled model with a ``kinema.json`` of a test's own, and without LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from kinema.engines.wan.checkpoint import BUNDLED


def tiny_with(folder: Path, tiers: Mapping[str, object]) -> Path:
    """A folder of links to the files of the bundled model, which has these tiers."""
    folder.mkdir()
    origin = BUNDLED["tiny-wan"]
    for file in origin.iterdir():
        if file.name not in ("kinema.json", "loras"):
            (folder / file.name).symlink_to(file)
    own = json.loads((origin / "kinema.json").read_text(encoding="utf-8"))
    (folder / "kinema.json").write_text(json.dumps({**own, "tiers": tiers}), encoding="utf-8")
    return folder
