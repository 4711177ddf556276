"""The costs of Wan 2.1 1.3B on one H200, which the simulator plays: ``kinema bench engine`` recorded them there.

``reports/`` has the reports of that command which docs/performance.md shows. Two of them, of the same model at two
lengths, are enough for the service's own cost model: it reads every other size and length off a curve.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from kinema.bench.wan.subject import checkpoint_of
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.costs import CostModel, Done

REPORTS = Path(__file__).parent / "reports"
_RECORDED = ("13b-17f.json", "13b-81f.json")


def recorded_costs() -> CostModel:
    """What each turn of a video takes, from the recorded medians: the text, a step, and the decode of all frames."""
    costs = CostModel()
    for name in _RECORDED:
        report = _read(name)
        ms = {stage: found["ms"] for stage, found in report["stages"].items()}
        request = simulated_request({key: report[key] for key in ("size", "num_frames", "guidance_scale")})
        _teach(costs, request, ms["text"] / 1000, ms["step"] / 1000, ms["decode"] / 1000)
    return costs


def _teach(costs: CostModel, request: GenerationRequest, text_s: float, step_s: float, decode_s: float) -> None:
    """Videos of one step; the first latent frame becomes one frame and each other one four, which sets its time. The
    first ones pass for cold."""
    begun, chunk_s = Done(is_begun=True, steps=1), decode_s / (request.num_frames / 4)
    for _ in range(3):
        costs.observe(request, Done(), begun, text_s + step_s)
        costs.observe(request, begun, Done(is_begun=True, steps=2), step_s)
        costs.observe(request, begun, Done(is_begun=True, steps=1, chunks=1), chunk_s / 4)
        costs.observe(request, Done(is_begun=True, steps=1, chunks=1), Done(is_begun=True, steps=1, chunks=2), chunk_s)


def simulated_request(body: dict[str, Any]) -> GenerationRequest:
    """A body of ``POST /v1/videos``, completed by the defaults of the recorded model. Raises RequestError."""
    return resolve(GenerationOptions.model_validate({"prompt": "a cat", **body}), _capabilities()).request


@cache
def _capabilities() -> Capabilities:
    with checkpoint_of(_read(_RECORDED[0])["model"]) as checkpoint:
        return checkpoint.capabilities()


def _read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((REPORTS / name).read_text(encoding="utf-8"))
    return report
