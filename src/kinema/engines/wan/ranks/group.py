"""Tensors between the ranks: by NCCL between GPUs, by gloo on the CPU, over the loopback interface alone.

Each engine has a process group of its own; torch's default group exists once in a process, and engines come and go.
Nothing here waits for ever. gloo notices a rank whose process has ended. NCCL does not, so ``wait`` asks whether ranks
are lost while the GPU computes, and ``abort`` ends the operations that wait for them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, Store, TCPStore

from kinema.errors import WorkerLost

_HOST = "127.0.0.1"
# How long a rank waits for the others. They are asked to join when each of them has read its weights.
_JOIN_S = 60.0
# The last resort: every step takes less, and the end of a process is noticed long before.
_LIMIT = timedelta(minutes=30)
# Between two questions to the GPU. A step takes tens of milliseconds at least.
_LOOK_S = 0.0002

# The shape and type of a tensor, as plain data.
Spec = list[Any]


def spec_of(tensor: Tensor) -> Spec:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


class Rendezvous:
    """Where the ranks find each other: rank 0 listens on a free port of this machine."""

    def __init__(self) -> None:
        listening = socket.create_server((_HOST, 0))
        self.port: int = listening.getsockname()[1]
        # The store's own socket would listen on all interfaces.
        self.store = TCPStore(
            _HOST,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=_JOIN_S),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )


def join_rendezvous(port: int) -> Store:
    """The store of a ``Rendezvous``, for the other ranks."""
    return TCPStore(_HOST, port, timeout=timedelta(seconds=_JOIN_S), wait_for_workers=False)


class Group:
    """All ranks of one engine. Every rank makes the same calls in the same order.

    Calls raise WorkerLost when the others cannot be reached, or when ``is_lost``, which is asked while they wait, says
    that a rank has gone.
    """

    def __init__(
        self, store: Store, rank: int, num_ranks: int, device: torch.device, is_lost: Callable[[], bool]
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._is_lost = is_lost
        self._backend = _nccl(store, rank, num_ranks) if device.type == "cuda" else _gloo(store, rank, num_ranks)
        # NCCL connects at the first operation.
        self.broadcast(torch.zeros(1, device=device), 0)
        self.wait()

    def broadcast(self, tensor: Tensor, root: int) -> Tensor:
        """Send the tensor of ``root`` into the others' tensors; they are contiguous, of any shape and type."""
        options = BroadcastOptions()
        options.rootRank = root
        self._do(self._backend.broadcast, [_as_bytes(tensor)], options)
        return tensor

    def receive(self, spec: Spec, root: int = 0) -> Tensor:
        """Receive what ``root`` broadcasts, as a new tensor."""
        shape, dtype = spec
        return self.broadcast(torch.empty(shape, dtype=getattr(torch, dtype), device=self.device), root)

    def exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send a part of the tensor to each rank, and return the parts that each rank sent, one after another.

        Parts lie along the first axis; ``sent`` and ``received`` are their lengths, by rank.
        """
        tensor = tensor.contiguous()
        out = tensor.new_empty((sum(received), *tensor.shape[1:]))
        # A row as bytes; the row's own shape does not matter on the way.
        self._do(self._backend.alltoall_base, _as_rows(out), _as_rows(tensor), received, sent)
        return out

    def gather(self, part: Tensor, whole: Tensor) -> Tensor:
        """Collect the contiguous parts of all ranks, by rank, in ``whole``, and return it."""
        self._do(self._backend._allgather_base, _as_bytes(whole), _as_bytes(part))
        return whole

    def agree(self, *, is_ready: bool) -> bool:
        """Whether every rank says that it is ready. Waits for the device."""
        ones = [1] * self.num_ranks
        said = self.exchange(torch.full((self.num_ranks,), is_ready, dtype=torch.uint8, device=self.device), ones, ones)
        self.wait()
        return bool(said.min().item())

    def wait(self) -> None:
        """Return when the device has done all its work. Raises WorkerLost."""
        if self.device.type != "cuda":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            if self._is_lost():
                raise WorkerLost
            time.sleep(_LOOK_S)

    def abort(self) -> None:
        """End the operations that wait for other ranks; none works after that. May be called on any thread."""
        self._backend.abort()

    def _do(self, operation: Callable[..., Any], *args: object) -> None:
        if self._is_lost():
            raise WorkerLost
        try:
            operation(*args).wait()
        except RuntimeError as exc:
            raise WorkerLost from exc


def _as_bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _as_rows(tensor: Tensor) -> Tensor:
    return _as_bytes(tensor).view(tensor.shape[0], prod(tensor.shape[1:]) * tensor.element_size())


def _gloo(store: Store, rank: int, num_ranks: int) -> Any:  # noqa: ANN401 - a loosely typed class of torch
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=_HOST)]
    options._timeout = _LIMIT
    return gloo(store, rank, num_ranks, options)


def _nccl(store: Store, rank: int, num_ranks: int) -> Any:  # noqa: ANN401 - as above
    # NCCL reads it from the environment alone. Between GPUs of one machine this interface only carries the set-up.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # The end of a rank's process is noticed by its channel; torch's own watchdog would abort this process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _LIMIT
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)
