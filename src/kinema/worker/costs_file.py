"""The costs of a model on a device, kept for the next run of a worker, so that its first predictions are good."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote

import structlog

from kinema.request.geometry import Geometry
from kinema.worker.costs import CostModel

log = structlog.get_logger(__name__)


def costs_path(data_dir: Path, model: str, device: str) -> Path:
    """The path of the file for this model on this device."""
    return data_dir.resolve() / "costs" / f"{quote(model, safe='')}@{quote(device, safe='')}.json"


def read_costs(path: Path, geometry: Geometry = Geometry(), *, encodes_whole_film: bool = False) -> CostModel:  # noqa: B008 - frozen
    """Read the costs. Without a readable file of ours they are new, and the device teaches them again."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return CostModel.from_json(told, geometry, encodes_whole_film=encodes_whole_film)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        log.warning("the costs of an earlier run were not read", path=str(path), reason=str(exc))
    return CostModel(geometry, encodes_whole_film=encodes_whole_film)


def write_costs(path: Path, costs: CostModel) -> None:
    """Write the whole file or nothing. A folder that cannot be written costs only a line in the log."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(costs.to_json()), encoding="utf-8")
        new.replace(path)
    except OSError as exc:
        log.warning("the costs were not kept", path=str(path), reason=str(exc))
