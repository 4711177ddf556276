"""Rank 0's side: transformers that look like those of one device, and let the other ranks compute their share.

Rank 0 alone has the solver and the latents between two steps, and sends the latents with each step. They are small: 4
MB for 81 frames of 832x480 in bfloat16, a ten-thousandth of a step between two GPUs, and 9 MB with the channels of
given frames. So nothing can drift apart, and
generations interleave, are cancelled, parked and resumed as on one device.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.device_memory import DeviceMemory
from kinema.engines.wan.loading import LoadTransformers, load_transformers
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.placement import Offload
from kinema.engines.wan.ranks.group import Group, Rendezvous, spec_of
from kinema.engines.wan.ranks.plan import Mode, ParallelPlan
from kinema.engines.wan.ranks.processes import RankProcesses
from kinema.engines.wan.ranks.shard import Shard, share
from kinema.engines.wan.ranks.ulysses import ShardedTransformer
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer
from kinema.errors import ConfigError, WorkerLost


def devices_of(first: torch.device, num_ranks: int) -> list[torch.device]:
    """The device of each rank: GPUs one after another, or the CPU for all. Raises ConfigError."""
    if num_ranks == 1 or first.type == "cpu":
        return [first] * num_ranks
    if first.type != "cuda":
        raise ConfigError(
            f"engine.wan.gpus = {num_ranks}: engine.device is {first}, and only cuda or cpu can be several"
        )
    start = first.index or 0
    num_left = torch.cuda.device_count() - start
    if num_left < num_ranks:
        raise ConfigError(
            f"engine.wan.gpus = {num_ranks}: there are {num_left} GPUs from cuda:{start} on; give {num_left} at most"
        )
    return [torch.device("cuda", start + rank) for rank in range(num_ranks)]


@dataclass(frozen=True, eq=False)
class ParallelRequest:
    """A request that the other ranks know by its ``key``; ``own`` is rank 0's part of it."""

    key: int
    mode: Mode
    own: PreparedRequest


@dataclass(frozen=True, eq=False)
class RanksLoras:
    """LoRAs that the other ranks keep in their memory by this ``key``, as long as this object is there."""

    key: int


class Leader:
    """Commands the other ranks, which begin to read their weights at once.

    Call ``join`` when rank 0 has read its own, and ``close`` at the end.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        checkpoint: Checkpoint,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        attention: AttentionChoice,
        linears: Linears = "dtype",
        weights_dtype: WeightsDtype = "dtype",
        *,
        offload: Offload = "none",
        has_graphs: bool,
        memory_gb: float | None = None,
        load: LoadTransformers = load_transformers,
    ) -> None:
        # How the next generations are shared.
        self.plan = plan
        self._devices = devices
        self._attention = attention
        self._group: Group | None = None
        self._keys = itertools.count(1)
        # The keys of requests that ended, and of LoRAs that nobody needs; the other ranks are told with the next order.
        self._dropped: deque[int] = deque()
        self._processes = RankProcesses(plan.num_ranks, self._abort)
        for rank in self._processes.ranks:
            self._processes.send_to(
                rank,
                do="load",
                number=rank.number,
                num_ranks=plan.num_ranks,
                num_parts=plan.num_parts,
                name=checkpoint.name,
                path=str(checkpoint.path.resolve()),
                files={name: str(file.resolve()) for name, file in checkpoint.files.items()},
                cache=None if checkpoint.cache is None else str(checkpoint.cache.resolve()),
                how=f"{load.__module__}:{load.__qualname__}",
                device=str(devices[rank.number]),
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                # They get the kernels that were chosen here, since other kernels would compute other bits.
                attention=[attention.short, attention.long],
                linears=linears,
                offload=offload,
                weights_dtype=weights_dtype,
                has_graphs=has_graphs,
                memory_gb=memory_gb,
            )

    @property
    def is_lost(self) -> bool:
        """Whether a rank is gone, so that no video can be made any more. May be asked on any thread."""
        return self._processes.is_lost

    def join(
        self, transformers: Sequence[WanTransformer], memory: DeviceMemory | None = None, shard: Shard | None = None
    ) -> list[ParallelTransformer]:
        """Wait until all have read their weights, and connect them. ``memory`` and ``shard`` are those of rank 0.
        Raises the error of one that could not."""
        self._processes.collect()
        rendezvous = Rendezvous()
        self._processes.send(do="join", port=rendezvous.port)
        with self._processes.guarded():
            self._group = group = Group(
                rendezvous.store, 0, self.plan.num_ranks, self._devices[0], lambda: self.is_lost
            )
        self._processes.collect()
        if shard is not None:
            shard.join(group)
        return [
            ParallelTransformer(self, number, own, share(own, self._attention, group, shard, memory))
            for number, own in enumerate(transformers)
        ]

    def make_room(self) -> None:
        """Let the other ranks free what only saves time, before their next step. A lost one frees all."""
        with suppress(WorkerLost):
            self._processes.send(do="make room")

    def close(self) -> None:
        """End the other ranks."""
        self._processes.close()
        self._abort()
        self._group = None

    @contextmanager
    def reading(self, loras: Sequence[LoraRef]) -> Iterator[RanksLoras]:
        """Let the other ranks read these LoRAs beside their orders; the end of the block waits for that. May be called
        on any thread. Raises the error of one that could not, or WorkerLost."""
        read = RanksLoras(next(self._keys))
        weakref.finalize(read, self._dropped.append, read.key).atexit = False
        with self._processes.asked(read.key, do="read", loras=[lora.to_json() for lora in loras]):
            yield read

    def mode_of(self, *, is_guided: bool) -> Mode | None:
        """How a generation is shared; see ``ParallelPlan.mode_of``."""
        return self.plan.mode_of(is_guided=is_guided)

    def begin(
        self,
        expert: int,
        mode: Mode,
        own: PreparedRequest,
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        *,
        has_clean: bool,
        loras: Sequence[LoraRef],
        has_images: bool,
    ) -> ParallelRequest:
        """Send a request to the other ranks: its timesteps, texts and, with ``has_images``, image states as
        ``tensors``, its latents' ``shape``, and its ``loras``, which each rank reads by itself."""
        request = ParallelRequest(next(self._keys), mode, own)
        weakref.finalize(request, self._dropped.append, request.key).atexit = False
        specs = [spec_of(tensor) for tensor in tensors]
        self._send(
            *tensors,
            do="begin",
            key=request.key,
            mode=mode,
            expert=expert,
            shape=list(shape),
            clean=has_clean,
            loras=[lora.to_json() for lora in loras],
            has_images=has_images,
            specs=specs,
        )
        return request

    def begin_step(self, request: ParallelRequest, latents: Tensor, index: int) -> None:
        """Let the other ranks begin the step ``index``."""
        self._send(latents, do="step", key=request.key, mode=request.mode, index=index, latents=spec_of(latents))

    def receive_velocity(self, velocity: Tensor) -> None:
        """Receive rank 1's velocity into this tensor. To be called after each step, since rank 1 waits until it is
        sent.

        Raises the error of rank 1.
        """
        with self._processes.guarded():
            self._joined.broadcast(velocity, root=1)
            self._joined.wait()
        self._processes.collect()

    def compute_sharded(
        self, transformer: ShardedTransformer, request: ParallelRequest, latents: Tensor, index: int
    ) -> Tensor:
        """The velocities, to which all ranks contribute. Raises the error of a rank that could not begin."""
        velocities = latents
        with self._processes.guarded():
            if self._joined.agree(is_ready=True):
                velocities = transformer.velocities(request.own, latents, index)
                self._joined.wait()
        self._processes.collect()
        return velocities

    def _send(self, *tensors: Tensor, **order: object) -> None:
        while self._dropped:
            self._processes.send(do="forget", key=self._dropped.popleft())
        self._processes.send(**order)
        with self._processes.guarded():
            for tensor in tensors:
                self._joined.broadcast(tensor.contiguous(), root=0)

    def _abort(self) -> None:
        """End what waits for a lost rank. Also called on the thread that noticed the loss."""
        if self._group is not None:
            self._group.abort()

    @property
    def _joined(self) -> Group:
        assert self._group is not None, "join() was not called"
        return self._group


