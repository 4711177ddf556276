"""Encoded clips kept on the device: always some new ones, each used a few times with different noise and words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.tiny import world
from training.tiny.fast import FastVae
from training.tiny.language import MAX_TOKENS
from training.tiny.networks import MASK_CHANNELS
from training.tiny.stream import CAPTIONS, Batch, Format


@dataclass
class Ring:
    """The latest clips of one format: latents (n, 16, f, h, w) bfloat16, tokens (n, CAPTIONS, MAX_TOKENS)."""

    latents: Tensor
    tokens: Tensor
    written: int = 0

    @classmethod
    def empty(cls, form: Format, capacity: int, channels: int, device: torch.device) -> Ring:
        shape = (capacity, channels, *form.latent_shape)
        tokens = torch.empty(capacity, CAPTIONS, MAX_TOKENS, dtype=torch.int32, device=device)
        return cls(torch.empty(shape, dtype=torch.bfloat16, device=device), tokens)

    @property
    def filled(self) -> int:
        return min(self.written, len(self.latents))

    def add(self, latents: Tensor, tokens: Tensor) -> None:
        """Overwrite the oldest; the capacity is a multiple of the batch, so that a batch never wraps around."""
        start = self.written % len(self.latents)
        self.latents[start : start + len(latents)] = latents
        self.tokens[start : start + len(latents)] = tokens.to(self.tokens.device, non_blocking=True)
        self.written += len(latents)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(self.filled, (n,), device=self.latents.device)
        return self.latents[index].float(), self.tokens[index]


class Encoder:
    """Renders and encodes batches to normalised latents, without gradients."""

    is_outlined = False

    def __init__(self, fast: FastVae, mean: list[float], std: list[float], device: torch.device) -> None:
        self.fast, self.device = fast, device
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def __call__(self, batch: Batch, form: Format) -> Tensor:
        return self.latents(self.render(batch, form))

    def render(self, batch: Batch, form: Format) -> Tensor:
        """Frames (n, 3, f, h, w) in [-1, 1]."""
        numbers = batch.numbers.to(self.device)
        size = (form.height, form.width)
        n, num_frames = numbers.path.shape[:2]
        offset = torch.zeros(n, 2, device=self.device)
        rows = ((torch.arange(form.height, device=self.device) + 0.5) / form.height).expand(n, -1)
        behind = world.backdrop(numbers.background, rows)[:, :, None, :, None].expand(
            -1, -1, num_frames, -1, form.width
        )
        distance = world.distances(numbers.path, numbers.counts, size, form.short_side, offset)
        if self.is_outlined:
            distance = world.outline(distance, form.short_side)
        return world.paint(behind, numbers.rgb, distance)

    def latents(self, frames: Tensor) -> Tensor:
        """Normalised latents (n, 16, f, h, w)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, _ = self.fast.encode(frames)
        return (mean.float() - self.mean) / self.std


class GivenEncoder(Encoder):
    """Adds to the latents what a model with given frames reads beside its noise: 4 channels of a mask and 16 of a film.

    Half of the clips give their first frame, the others the last one too. The mask has a channel for each frame of a
    latent frame, 1 where that is given, and the film is grey where no frame is given, as Wan 2.2 I2V has it.
    """

    @torch.no_grad()
    def __call__(self, batch: Batch, form: Format) -> Tensor:
        frames = self.render(batch, form)
        has_last = torch.rand(len(frames), 1, 1, 1, device=self.device) < 0.5
        film = torch.zeros_like(frames)
        film[:, :, -1] = torch.where(has_last, frames[:, :, -1], 0.0)
        film[:, :, 0] = frames[:, :, 0]
        latents = self.latents(frames)
        mask = torch.zeros_like(latents[:, :MASK_CHANNELS])
        mask[:, -1:, -1] = has_last.to(mask)
        mask[:, :, 0] = 1.0
        return torch.cat([latents, mask, self.latents(film)], dim=1)
