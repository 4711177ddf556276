"""The seam between the cluster and whatever carries its messages.

Above it are tasks, events and workers; below it are endpoints by name, streams of plain data, and instances by number.
Knows nothing of either side; what carries the messages today is ``cluster/dynamo.py``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kinema.errors import WorkerLost

# What may travel: str, int of 64 bits, float, bool, bytes, list, dict; None only inside of these.
Payload = Mapping[str, Any]

# An ordinary async generator. When the caller cancels or is gone it is closed: its ``finally`` runs in milliseconds. A
# KinemaError that it raises reaches the caller as the same class, code and message; any other exception as
# EngineFailed, with the traceback in the log here.
Handler = Callable[[Payload], AsyncGenerator[Payload, None]]

RUN, CANCEL, INFO, CANARY = "run", "cancel", "info", "canary"
# These are answered until the very end; the others take nothing new once the worker drains.
UNTIL_CLOSED = frozenset({CANCEL, INFO, CANARY})


class Unreachable(WorkerLost):
    """The worker cannot be reached; nothing was started there."""


class TransportSettings(Protocol):
    """What the transport needs of the ``cluster`` section of the settings."""

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
    """A model as Dynamo's own frontend is to show it: it then sends videos here."""

    name: str
    user_data: Mapping[str, Any]


class Serving(Protocol):
    """A worker's side. It comes back by itself when discovery forgot it; handlers and streams go on meanwhile."""

    async def drain(self) -> None:
        """Take no new ``run`` and no new videos; running streams go on, and UNTIL_CLOSED is still answered."""

    async def close(self) -> None:
        """Drain, wait for the streams to end (those of UNTIL_CLOSED are ended), and be gone.

        Threads of the runtime live on. A process ends soon after this, and best by ``os._exit`` when its logs are
        written: a thread that calls into an interpreter which is being taken down aborts the process.
        """


class Connection(Protocol):
    """A frontend's side. It comes back by itself after discovery forgot it; calls that run go on meanwhile."""

    def instances(self) -> frozenset[int]:
        """As discovery says: some may be dead, and there are none while discovery is away for long."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when ``instances`` would answer otherwise than it last did, or when the time is up."""

    def call(
        self, instance: int, endpoint: str, payload: Payload, *, silence_s: float | None = None
    ) -> AsyncGenerator[Payload, None]:
        """The handler's items until its end; closing the generator cancels the handler.

        Raises KinemaError as the handler raised it, Unreachable when nothing was started, and WorkerLost when the
        worker died, broke off, or gave no sign of life for ``silence_s`` (None: the settings' own).
        """

    async def close(self) -> None:
        """Be gone; calls that still run are broken off."""