class ParallelTransformer:
    """Stands for a WanTransformer in the denoising loop. Raises WorkerLost when a rank is gone."""

    def __init__(
        self, leader: Leader, number: int, own: WanTransformer, sharded: Mapping[Mode, ShardedTransformer]
    ) -> None:
        self._leader = leader
        self._number = number
        self._own = own
        self._sharded = sharded

    def prepare(
        self,
        texts: list[Tensor],
        timesteps: Tensor,
        latents: Tensor,
        *,
        has_clean_frame: bool,
        loras: Sequence[LoraRef] = (),
        images: Tensor | None = None,
    ) -> ParallelRequest | PreparedRequest:
        """See ``WanTransformer.prepare``. A request that is not shared is computed by rank 0 alone."""
        mode = self._leader.mode_of(is_guided=len(texts) > 1)
        own = self._own.prepare(texts, timesteps, latents, has_clean_frame=has_clean_frame, loras=loras, images=images)
        if mode is None:
            return own
        if mode == "cfg":
            own = own.branch(0)
        return self._leader.begin(
            self._number,
            mode,
            own,
            [timesteps, *texts] if images is None else [timesteps, *texts, images],
            latents.shape,
            has_clean=has_clean_frame,
            loras=loras,
            has_images=images is not None,
        )

    def velocities(self, prepared: ParallelRequest | PreparedRequest, latents: Tensor, index: int) -> Tensor:
        """See ``WanTransformer.velocities``; returns when they are computed."""
        if isinstance(prepared, PreparedRequest):
            return self._own.velocities(prepared, latents, index)
        latents = latents.to(self._own.network.dtype).contiguous()
        # Allocated before the others begin: an error after that would make them lost.
        if (sharded := self._sharded.get(prepared.mode)) is not None:
            sharded.reserve(prepared.own, latents)
            self._leader.begin_step(prepared, latents, index)
            return self._leader.compute_sharded(sharded, prepared, latents, index)
        both = latents.new_empty(2, self._own.network.out_channels, *latents.shape[2:])
        self._leader.begin_step(prepared, latents, index)
        try:
            both[:1] = self._own.velocities(prepared.own, latents, index)
        finally:
            self._leader.receive_velocity(both[1:])
        return both
