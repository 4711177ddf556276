"""A model that is larger than one device: each rank holds an equal part of every block, and gathers them as they come.

A pass over the blocks is a collective of all ranks: each gather takes all of them, in the same order. Three rules keep
it so. All ranks agree that they have the memory for a step before it begins, and then each asks for every block once.
Nothing is gathered between two passes. A rank that fails in the middle of a pass costs all of them (WorkerLost), as in
any other exchange. What a rank does alone, as reading prompts, must not need a part of another one: so the readers of
prompts lie whole in the host's memory of each rank, as do blocks that are offloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kinema.engines.wan.device_memory import DeviceMemory
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.ranks.group import Group
from kinema.engines.wan.ranks.plan import Mode
from kinema.engines.wan.ranks.ulysses import ShardedForward, ShardedTransformer
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text
from kinema.engines.wan.transformer.forward import Forward
from kinema.engines.wan.transformer.model import WanTransformer


def shard_of(placement: Placement, rank: int) -> Shard | None:
    """What this rank keeps where blocks are split, else None."""
    return Shard(rank, placement.num_parts, placement.device) if placement.num_parts > 1 else None


def stream_of(placement: Placement, shard: Shard | None) -> BlockStream | None:
    """What brings blocks to the device; None where it holds all of them."""
    if shard is not None:
        return shard.new_stream()
    return BlockStream(placement.device, is_kept=True) if placement.has_blocks_offloaded else None


def share(
    transformer: WanTransformer, attention: Attention, group: Group, shard: Shard | None, memory: DeviceMemory | None
) -> dict[Mode, ShardedTransformer]:
    """What computes the steps that all ranks must begin together, by their mode.

    A rank with all blocks computes its branch of guidance alone, so there ``cfg`` is left out.
    """
    forwards: dict[Mode, Forward] = {"ulysses": ShardedForward(transformer, attention, group)}
    if shard is not None:
        forwards["cfg"] = BranchForward(transformer, attention, group)
    return {mode: ShardedTransformer(transformer, forward, memory) for mode, forward in forwards.items()}


class Shard:
    """What one of ``num_ranks`` ranks keeps of its transformers' blocks.

    The ranks need not know each other before the first pass: ``join`` comes between loading and that.
    """

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._device = device
        self._group: Group | None = None

    def new_stream(self) -> BlockStream:
        """What keeps this rank's part of each block, and brings whole ones."""
        return BlockStream(self._device, is_kept=True, new_rows=partial(PartRows, self))

    def join(self, group: Group) -> None:
        """Gather by this group from now on."""
        self._group = group

    def gather(self, part: Tensor, whole: Tensor) -> None:
        """Collect each rank's part (n,) in ``whole`` (ranks * n,). Raises WorkerLost."""
        assert self._group is not None, "join() was not called"
        self._group.gather(part, whole)


class PartRows:
    """``Rows`` of which this rank has an equal part of the bytes of each, on its device."""

    is_own = False

    def __init__(self, shard: Shard, count: int, num_bytes: int, device: torch.device) -> None:
        self._shard = shard
        size = -(-num_bytes // shard.num_ranks)
        self.row_bytes = size * shard.num_ranks
        self._parts = torch.empty(count, size, dtype=torch.uint8, device=device)
        # One row, whole, in the host's memory, while the rows are stored.
        self._whole = torch.zeros(self.row_bytes, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def device_bytes(self) -> int:
        """See ``Rows``."""
        return self._parts.numel()

    def store(self, index: int, write: Callable[[Tensor], None]) -> None:
        """See ``Rows``."""
        write(self._whole)
        self._parts[index].copy_(self._whole.view(self._shard.num_ranks, -1)[self._shard.rank])

    def finish(self) -> None:
        """See ``Rows``."""
        self._whole = self._whole.new_empty(0)

    def bring(self, index: int, data: Tensor) -> None:
        """See ``Rows``; all ranks call it together. Raises WorkerLost."""
        self._shard.gather(self._parts[index], data)


class BranchForward(Forward):
    """A ``Forward`` over this rank's branch of guidance; all ranks call it together, one for each branch."""

    def __init__(self, transformer: WanTransformer, attention: Attention, group: Group) -> None:
        super().__init__(transformer.network, transformer.operations, attention)
        self._group = group

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """The velocities of all branches, by rank, the same on every rank."""
        own = super().velocities(latents, modulation, rotation, text).contiguous()
        return self._group.gather(own, own.new_empty((self._group.num_ranks, *own.shape[1:])))
