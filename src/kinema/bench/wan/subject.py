"""What ``kinema bench engine`` measures: a checkpoint and a video. Reads configs alone and loads no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from kinema.bench.wan.architectures import ARCHITECTURES
from kinema.bench.wan.flops import count_tokens
from kinema.engines.base import NO_INPUTS, Inputs
from kinema.engines.wan.checkpoint import BUNDLED, Checkpoint, read_configs
from kinema.engines.wan.configs import read_json
from kinema.errors import ConfigError
from kinema.request.request import GenerationRequest

Part = Literal["text", "denoise", "decode", "video"]
PARTS: tuple[Part, ...] = ("text", "denoise", "decode", "video")


@dataclass(frozen=True)
class Subject:
    """A checkpoint, with its own weights or random ones, and a video of it.

    ``measured_steps`` of the video's steps are run, at least two; the others are counted as long as these. With a
    ``lora_rank`` steps with LoRAs of that rank are measured too. ``compile_with`` is what torch.compile uses for
    diffusers' pipeline.
    """

    checkpoint: Checkpoint
    is_random: bool
    request: GenerationRequest
    measured_steps: int
    parts: frozenset[Part]
    runs: int
    is_against_diffusers: bool
    is_ablated: bool
    lora_rank: int | None = None
    compile_with: str = "inductor"

    @property
    def is_guided(self) -> bool:
        return self.request.guidance_scale > 1.0

    @property
    def prompts(self) -> list[str]:
        return [self.request.prompt] + ([self.request.negative_prompt] if self.is_guided else [])

    @property
    def inputs(self) -> Inputs:
        """A first frame of random colours, where the model needs one."""
        if not self.checkpoint.has_image_channels:
            return NO_INPUTS
        shape = (self.request.height, self.request.width, 3)
        return Inputs(first_frame=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))

    @property
    def steps_not_run(self) -> int:
        return self.request.num_inference_steps - self.measured_steps

    @property
    def measured(self) -> GenerationRequest:
        """The request whose video is made, with the steps that are run."""
        return self.with_steps(self.measured_steps)

    def numbered(self, number: int) -> GenerationRequest:
        """The measured request with a prompt of its own, which no cache of texts has."""
        return self.measured.model_copy(update={"prompt": f"{self.request.prompt}, take {number + 1}"})

    def with_steps(self, count: int) -> GenerationRequest:
        """The request with another number of steps: the first ones of its timesteps, where it has some."""
        timesteps = self.request.timesteps
        steps = None if timesteps is None else timesteps[:count]
        return self.request.model_copy(update={"num_inference_steps": count, "timesteps": steps})

    @property
    def num_tokens(self) -> int:
        """Tokens of the video in the transformer."""
        return count_tokens(self.config("transformer"), self.config("vae"), self.request.size, self.request.num_frames)

    def config(self, component: str) -> dict[str, Any]:
        """A component's ``config.json``, as published; of a transformer that a file replaces, what the engine reads."""
        if component in self.checkpoint.files:
            return self.checkpoint.transformers[component].model_dump()
        return read_json(self.checkpoint.root_of(component), f"{component}/config.json")


@contextmanager
def checkpoint_of(architecture: str) -> Iterator[Checkpoint]:
    """A checkpoint of this published architecture, in a folder that is removed when the block ends.

    Raises ConfigError for an unknown name.
    """
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        yield write_architecture(architecture, Path(folder))


def write_architecture(name: str, folder: Path) -> Checkpoint:
    """A checkpoint in this folder without weights, with the tokenizer of the bundled model: any token ids will do.

    Raises ConfigError for an unknown name.
    """
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ConfigError(f"--architecture {name!r} is not known; give one of: {', '.join(ARCHITECTURES)}")
    for place, config in architecture.configs.items():
        path = folder / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copytree(BUNDLED["tiny-wan"] / "tokenizer", folder / "tokenizer")
    return read_configs(name, folder)
