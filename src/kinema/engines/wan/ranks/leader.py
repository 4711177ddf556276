"""Rank 0's side: transformers that look like those of one device, and have the other ranks compute their share.

Rank 0 alone has the solver and the latents between two steps, and sends the latents with each step: they are small (4
MB for 81 frames of 832x480 in bfloat16, a ten-thousandth of a step between two GPUs), so nothing can drift apart, and
generations take turns, are given up, parked and taken up again as on one device.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.loading import LoadTransformers, load_transformers
from kinema.engines.wan.ranks.crew import Crew
from kinema.engines.wan.ranks.group import Group, Meeting, spec_of
from kinema.engines.wan.ranks.plan import Mode, Plan
from kinema.engines.wan.ranks.ulysses import ShardedTransformer
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.engines.wan.transformer.model import Prepared, WanTransformer
from kinema.errors import ConfigError


def devices_of(first: torch.device, num_ranks: int) -> list[torch.device]:
    """The device of each rank: GPUs one after another, or the CPU for all. Raises ConfigError."""
    if num_ranks == 1 or first.type == "cpu":
        return [first] * num_ranks
    if first.type != "cuda":
        raise ConfigError(f"engine.gpus = {num_ranks}: engine.device is {first}, and only cuda or cpu can be several")
    start = first.index or 0
    num_left = torch.cuda.device_count() - start
    if num_left < num_ranks:
        raise ConfigError(
            f"engine.gpus = {num_ranks}: there are {num_left} GPUs from cuda:{start} on; give {num_left} at most"
        )
    return [torch.device("cuda", start + rank) for rank in range(num_ranks)]


@dataclass(frozen=True, eq=False)
class Spread:
    """A request that the other ranks know as ``key``; ``own`` is rank 0's part of it."""

    key: int
    mode: Mode
    own: Prepared


