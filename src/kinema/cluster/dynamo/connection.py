"""The frontend's side: the workers that exist, and calls to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import structlog
from dynamo.runtime import Client, Context

from kinema.cluster import frames
from kinema.cluster.dynamo.life import REGISTERING_S, RETRY_S, Life, wait_for
from kinema.cluster.transport import CANCEL, INFO, RUN, Connection, Payload, TransportSettings, Unreachable
from kinema.errors import InvalidRequest, KinemaError, NoWorker, WorkerLost

log = structlog.get_logger(__name__)

# Discovery reports the endpoints of a new worker one by one.
_SETTLING_S = 1.0


async def connect(settings: TransportSettings) -> Connection:
    """Join as a frontend. Returns when discovery answers, however long that takes."""
    connection = Frontend(settings)
    await connection.start()
    return connection


class Clients:
    """The clients of one registration. Making a client needs discovery; calls with it do not."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self._made: dict[str, Client] = {}

    async def make_usual(self) -> None:
        """Make the clients that a frontend needs even while discovery is unavailable."""
        for endpoint in (INFO, RUN, CANCEL):
            await self.get(endpoint)

    async def get(self, endpoint: str) -> Client:
        """The client of this endpoint. A new client may not know the workers yet."""
        if endpoint not in self._made:
            self._made[endpoint] = await self.life.endpoint("worker", endpoint).client()
        return self._made[endpoint]

    def instances(self) -> frozenset[int]:
        """Every worker that discovery lists."""
        return frozenset() if self.life.is_lost else frozenset(self._made[INFO].instance_ids())


class Frontend:
    """A ``Connection``."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._told: frozenset[int] = frozenset()
        self._open: set[Context] = set()
        self._clients: Clients
        self._keeper: asyncio.Task[None]

    async def start(self) -> None:
        """Return when discovery answers."""
        await self._join()
        self._keeper = asyncio.create_task(self._keep())

    def instances(self) -> frozenset[int]:
        """See ``Connection``."""
        self._told = self._clients.instances()
        return self._told

    async def wait_for_change(self, timeout_s: float) -> None:
        """See ``Connection``."""
        await wait_for(lambda: self._clients.instances() != self._told, timeout_s)

    async def call(
        self, instance: int, endpoint: str, payload: Payload, *, silence_s: float | None = None
    ) -> AsyncGenerator[Payload, None]:
        """See ``Connection``."""
        silence_s = self._settings.silence_s if silence_s is None else silence_s
        context = Context()
        self._open.add(context)
        try:
            stream = await self._begin(instance, endpoint, payload, context, silence_s)
            async for item in frames.items(stream, silence_s):
                yield item
        finally:
            self._open.discard(context)
            context.stop_generating()

    async def close(self) -> None:
        """See ``Connection``."""
        self._keeper.cancel()
        for context in self._open:
            context.stop_generating()
        await self._clients.life.end()

    async def _begin(
        self, instance: int, endpoint: str, payload: Payload, context: Context, silence_s: float
    ) -> AsyncGenerator[frames.Frame, None]:
        """The frames of a call that the worker has accepted."""
        try:
            async with asyncio.timeout(silence_s):
                client = await self._client_that_knows(instance, endpoint)
                return await client.direct(dict(payload), instance, annotated=False, context=context)  # type: ignore[no-any-return]
        except TimeoutError as exc:
            raise WorkerLost(f"The worker did not answer for {silence_s:g} s.") from exc
        except (KinemaError, TypeError):
            raise  # TypeError: the payload has a value that cannot be sent, our own mistake
        except Exception as exc:  # only the text of the exception says which error it is
            raise _not_begun(str(exc)) from exc

    async def _client_that_knows(self, instance: int, endpoint: str) -> Client:
        clients = self._clients
        try:
            client = await clients.get(endpoint)
        except Exception as exc:  # the runtime raises nothing more precise
            raise Unreachable from exc
        await wait_for(lambda: instance in client.instance_ids() or instance not in clients.instances(), _SETTLING_S)
        return client

    async def _join(self) -> None:
        while True:
            clients = Clients(await Life.begin(self._settings, "frontend"))
            try:
                async with asyncio.timeout(REGISTERING_S):
                    await clients.make_usual()
            except Exception as exc:  # the runtime raises nothing more precise
                log.warning("could not join; trying again", reason=repr(exc))
                await clients.life.end()
                await asyncio.sleep(RETRY_S)
            else:
                self._clients = clients
                return

    async def _keep(self) -> None:
        while True:
            await self._clients.life.wait_until_lost()
            log.warning("discovery lost this frontend; joining again, running calls go on")
            await self._join()
            log.info("joined again")


def _not_begun(told: str) -> KinemaError:
    """The error that the text of the runtime stands for; the text begins with a category."""
    category, _, reason = told.partition(": ")
    if category == "CapacityExhausted":
        return NoWorker()
    if category == "InvalidRequest":
        return InvalidRequest("The request is larger than cluster.max_message_mb allows.")
    if category == "Unavailable" and "generate() failed" not in reason:
        return Unreachable()
    return WorkerLost(f"The worker did not take the call: {told}")
