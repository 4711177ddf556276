"""A rank other than 0: a process that holds the transformers alone, and does what rank 0 tells it.

Between two orders it knows nothing but the prompts and times of the requests that have begun. The noise, the solver,
the VAE and the checkpoints are rank 0's.
"""

from __future__ import annotations

import os
import pkgutil
import queue
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from kinema.engines.wan.checkpoint import read_configs
from kinema.engines.wan.loading import LoadTransformers
from kinema.engines.wan.ranks.crew import BEAT_S
from kinema.engines.wan.ranks.group import Group, meet
from kinema.engines.wan.ranks.orders import Line, Said, told
from kinema.engines.wan.ranks.ulysses import ShardedTransformer
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.model import Prepared, WanTransformer

# Signals that a terminal or a supervisor sends to all processes: rank 0 still needs this one while it finishes.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(descriptor: int) -> None:
    """Follow whoever is at the other end of this socket, until it ends."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Follower(Line(Connection(descriptor))).run()


class Follower:
    """The first order says which model and device."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._orders: queue.SimpleQueue[Said] = queue.SimpleQueue()
        # By its key, the transformer that a request runs on, and what that knows of it.
        self._begun: dict[int, tuple[int, Prepared]] = {}
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    @torch.inference_mode()
    def run(self) -> NoReturn:
        """What goes wrong is said, and ends the process."""
        try:
            self._come_up(self._orders.get())
            self._line.say(what="loaded")
            self._join(self._orders.get())
            self._line.say(what="joined")
            # From now on rank 0 counts on them.
            threading.Thread(target=self._give_signs, name="signs", daemon=True).start()
            while True:
                self._obey(self._orders.get())
        except Exception as exc:
            self._line.say(what="failed", **told(exc))
            os._exit(1)

    def _listen(self) -> None:
        """On a thread of its own, so that the end of rank 0 is the end here, whatever the device is at."""
        while (order := self._line.hear()) is not None and order["do"] != "end":
            self._orders.put(order)
        os._exit(0)

    def _give_signs(self) -> None:
        with suppress(OSError):  # whose end is seen by the other thread
            while True:
                self._line.say(what="alive")
                time.sleep(BEAT_S)

    def _come_up(self, order: Said) -> None:
        """Read the weights."""
        self._device = torch.device(order["device"])
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(order["threads"])
        self._attention = AttentionChoice(*order["attention"])
        load: LoadTransformers = pkgutil.resolve_name(order["how"])
        cache = None if order["cache"] is None else Path(order["cache"])
        checkpoint = replace(read_configs(order["name"], Path(order["path"])), cache=cache)
        modules = load(checkpoint, self._device, getattr(torch, order["dtype"]))
        pool = torch.cuda.graph_pool_handle() if order["has_graphs"] else None
        self._transformers = [WanTransformer(module, self._attention, pool, order["linears"]) for module in modules]

    def _join(self, order: Said) -> None:
        # Nobody waits here for a rank that is lost: rank 0 ends the others then.
        self._group = Group(meet(order["port"]), order["number"], order["num_ranks"], self._device, lambda: False)
        self._sharded = [ShardedTransformer(own, self._attention, self._group) for own in self._transformers]

    def _obey(self, order: Said) -> None:
        match order["do"]:
            case "begin":
                self._begin(order)
            case "forget":
                self._begun.pop(order["key"], None)
            case "step":
                self._step(order)

    def _begin(self, order: Said) -> None:
        *texts, timesteps = [self._group.receive(spec) for spec in order["specs"]]
        number = order["expert"]
        latents = torch.empty(order["shape"], device="meta")
        prepared = self._transformers[number].prepare(texts, timesteps, latents, has_clean_frame=order["clean"])
        if order["mode"] == "cfg":  # read beside the prompt, so that it is what one device would have
            prepared = prepared.branch(self._group.rank)
        self._begun[order["key"]] = (number, prepared)

    def _step(self, order: Said) -> None:
        latents = self._group.receive(order["latents"])
        number, prepared = self._begun[order["key"]]
        if order["mode"] == "ulysses":
            self._sharded[number].velocities(prepared, latents, order["index"])
            return
        # Rank 0 waits for a velocity, and gets one that is none when something went wrong.
        velocity, problem = latents, {}
        try:
            velocity = self._transformers[number].velocities(prepared, latents, order["index"])
        except Exception as exc:
            problem = told(exc)
        self._group.broadcast(velocity.contiguous(), self._group.rank)
        self._line.say(what="stepped", **problem)
