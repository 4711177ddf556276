"""What the lossy modes cost a video: .venv/bin/python -m training.tiny.lossy --prompts 12

PSNR against the exact mode of the same engine, and whether `detector` still sees what was asked for. On a CPU, and
where a kernel cannot run, the modes are their references: the same roundings, in float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.step_cache import choose_skipped
from kinema.engines.wan.transformer.attention import Attention, choose_attention
from kinema.engines.wan.transformer.forward import Forward
from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype
from kinema.engines.wan.transformer.fp8_attention import attend_fp8_plainly
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from training.tiny.detector import look
from training.tiny.evaluate import draw_wanted, score


@dataclass(frozen=True)
class Mode:
    """``is_shorter`` is no lossy mode: the exact one with as many steps as the step cache computes."""

    linears: Linears = "dtype"
    weights_dtype: WeightsDtype = "dtype"
    has_fp8_attention: bool = False
    has_step_cache: bool = False
    is_shorter: bool = False

    def num_steps(self, asked: int) -> int:
        return asked - len(choose_skipped(asked)) if self.is_shorter else asked


MODES = {
    "exact": Mode(),
    "fp8 linears": Mode(linears="fp8"),
    "fp8 weights": Mode(weights_dtype="fp8"),
    "fp8 attention": Mode(has_fp8_attention=True),
    "fp8 both": Mode(linears="fp8", has_fp8_attention=True),
    "step cache": Mode(has_step_cache=True),
    "fewer steps": Mode(is_shorter=True),
    "all three": Mode(linears="fp8", has_fp8_attention=True, has_step_cache=True),
}


def engine_of(model: str, device: str, mode: Mode) -> WanEngine:
    """Without CUDA graphs, so that its forward can be replaced."""
    engine = WanEngine(
        inspect(model),
        device,
        attention="sdpa",
        linears=mode.linears,
        weights_dtype=mode.weights_dtype,
        has_step_cache=mode.has_step_cache,
        has_graphs=False,
    )
    engine.load()
    if mode.has_fp8_attention:
        own = engine.parts.transformer
        own.forward = Forward(own.network, own.operations, fp8_attention(engine))
    return engine


def fp8_attention(engine: WanEngine) -> Attention:
    network = engine.parts.transformer.network
    width = network.width // network.num_heads
    try:
        return choose_attention("fa3-fp8", network.device, network.dtype, network.num_heads, width)
    except ConfigError as exc:
        print(f"the reference in place of the kernel: {exc.message}")
        return attend_fp8_plainly


@torch.inference_mode()
def film(engine: WanEngine, request: GenerationRequest) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3)."""
    steps = engine.sample(request)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            latents = end.value
            break
    decoder = engine.decoder
    pictures = [decoder.to_rgb(decoded).float().cpu().numpy() for decoded in decoder.decode(latents)]
    return np.round(np.concatenate(pictures) * 255).clip(0, 255).astype(np.uint8)


def psnr(made: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    error = float(((made.astype(np.float64) - exact) ** 2).mean())
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=12, help="two at least")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modes", default=",".join(MODES), help="exact first")
    options = parser.parse_args(arguments)
    wanted = draw_wanted(options.prompts, seed=2024)
    exact: list[NDArray[np.uint8]] = []
    for name in options.modes.split(","):
        mode = MODES[name]
        engine = engine_of(options.model, options.device, mode)
        asked = [
            GenerationOptions(prompt=one.prompt, seed=seed, num_inference_steps=mode.num_steps(options.steps))
            for seed, one in enumerate(wanted)
        ]
        films = [film(engine, resolve(one, engine.capabilities).request) for one in asked]
        engine.close()
        exact = exact or films
        found = [psnr(made, other) for made, other in zip(films, exact, strict=True)]
        shares = score(wanted, [look(made) for made in films])
        print(
            f"{name:<14} PSNR {np.mean(found):5.1f} dB, worst {min(found):5.1f}; as wanted: "
            + ", ".join(f"{field} {100 * share:.0f} %" for field, share in shares.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
