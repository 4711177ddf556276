"""The sglang engine before the real library, on a CPU."""

from __future__ import annotations

from pathlib import Path

from kinema.engines.sglang.engine import SglangEngine
from tests.contract.standins import make_engine, path_with

PLUGIN = Path(__file__).parent / "plugin"
# The plugin lets the library's own pipelines run without kernels for a CPU; torch would compile for a minute first.
_OWN = {"PYTHONPATH": path_with(PLUGIN), "TORCHDYNAMO_DISABLE": "1"}


def engine_before_library(model: str = "tiny-wan", *, backend: str) -> SglangEngine:
    """Not loaded."""
    environment = _OWN if backend == "sglang" else {}
    return make_engine(model, environment, sglang={"backend": backend})
