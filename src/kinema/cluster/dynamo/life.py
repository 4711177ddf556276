"""One registration with discovery, from the construction of a runtime to the loss of its lease.

A runtime whose lease is lost shuts down without a message. The only sign is that ``serve_endpoint`` returns, so each
runtime serves a sentinel endpoint that does nothing else. Its streams continue. A process that wants to be found again
begins another registration beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from collections.abc import AsyncGenerator, Callable

import structlog
from dynamo.runtime import DistributedRuntime, Endpoint

from kinema.cluster.transport import Payload, TransportSettings
from kinema.errors import ConfigError

log = structlog.get_logger(__name__)

# Seconds between a failure and the next try.
RETRY_S = 1.0
# Seconds that leaving may take: it needs an answer of discovery, or of the other end of a stream.
PATIENCE_S = 5.0
# Seconds after which a discovery that accepted a connection but stays silent is asked again.
REGISTERING_S = 30.0
# When etcd does not answer, the constructor blocks a thread for this time, and the process cannot exit.
_ETCD_CONNECT_S = 3
# After this the runtime would leave the streams of a lost lease alone; a generation may take hours.
_STREAMS_MAY_TAKE_S = 7 * 24 * 3600
_POLL_S = 0.05


class Life:
    """A runtime and its sentinel."""

    def __init__(self, runtime: DistributedRuntime, namespace: str, component: str) -> None:
        self._runtime = runtime
        self._namespace = namespace
        serving = self.endpoint(component, "sentinel").serve_endpoint(_say_nothing)
        self._sentinel: asyncio.Future[None] = asyncio.ensure_future(serving)

    @classmethod
    async def begin(cls, settings: TransportSettings, component: str) -> Life:
        """Register. Tries until discovery answers."""
        _set_environment(settings)
        loop = asyncio.get_running_loop()
        while True:
            try:
                runtime = await asyncio.to_thread(DistributedRuntime, loop, settings.discovery, "tcp")
                return cls(runtime, settings.namespace, component)
            except Exception as exc:  # the runtime raises nothing more precise
                if "environment variable" in str(exc):
                    raise ConfigError(f"Dynamo's runtime: {exc}") from exc
                log.warning("discovery does not answer; trying again", discovery=settings.discovery, reason=str(exc))
                await asyncio.sleep(RETRY_S)

    def endpoint(self, component: str, name: str) -> Endpoint:
        return self._runtime.endpoint(f"{self._namespace}.{component}.{name}")

    @property
    def is_lost(self) -> bool:
        return self._sentinel.done()

    async def wait_until_lost(self) -> None:
        await asyncio.wait({self._sentinel})
        if self._sentinel.exception() is not None:  # it was never registered, and the next one may fail too
            await asyncio.sleep(RETRY_S)

    async def end(self) -> None:
        """Unregister; streams continue."""
        self._runtime.shutdown()
        await asyncio.wait({self._sentinel}, timeout=PATIENCE_S)


async def wait_for(condition: Callable[[], bool], timeout_s: float = math.inf) -> None:
    """Return when the condition is true or the time is up. The runtime does not report changes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(_POLL_S)


async def _say_nothing(_request: object) -> AsyncGenerator[Payload, None]:
    yield {}


def _set_environment(settings: TransportSettings) -> None:
    """Set the options of the runtime, which reads them only from the environment. Values of the user stay."""
    _check(settings)
    said = {
        "ETCD_ENDPOINTS": settings.etcd_endpoints,
        "DYN_FILE_KV": settings.file_dir,
        "DYN_TCP_RPC_HOST": settings.host,
        "DYN_TCP_RESPONSE_STREAM_HOST": settings.host,
    }
    defaults = {
        "ETCD_ENDPOINTS": "http://127.0.0.1:2379",
        "ETCD_LEASE_TTL": math.ceil(settings.lease_s),
        "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS": _ETCD_CONNECT_S,
        "DYN_TCP_MAX_MESSAGE_SIZE": round(settings.max_message_mb * 2**20),
        "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": _STREAMS_MAY_TAKE_S,
        "DYN_SYSTEM_STARTING_HEALTH_STATUS": "ready",
    }
    os.environ.update({name: str(value) for name, value in said.items() if value is not None})
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))


def _check(settings: TransportSettings) -> None:
    if settings.discovery == "file" and settings.file_dir is None:
        raise ConfigError("cluster.file_dir is empty; with file discovery it must be a folder that all processes share")
    if not re.fullmatch(r"[a-z0-9_-]+", settings.namespace):
        raise ConfigError(
            f"cluster.namespace = {settings.namespace!r}: only small letters, digits, '-' and '_' are accepted"
        )
