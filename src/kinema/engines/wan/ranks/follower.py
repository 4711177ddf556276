"""A rank other than 0: a process that holds the transformers alone, and follows the orders of rank 0.

Between two orders it knows only the prompts, pictures and times of the requests that have begun. Rank 0 has the noise,
the solver, the VAE and the checkpoints.
"""

from __future__ import annotations

import os
import pkgutil
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from kinema.engines.failures import meaning_of, release_frames
from kinema.engines.wan.checkpoint import read_configs
from kinema.engines.wan.device_memory import CudaMemory
from kinema.engines.wan.loading import LoadTransformers
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.lora.reading import Lora, LoraReader, reader_of
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.ranks.channel import Channel, RankMessage, error_fields
from kinema.engines.wan.ranks.group import Group, join_rendezvous
from kinema.engines.wan.ranks.processes import HEARTBEAT_S
from kinema.engines.wan.ranks.shard import shard_of, share, stream_of
from kinema.engines.wan.ranks.ulysses import ShardedTransformer
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer
from kinema.errors import WorkerLost

T = TypeVar("T")

# Signals that a terminal or a supervisor sends to all processes. Rank 0 still needs this process while it finishes.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(descriptor: int) -> None:
    """Follow the process at the other end of this socket, until it ends."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Follower(Channel(Connection(descriptor))).run()


class Follower:
    """Receives orders and follows them; the first one names the model and the device."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stream: BlockStream | None = None
        self._orders: queue.SimpleQueue[RankMessage] = queue.SimpleQueue()
        self._memory: CudaMemory | None = None
        self._begun: dict[int, _Begun] = {}  # by the request's key
        self._reader: LoraReader | None = None
        self._read: dict[int, list[Lora]] = {}  # by the key of the reading
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    @torch.inference_mode()
    def run(self) -> NoReturn:
        """Follow orders for ever. An error is sent to rank 0, and ends the process."""
        try:
            self._load(self._orders.get())
            self._channel.send(what="loaded")
            self._join(self._orders.get())
            self._channel.send(what="joined")
            # From now on rank 0 counts on them.
            threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()
            while True:
                self._follow(self._orders.get())
        except Exception as exc:
            self._channel.send(what="failed", **error_fields(exc))
            os._exit(1)

    def _listen(self) -> None:
        """Receive orders on a thread of its own, so that the end of rank 0 ends this process at once."""
        while (order := self._channel.receive()) is not None and order["do"] != "end":
            if order["do"] == "read":  # beside the other orders
                threading.Thread(target=self._read_loras, args=(order,), name="loras", daemon=True).start()
            else:
                self._orders.put(order)
        os._exit(0)

    def _read_loras(self, order: RankMessage) -> None:
        """Read LoRAs, and keep them until they are forgotten."""
        reader, refs = self._reader, [LoraRef.from_json(values) for values in order["loras"]]
        assert reader is not None, "rank 0 waits until the weights are read"
        loras, problem = _tried(lambda: [reader.read(ref) for ref in refs])
        if loras is not None:
            self._read[order["key"]] = loras
        with suppress(OSError):  # the end of rank 0 ends this process
            self._channel.send(what="read", key=order["key"], **problem)

    def _send_heartbeats(self) -> None:
        with suppress(OSError):  # the other thread notices the end of rank 0
            while True:
                self._channel.send(what="alive")
                time.sleep(HEARTBEAT_S)

    def _load(self, order: RankMessage) -> None:
        """Read the weights."""
        self._rank, self._num_ranks = order["number"], order["num_ranks"]
        self._device = torch.device(order["device"])
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self._memory = CudaMemory(self._device, order["memory_gb"])
        else:
            torch.set_num_threads(order["threads"])
        self._attention = AttentionChoice(*order["attention"])
        load: LoadTransformers = pkgutil.resolve_name(order["how"])
        cache = None if order["cache"] is None else Path(order["cache"])
        files = {name: Path(file) for name, file in order["files"].items()}
        checkpoint = replace(read_configs(order["name"], Path(order["path"]), files), cache=cache)
        placement = Placement(self._device, order["offload"], num_parts=order["num_parts"])
        modules = load(checkpoint, placement.of_transformers, getattr(torch, order["dtype"]))
        self._has_graphs = order["has_graphs"]
        pool = self._new_pool()
        self._shard = shard_of(placement, self._rank)
        self._stream = stream_of(placement, self._shard)
        how = order["linears"], order["weights_dtype"], self._stream
        self._reader = reader = reader_of(checkpoint)
        self._transformers = [
            WanTransformer(module, self._attention, pool, *how, partial(reader.deltas, name=name))
            for name, module in zip(checkpoint.transformers, modules, strict=True)
        ]

    def _new_pool(self) -> Any:  # noqa: ANN401 - torch has no type for it
        return torch.cuda.graph_pool_handle() if self._has_graphs else None

    def _join(self, order: RankMessage) -> None:
        # This rank never looks for lost ones: rank 0 kills it when one is lost.
        store = join_rendezvous(order["port"])
        self._group = group = Group(store, self._rank, self._num_ranks, self._device, lambda: False)
        if self._shard is not None:
            self._shard.join(group)
        self._sharded = [share(own, self._attention, group, self._shard, self._memory) for own in self._transformers]

    def _follow(self, order: RankMessage) -> None:
        match order["do"]:
            case "begin":
                self._begin(order)
            case "forget":
                self._begun.pop(order["key"], None)
                self._read.pop(order["key"], None)
            case "step":
                self._step(order)
            case "make room":
                self._make_room()

    def _make_room(self) -> None:
        pool = self._new_pool()
        for transformer in self._transformers:
            transformer.drop_graphs(pool)
            transformer.drop_prompts()
            transformer.drop_adapters()
        if self._stream is not None:
            self._stream.drop()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _begin(self, order: RankMessage) -> None:
        timesteps, *texts = [self._group.receive(spec) for spec in order["specs"]]
        images = texts.pop() if order["has_images"] else None
        number = order["expert"]
        latents = torch.empty(order["shape"], device="meta")
        loras = [LoraRef.from_json(values) for values in order["loras"]]

        def prepare() -> PreparedRequest:
            prepared = self._transformers[number].prepare(
                texts, timesteps, latents, has_clean_frame=order["clean"], loras=loras, images=images
            )
            # Both prompts are read together, for the numbers that one device would have.
            return prepared.branch(self._group.rank) if order["mode"] == "cfg" else prepared

        self._begun[order["key"]] = _Begun(number, *_tried(prepare))

    def _step(self, order: RankMessage) -> None:
        latents = self._group.receive(order["latents"])
        begun = self._begun[order["key"]]
        if (sharded := self._sharded[begun.number].get(order["mode"])) is not None:
            self._step_together(sharded, begun, latents, order["index"])
            return
        # Rank 0 waits for a velocity; after an error it gets a part of the latents, which it does not use.
        own, velocity, problem = self._transformers[begun.number], None, begun.problem
        if (prepared := begun.prepared) is not None:
            velocity, problem = _tried(lambda: own.velocities(prepared, latents, order["index"]))
        sent = latents[:, : own.network.out_channels] if velocity is None else velocity
        self._group.broadcast(sent.contiguous(), self._group.rank)
        self._channel.send(what="stepped", **problem)

    def _step_together(self, sharded: ShardedTransformer, begun: _Begun, latents: Tensor, index: int) -> None:
        """A part of a step of all ranks, which none of them begins when one has no memory for it."""
        prepared, problem = begun.prepared, begun.problem
        if prepared is not None:
            _, problem = _tried(partial(sharded.reserve, prepared, latents))
        if self._group.agree(is_ready=not problem):
            assert prepared is not None, "a rank without it is not ready"
            sharded.velocities(prepared, latents, index)
        self._channel.send(what="stepped", **problem)


@dataclass(frozen=True)
class _Begun:
    """A request on the transformer of this number: what that needs of it, or the error that kept it from that."""

    number: int
    prepared: PreparedRequest | None
    problem: RankMessage


def _tried(work: Callable[[], T]) -> tuple[T | None, RankMessage]:
    """What the work gives, or its error for rank 0. Raises that of a device that is lost, which does nothing more."""
    try:
        return work(), {}
    except Exception as exc:
        if isinstance(meaning_of(exc), WorkerLost):
            raise
        problem = error_fields(exc)
        release_frames(exc)
        return None, problem
