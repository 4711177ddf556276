"""Endless batches of clips as numbers, made by worker processes while the device trains.

The workers draw trajectories and say sentences; nothing here touches pixels or the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.tiny.language import Speaker
from training.tiny.world import Clips, sample_clips

CAPTIONS = 4  # per clip: the last tells only the motion


@dataclass(frozen=True)
class Format:
    """A clip's size and how large a share of training it gets."""

    num_frames: int
    height: int
    width: int
    share: float = 1.0

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)

    @property
    def aspect(self) -> tuple[float, float]:
        return self.width / self.short_side, self.height / self.short_side

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return 1 + (self.num_frames - 1) // 4, self.height // 8, self.width // 8

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.latent_shape
        return frames * (height // 2) * (width // 2)


@dataclass(frozen=True)
class Numbers:
    """What `world.distances` and `world.backdrop` need, as tensors; counts is how many clips of each shape."""

    path: Tensor
    rgb: Tensor
    background: Tensor
    counts: list[int]

    @classmethod
    def of(cls, clips: Clips) -> Numbers:
        rgb, background = torch.from_numpy(clips.rgb()), torch.from_numpy(clips.background)
        return cls(torch.from_numpy(clips.path), rgb, background, clips.shape_counts())

    def to(self, device: torch.device) -> Numbers:
        path, rgb, background = (t.to(device, non_blocking=True) for t in (self.path, self.rgb, self.background))
        return Numbers(path, rgb, background, self.counts)

    def pin_memory(self) -> Numbers:
        return Numbers(self.path.pin_memory(), self.rgb.pin_memory(), self.background.pin_memory(), self.counts)


@dataclass(frozen=True)
class Batch:
    """Clips of one format; tokens int32 (n, CAPTIONS, MAX_TOKENS), empty for the autoencoder, which reads nothing."""

    format_index: int
    numbers: Numbers
    second: Numbers | None
    tokens: Tensor

    def pin_memory(self) -> Batch:
        second = self.second.pin_memory() if self.second else None
        return Batch(self.format_index, self.numbers.pin_memory(), second, self.tokens.pin_memory())


class _Draw(IterableDataset[Batch]):
    def __init__(self, formats: list[Format], batch_sizes: list[int], is_captioned: bool, seed: int) -> None:
        self.formats, self.batch_sizes, self.is_captioned, self.seed = formats, batch_sizes, is_captioned, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        speaker = Speaker(np.random.default_rng([self.seed, worker.id if worker else 0, 1]))
        shares = np.array([f.share for f in self.formats])
        while True:
            index = int(rng.choice(len(shares), p=shares / shares.sum()))
            yield self._batch(rng, speaker, index)

    def _batch(self, rng: np.random.Generator, speaker: Speaker, index: int) -> Batch:
        form, n = self.formats[index], self.batch_sizes[index]
        clips = sample_clips(rng, n, form.num_frames, form.aspect)
        if self.is_captioned:
            return Batch(index, Numbers.of(clips), None, torch.from_numpy(_captions(speaker, clips)))
        second = sample_clips(rng, n, form.num_frames, form.aspect)
        return Batch(index, Numbers.of(clips), Numbers.of(second), torch.empty(0, dtype=torch.int32))


def _captions(speaker: Speaker, clips: Clips) -> np.ndarray:
    rows = []
    for i in range(len(clips)):
        texts = [speaker.describe(clips, i) for _ in range(CAPTIONS - 1)] + [speaker.direct(clips, i)]
        rows.append(np.stack([speaker.tokens(text) for text in texts]))
    return np.stack(rows)


def batches(
    formats: list[Format], batch_sizes: list[int], is_captioned: bool, seed: int, is_pinned: bool
) -> Iterator[Batch]:
    """Batches for ever, from as many processes as the machine has to spare."""
    num_workers = max(0, min(10, (os.cpu_count() or 1) - 4))
    dataset = _Draw(formats, batch_sizes, is_captioned, seed)
    context = "fork" if num_workers else None
    loader = DataLoader(
        dataset, batch_size=None, num_workers=num_workers, pin_memory=is_pinned, multiprocessing_context=context
    )
    return iter(loader)
