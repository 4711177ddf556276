"""What LoRAs cost: a step of a video with one, and a change of turn between two videos with different ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from kinema.bench.wan.gauge import Gauge
from kinema.bench.wan.stages import time_step
from kinema.bench.wan.subject import Subject
from kinema.engines.base import Inputs, Step
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.transformer.shapes import shapes
from kinema.errors import ConfigError
from kinema.request.request import GenerationRequest, LoraUse

_NAME = "random"
# Steps before the clock starts: the first of a kind compiles, and the second is recorded.
_WARM_UPS = 2


@dataclass(frozen=True)
class LoraTimes:
    """A step with a LoRA of this rank on every layer of the blocks, ``ratio`` times as long as one without. It takes
    ``turn_ms`` longer when a video with another LoRA had the step before."""

    rank: int
    step_ms: float
    ratio: float
    turn_ms: float


@contextmanager
def lora_folder(checkpoint: Checkpoint, rank: int) -> Iterator[Path]:
    """A folder with a random LoRA on every layer of the blocks, removed when the block ends. The numbers are so small
    that no video overflows."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(checkpoint.transformer).items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks.") and kind == "weight" and len(shape) == 2:
            outputs, inputs = shape
            tensors[f"{module}.lora_A.weight"] = torch.empty(rank, inputs, dtype=torch.bfloat16)
            tensors[f"{module}.lora_B.weight"] = torch.empty(outputs, rank, dtype=torch.bfloat16)
    for tensor in tensors.values():
        tensor.normal_(0.0, 1e-3, generator=generator)
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        save_file(tensors, Path(folder) / f"{_NAME}.safetensors")
        yield Path(folder)


def measure_loras(engine: WanEngine, subject: Subject, rank: int, plain_s: float, gauge: Gauge) -> LoraTimes:
    """Measure on an engine whose folder of LoRAs is a ``lora_folder``; ``plain_s`` is a step of the video without."""
    assert engine.loras is not None
    (lora,) = engine.loras.described([_NAME])
    one, other = (
        subject.measured.model_copy(update={"loras": (LoraUse(name=lora.name, digest=lora.digest, scale=scale),)})
        for scale in (1.0, 0.5)
    )
    inputs, runs = subject.inputs, subject.runs
    _, *steps = [time_step(engine, one, gauge, inputs) for _ in range(runs + 1)]
    step_s = median(steps)
    turns_s = median(_time_turns(engine, (one, other), inputs, gauge) for _ in range(runs))
    return LoraTimes(rank, 1000 * step_s, step_s / plain_s, 1000 * (turns_s - step_s))


def _time_turns(
    engine: WanEngine, requests: tuple[GenerationRequest, GenerationRequest], inputs: Inputs, gauge: Gauge
) -> float:
    """The mean seconds of a step of two videos that take turns."""
    num_steps = requests[0].num_denoising_steps
    if num_steps <= _WARM_UPS:
        raise ConfigError(f"--lora-rank needs more than {_WARM_UPS} steps to measure turns; give --steps more")
    generators = [engine.generate(request, inputs) for request in requests]

    def turn() -> None:
        for generator in generators:
            output = next(generator)
            assert isinstance(output, Step), "steps come before frames"

    try:
        for _ in range(_WARM_UPS):
            turn()
        started, count = gauge.now(), num_steps - _WARM_UPS
        for _ in range(count):
            turn()
        return (gauge.now() - started) / (2 * count)
    finally:
        for generator in generators:
            generator.close()
