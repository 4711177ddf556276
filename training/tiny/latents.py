"""Encoded clips kept on the device: always some new ones, each used a few times with different noise and words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.tiny import world
from training.tiny.fast import FastVae
from training.tiny.language import MAX_TOKENS
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

    def __init__(self, fast: FastVae, mean: list[float], std: list[float], device: torch.device) -> None:
        self.fast, self.device = fast, device
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def __call__(self, batch: Batch, form: Format) -> Tensor:
        numbers = batch.numbers.to(self.device)
        size = (form.height, form.width)
        n, num_frames = numbers.path.shape[:2]
        offset = torch.zeros(n, 2, device=self.device)
        rows = ((torch.arange(form.height, device=self.device) + 0.5) / form.height).expand(n, -1)
        behind = world.backdrop(numbers.background, rows)[:, :, None, :, None].expand(
            -1, -1, num_frames, -1, form.width
        )
        distance = world.distances(numbers.path, numbers.counts, size, form.short_side, offset)
        frames = world.paint(behind, numbers.rgb, distance)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, _ = self.fast.encode(frames)
        return (mean.float() - self.mean) / self.std
