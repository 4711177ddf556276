"""LoRAs with random numbers, which no file has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from kinema.engines.wan.lora.delta import Delta, Deltas, LoraRef


class RandomLoras:
    """For a transformer whose weights have these shapes, by their names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], size: float = 0.2) -> None:
        self._shapes = shapes
        self._size = size
        self._makers: dict[str, Callable[[], Deltas]] = {}

    def read(self, lora: LoraRef) -> Deltas:
        """The numbers of one that was drawn."""
        return self._makers[lora.digest]()

    def draw(self, seed: int, ranks: Mapping[str, int], *, others: bool = False, strength: float = 1.0) -> LoraRef:
        """One with these ranks by the endings of modules' names; with ``others`` all other tensors change too."""
        self._makers[str(seed)] = cache(partial(self._make, seed, ranks, others=others))
        return LoraRef(Path("nowhere"), str(seed), strength)

    def _make(self, seed: int, ranks: Mapping[str, int], *, others: bool) -> Deltas:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * self._size

        deltas: dict[str, Delta] = {}
        for module in dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in self._shapes):
            shape = self._shapes[module] if module in self._shapes else self._shapes[f"{module}.weight"]
            flat = shape if module in self._shapes or len(shape) < 3 else (shape[0], torch.Size(shape[1:]).numel())
            rank = next((rank for ending, rank in ranks.items() if module.endswith(ending)), 0)
            if rank:
                deltas[module] = Delta(down=random(rank, flat[1]), up=random(flat[0], rank))
            elif others:
                bias = self._shapes.get(f"{module}.bias")
                deltas[module] = Delta(weight=random(*flat), bias=None if bias is None else random(*bias))
        return deltas

    def added(self, *loras: LoraRef) -> dict[str, Tensor]:
        """What LoRAs add to each weight, in its shape."""
        changes: dict[str, Tensor] = {}

        def add(name: str, change: Tensor) -> None:
            change = change.view(self._shapes[name])
            changes[name] = changes[name] + change if name in changes else change

        for one in loras:
            for module, delta in self.read(one).items():
                name = module if module in self._shapes else f"{module}.weight"
                if delta.down is not None and delta.up is not None:
                    add(name, one.strength * (delta.up @ delta.down))
                if delta.weight is not None:
                    add(name, one.strength * delta.weight)
                if delta.bias is not None:
                    add(f"{module}.bias", one.strength * delta.bias)
        return changes