class Leader:
    """The other ranks begin to read their weights at once. ``join`` comes when rank 0 has its own, ``close`` last."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        attention: AttentionChoice,
        linears: Linears = "dtype",
        *,
        has_graphs: bool,
        load: LoadTransformers = load_transformers,
    ) -> None:
        # How the next generations are shared.
        self.plan = plan
        self._devices = devices
        self._attention = attention
        self._group: Group | None = None
        self._keys = itertools.count(1)
        # Of requests that nobody holds any more; the others hear of them with the next order.
        self._dropped: deque[int] = deque()
        self._crew = Crew(plan.num_ranks, self._abort)
        for rank in self._crew.ranks:
            self._crew.tell_one(
                rank,
                do="load",
                name=checkpoint.name,
                path=str(checkpoint.path.resolve()),
                cache=None if checkpoint.cache is None else str(checkpoint.cache.resolve()),
                how=f"{load.__module__}:{load.__qualname__}",
                device=str(devices[rank.number]),
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                # What was measured here holds there too, and other kernels would make other bits.
                attention=[attention.short, attention.long],
                linears=linears,
                has_graphs=has_graphs,
            )

    @property
    def is_lost(self) -> bool:
        """A rank is gone, and the others are of no use any more. May be asked on any thread."""
        return self._crew.is_lost

    def join(self, transformers: Sequence[WanTransformer]) -> list[SpreadTransformer]:
        """Wait until all have read their weights, and connect them. Raises what kept one of them from it."""
        self._crew.collect()
        meeting = Meeting()
        num_ranks = self.plan.num_ranks
        for rank in self._crew.ranks:
            self._crew.tell_one(rank, do="join", port=meeting.port, number=rank.number, num_ranks=num_ranks)
        with self._crew.depending():
            self._group = Group(meeting.store, 0, num_ranks, self._devices[0], lambda: self.is_lost)
        self._crew.collect()
        return [
            SpreadTransformer(self, number, own, ShardedTransformer(own, self._attention, self._group))
            for number, own in enumerate(transformers)
        ]

    def close(self) -> None:
        """End the other ranks."""
        self._crew.close()
        self._abort()
        self._group = None

    def mode_of(self, *, is_guided: bool) -> Mode | None:
        """As ``Plan.mode_of``."""
        return self.plan.mode_of(is_guided=is_guided)

    def begin(
        self,
        expert: int,
        mode: Mode,
        own: Prepared,
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        *,
        has_clean: bool,
    ) -> Spread:
        """Tell of a request: ``tensors`` are its texts and timesteps, ``shape`` that of its latents."""
        spread = Spread(next(self._keys), mode, own)
        weakref.finalize(spread, self._dropped.append, spread.key).atexit = False
        specs = [spec_of(tensor) for tensor in tensors]
        self._tell(
            *tensors,
            do="begin",
            key=spread.key,
            mode=mode,
            expert=expert,
            shape=list(shape),
            clean=has_clean,
            specs=specs,
        )
        return spread

    def begin_step(self, spread: Spread, latents: Tensor, index: int) -> None:
        self._tell(latents, do="step", key=spread.key, mode=spread.mode, index=index, latents=spec_of(latents))

    def take(self, velocity: Tensor) -> None:
        """Into this tensor rank 1's, which waits to be rid of it whether or not it is wanted.

        Raises what went wrong there.
        """
        with self._crew.depending():
            self._joined.broadcast(velocity, root=1)
            self._joined.wait()
        self._crew.collect()

    def together(self, transformer: ShardedTransformer, spread: Spread, latents: Tensor, index: int) -> Tensor:
        with self._crew.depending():
            velocities = transformer.velocities(spread.own, latents, index)
            self._joined.wait()
        return velocities

    def _tell(self, *tensors: Tensor, **order: object) -> None:
        while self._dropped:
            self._crew.tell(do="forget", key=self._dropped.popleft())
        self._crew.tell(**order)
        with self._crew.depending():
            for tensor in tensors:
                self._joined.broadcast(tensor.contiguous(), root=0)

    def _abort(self) -> None:
        """Also on the thread that noticed the loss: what waits for a lost rank ends."""
        if self._group is not None:
            self._group.abort()

    @property
    def _joined(self) -> Group:
        assert self._group is not None, "join() was not called"
        return self._group


class SpreadTransformer:
    """What the denoising loop holds in place of a WanTransformer. Raises WorkerLost when a rank is gone."""

    def __init__(self, leader: Leader, number: int, own: WanTransformer, sharded: ShardedTransformer) -> None:
        self._leader = leader
        self._number = number
        self._own = own
        self._sharded = sharded

    def prepare(
        self, texts: list[Tensor], timesteps: Tensor, latents: Tensor, *, has_clean_frame: bool
    ) -> Spread | Prepared:
        """As ``WanTransformer.prepare``; a request that is not split is rank 0's alone."""
        mode = self._leader.mode_of(is_guided=len(texts) > 1)
        own = self._own.prepare(texts, timesteps, latents, has_clean_frame=has_clean_frame)
        if mode is None:
            return own
        if mode == "cfg":
            own = own.branch(0)
        return self._leader.begin(
            self._number, mode, own, [*texts, timesteps], latents.shape, has_clean=has_clean_frame
        )

    def velocities(self, prepared: Spread | Prepared, latents: Tensor, index: int) -> Tensor:
        """As ``WanTransformer.velocities``; returns when they are computed."""
        if isinstance(prepared, Prepared):
            return self._own.velocities(prepared, latents, index)
        latents = latents.to(self._own.network.dtype).contiguous()
        # Before the others begin: from then on there is no way back.
        both = latents.new_empty((2, *latents.shape[1:]))
        self._leader.begin_step(prepared, latents, index)
        if prepared.mode == "ulysses":
            return self._leader.together(self._sharded, prepared, latents, index)
        try:
            both[:1] = self._own.velocities(prepared.own, latents, index)
        finally:
            self._leader.take(both[1:])
        return both
