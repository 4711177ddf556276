"""The seam between the cluster and whatever carries its messages.

Above it are tasks, events and workers. Below it are endpoints by name, streams of plain data, and instances by number.
This file knows nothing of either side; today ``cluster/dynamo/`` carries the messages.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kinema.errors import WorkerLost

# Values that may be sent: str, int of 64 bits, float, bool, bytes, list, dict; None only inside of these.
Payload = Mapping[str, Any]

# An ordinary async generator. When the caller cancels or is gone, it is closed: its ``finally`` runs in milliseconds. A
# KinemaError that it raises reaches the caller as the same class, code and message; any other exception as
# EngineFailed, with the traceback in the log here.
Handler = Callable[[Payload], AsyncGenerator[Payload, None]]

RUN, CANCEL, INFO, CANARY, LIVE = "run", "cancel", "info", "canary", "live"
# These endpoints answer until the end. The others accept nothing new when the worker drains.
UNTIL_CLOSED = frozenset({CANCEL, INFO, CANARY, LIVE})


class Unreachable(WorkerLost):
    """The worker cannot be reached; nothing was started there."""


class TransportSettings(Protocol):
    """The settings of section ``cluster`` that the transport needs."""

    @property
    def discovery(self) -> Literal["etcd", "file"]: ...
    @property
    def etcd_endpoints(self) -> str | None: ...
    @property
    def file_dir(self) -> Path | None: ...
    @property
    def namespace(self) -> str: ...
    @property
    def lease_s(self) -> float: ...
    @property
    def silence_s(self) -> float: ...
    @property
    def max_message_mb(self) -> float: ...
    @property
    def host(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as Dynamo's own frontend shows it. That frontend then sends videos to this worker."""

    name: str
    user_data: Mapping[str, Any]


class Serving(Protocol):
    """The worker's side. It registers again when discovery forgot it; handlers and streams continue meanwhile."""

    async def drain(self) -> None:
        """Accept no new ``run`` and no new videos. Running streams continue, and UNTIL_CLOSED is still answered."""

    async def close(self) -> None:
        """Drain, wait for the streams to end (those of UNTIL_CLOSED are ended), and unregister.

        Threads of the runtime stay alive. A process should end soon after this, best by ``os._exit`` when its logs are
        written: a thread that calls into an interpreter during its shutdown aborts the process.
        """


class Connection(Protocol):
    """A frontend's side. It connects again after discovery forgot it; running calls continue meanwhile."""

    def instances(self) -> frozenset[int]:
        """The instances in discovery. Some may be dead, and there are none when discovery is unavailable for long."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when ``instances`` would give another answer than before, or when the time is up."""

    def call(
        self, instance: int, endpoint: str, payload: Payload, *, silence_s: float | None = None
    ) -> AsyncGenerator[Payload, None]:
        """Yield the items of the handler until its end; closing the generator cancels the handler.

        Raises KinemaError as the handler raised it, Unreachable when nothing was started, and WorkerLost when the
        worker died, broke off, or sent nothing for ``silence_s`` (None: the value of the settings).
        """

    async def close(self) -> None:
        """Disconnect; running calls are broken off."""
