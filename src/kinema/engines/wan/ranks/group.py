"""What the ranks send each other of tensors: NCCL between GPUs, gloo on the CPU, over the loopback interface alone.

A process group of its own and not torch's default one, of which a process has a single one: engines come and go.
Nothing here waits for ever: gloo notices a rank whose process has ended; NCCL does not, so ``wait`` looks whether the
ranks are lost while the GPU computes, and ``abort`` ends the operations that wait for them.
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
# Until all have come together; they are told to when each of them has read its weights.
_JOIN_S = 60.0
# The last resort: a step takes less, whatever it is, and a rank that is lost is noticed by its process long before.
_LIMIT = timedelta(minutes=30)
# Between two looks at the GPU. A step takes tens of milliseconds at least.
_LOOK_S = 0.0002

# Shape and type of a tensor, as plain data.
Spec = list[Any]


def spec_of(tensor: Tensor) -> Spec:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


class Meeting:
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


def meet(port: int) -> Store:
    """The other ranks' side of a Meeting."""
    return TCPStore(_HOST, port, timeout=timedelta(seconds=_JOIN_S), wait_for_workers=False)


class Group:
    """All ranks of one engine. ``is_lost`` says whether it is in vain to wait for one of them; asked while waiting.

    Every rank makes the same calls in the same order. They raise WorkerLost when the others cannot be reached.
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
        """The tensor of ``root``, which the others get into theirs: contiguous, of any shape and type."""
        options = BroadcastOptions()
        options.rootRank = root
        self._do(self._backend.broadcast, [_as_bytes(tensor)], options)
        return tensor

    def receive(self, spec: Spec, root: int = 0) -> Tensor:
        """A new tensor with what ``root`` broadcasts."""
        shape, dtype = spec
        return self.broadcast(torch.empty(shape, dtype=getattr(torch, dtype), device=self.device), root)

    def exchange(self, tensor: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """Split along the first axis, part r goes to rank r; those that come, as long as ``taken`` says, one after
        another."""
        tensor = tensor.contiguous()
        out = tensor.new_empty((sum(taken), *tensor.shape[1:]))
        # A row as bytes; the row's own shape does not matter on the way.
        self._do(self._backend.alltoall_base, _as_rows(out), _as_rows(tensor), taken, given)
        return out

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""
        if self.device.type != "cuda":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            if self._is_lost():
                raise WorkerLost
            time.sleep(_LOOK_S)

    def abort(self) -> None:
        """End what waits for the others; nothing can be sent any more. May be called on any thread."""
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
    # NCCL takes it from the environment alone. Between GPUs of one machine it carries nothing but the first greetings.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # A rank that is lost is noticed by its process. torch's own watch would abort this one.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _LIMIT
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)
