"""The costs of a model on a device that need not be here, for the simulator.

Measured on one H200: Wan 2.1 1.3B with random weights at 832x480, bfloat16, torch 2.11 with cuDNN 9.19, regional
compilation, both passes of guidance in one batch; UMT5-XXL; the VAE in channels_last. Medians.
"""

from __future__ import annotations

from kinema.request.capabilities import Capabilities, Limits, Preset, Size
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.costs import CostModel, Done

WAN_1_3B = Capabilities(
    model="wan2.1-t2v-1.3b",
    engine="simulated",
    preset=Preset(
        size=Size(width=832, height=480),
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=5.0,
        flow_shift=3.0,
    ),
    limits=Limits(max_pixels=1280 * 720, max_frames=161, max_volume=1280 * 720 * 161),
)
_ENCODE_S = 0.0289
# By frames: a guided step, and the decode of all frames.
_MEASURED_S = {17: (0.1299, 0.350), 81: (1.068, 1.627)}


def h200_costs() -> CostModel:
    """Wan 2.1 1.3B's; other sizes and lengths are read off the curve through the two that were measured."""
    costs = CostModel()
    begun = Done(is_begun=True, steps=1)
    for num_frames, (step_s, decode_s) in _MEASURED_S.items():
        request = simulated_request({"prompt": "a cat", "num_frames": num_frames, "num_inference_steps": 1})
        chunk_s = decode_s / (num_frames / 4)
        costs.observe(request, Done(), begun, 2 * _ENCODE_S + step_s)
        costs.observe(request, begun, Done(is_begun=True, steps=2), step_s)
        costs.observe(request, begun, Done(is_begun=True, steps=1, chunks=1), chunk_s / 4)
        costs.observe(request, Done(is_begun=True, steps=1, chunks=1), Done(is_begun=True, steps=1, chunks=2), chunk_s)
    return costs


def simulated_request(body: dict[str, object]) -> GenerationRequest:
    """A body of ``POST /v1/videos`` as this model resolves it. Raises RequestError."""
    return resolve(GenerationOptions.model_validate({"prompt": "a cat", **body}), WAN_1_3B).request
