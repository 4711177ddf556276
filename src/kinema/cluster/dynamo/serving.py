"""The worker's side: handlers as endpoints, registered as long as the process lives."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
from dynamo import llm
from dynamo.runtime import Context, Endpoint

from kinema.cluster import frames
from kinema.cluster.dynamo.life import PATIENCE_S, REGISTERING_S, RETRY_S, Life, wait_for
from kinema.cluster.frames import Feed
from kinema.cluster.transport import (
    CANARY,
    INFO,
    UNTIL_CLOSED,
    Handler,
    ModelCard,
    Payload,
    Serving,
    TransportSettings,
)
from kinema.errors import KinemaError, Overloaded, RequestError, ServiceError

log = structlog.get_logger(__name__)

# Seconds after which the runtime has given up a stopped stream.
_GIVEN_UP_S = 0.2


async def serve(
    settings: TransportSettings, handlers: Mapping[str, Handler], card: ModelCard | None, videos: Handler | None
) -> Serving:
    """Register the handlers as a worker's endpoints. Returns when discovery lists them, however long that takes.

    ``videos`` answers Dynamo's own frontend under ``card``. Its items are sent unchanged, and a KinemaError that it
    raises becomes the HTTP status there.
    """
    routes = [Route("worker", name, handler) for name, handler in handlers.items()]
    if videos is not None and card is not None:
        routes.append(Route(slug(card.name), "videos", videos, card=card))
    # `info` is last: a frontend that finds a worker by it then finds all other endpoints.
    serving = RegisteredWorker(settings, sorted(routes, key=lambda route: route.name == INFO))
    await serving.start()
    return serving


def slug(name: str) -> str:
    """The name in the form that Dynamo's paths allow."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Route:
    """A handler and the path that it answers."""

    component: str
    name: str
    handler: Handler
    card: ModelCard | None = None

    @property
    def is_lasting(self) -> bool:
        """Whether it answers until the close, also while the worker drains."""
        return self.name in UNTIL_CLOSED

    @property
    def is_plain(self) -> bool:
        """Whether the caller is Dynamo itself, which does not know our frames."""
        return self.card is not None or self.name == CANARY


class RegisteredWorker:
    """A ``Serving``. A stream belongs to the registration in which it began, and may outlive it."""

    def __init__(self, settings: TransportSettings, routes: Sequence[Route]) -> None:
        self._settings = settings
        self._routes = routes
        self._is_draining = False
        self._streams: dict[asyncio.Task[None], tuple[Route, Feed]] = {}
        self._served: list[asyncio.Future[None]] = []
        self._ending: set[asyncio.Future[list[BaseException | None]]] = set()
        self._life: Life
        self._keeper: asyncio.Task[None]

    async def start(self) -> None:
        """Return when discovery lists every endpoint."""
        await self._register()
        self._keeper = asyncio.create_task(self._keep())

    async def drain(self) -> None:
        """See ``Serving``."""
        if not self._is_draining:
            self._is_draining = True
            await self._withdraw()

    async def close(self) -> None:
        """See ``Serving``."""
        await self.drain()
        await self._wait_for_streams(lasting=False)
        self._keeper.cancel()
        self._finish_lasting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._wait_for_streams(lasting=True)
        await self._life.end()
        await asyncio.wait(self._served, timeout=PATIENCE_S)

    async def _keep(self) -> None:
        while True:
            await self._life.wait_until_lost()
            log.warning("discovery lost this worker; registering again, running streams go on")
            # Otherwise frontends would see this worker twice: as the old instance and as the new one.
            self._finish_lasting()
            self._hold_until_ended(self._served)
            await self._register()
            log.info("registered again")

    async def _register(self) -> None:
        while True:
            self._life = await Life.begin(self._settings, "worker")
            self._served = []
            try:
                async with asyncio.timeout(REGISTERING_S):
                    await self._serve_all()
                break
            except Exception as exc:  # the runtime raises nothing more precise
                log.warning("could not register; trying again", reason=repr(exc))
                await self._life.end()
                await asyncio.sleep(RETRY_S)
        if self._is_draining:
            await self._withdraw()

    async def _serve_all(self) -> None:
        for route in self._routes:
            if route.is_lasting or not self._is_draining:
                await self._serve(route)

    async def _serve(self, route: Route) -> None:
        """Serve an endpoint. Returns when discovery lists it."""
        endpoint = self._life.endpoint(route.component, route.name)
        canary = {"canary": 1} if route.name == CANARY else None
        served = asyncio.ensure_future(endpoint.serve_endpoint(self._answering(route), health_check_payload=canary))
        self._served.append(served)
        if route.card is not None:
            await _register_model(endpoint, route.card)
        client = await endpoint.client()
        life = self._life
        await wait_for(lambda: served.done() or life.is_lost or endpoint.connection_id() in client.instance_ids())
        if served.done() or life.is_lost:
            raise ConnectionError(f"discovery did not take the endpoint {route.name}")

    async def _withdraw(self) -> None:
        """Remove the endpoints that admit new work from discovery."""
        if not self._life.is_lost:
            await asyncio.gather(*(self._withdraw_route(route) for route in self._routes if not route.is_lasting))

    async def _withdraw_route(self, route: Route) -> None:
        endpoint = self._life.endpoint(route.component, route.name)
        if route.card is not None:
            await _patiently(llm.unregister_model(endpoint))
        await _patiently(endpoint.unregister_endpoint_instance())

    def _answering(self, route: Route) -> Callable[..., AsyncGenerator[Payload, None]]:
        """A generator for the runtime. It can be left at any ``yield`` without a close, so it only forwards."""

        async def answer(request: Payload, context: Context) -> AsyncGenerator[Payload, None]:
            feed = Feed(route.handler(request))
            stream = asyncio.create_task(_until_over(feed, context))
            self._streams[stream] = (route, feed)
            stream.add_done_callback(self._streams.pop)
            async for frame in _plain(feed) if route.is_plain else feed.frames():
                yield frame

        return answer

    def _finish_lasting(self) -> None:
        for route, feed in self._streams.values():
            if route.is_lasting:
                feed.finish()

    async def _wait_for_streams(self, *, lasting: bool) -> None:
        while running := [stream for stream, (route, _) in self._streams.items() if route.is_lasting == lasting]:
            await asyncio.wait(running)

    def _hold_until_ended(self, served: Sequence[asyncio.Future[None]]) -> None:
        """Keep the endpoints of a lost lease: only this refers to them, and their streams continue."""
        rest = asyncio.gather(*served, return_exceptions=True)
        self._ending.add(rest)
        rest.add_done_callback(self._ending.discard)


async def _register_model(endpoint: Endpoint, card: ModelCard) -> None:
    await llm.register_model(
        llm.ModelInput.Text,
        llm.ModelType.Videos,
        endpoint,
        card.name,
        card.name,
        worker_type=llm.WorkerType.Aggregated,
        user_data=dict(card.user_data),
    )


async def _patiently(unregistering: Awaitable[None]) -> None:
    """Wait for it, but not for ever: without discovery nothing can be removed there, and the lease ends by itself."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await unregistering
    except Exception as exc:  # the runtime raises nothing more precise
        log.warning("could not unregister", reason=repr(exc))


async def _until_over(feed: Feed, context: Context) -> None:
    """Close the handler when the caller stops or is gone. Returns when the stream is over either way."""
    stopped = asyncio.ensure_future(context.async_killed_or_stopped())
    delivered = asyncio.ensure_future(feed.delivered())
    try:
        await asyncio.wait({stopped, delivered}, return_when=asyncio.FIRST_COMPLETED)
        if not delivered.done():
            feed.finish()
            await feed.closed()
            # The runtime keeps the generator of a stopped stream until the next call of any kind.
            await asyncio.sleep(_GIVEN_UP_S)
            context.is_stopped()
    finally:
        stopped.cancel()
        delivered.cancel()


async def _plain(feed: Feed) -> AsyncGenerator[Payload, None]:
    """The items without frames. Raises the exceptions that Dynamo's frontend turns into the right HTTP status."""
    async for frame in feed.frames():
        if "item" in frame:
            yield frame["item"]
        elif (error := frames.error_of(frame)) is not None:
            raise _for_dynamo(error)


def _for_dynamo(error: KinemaError) -> Exception:
    if isinstance(error, RequestError) and not isinstance(error, Overloaded):
        # Only the message of this class reaches the client.
        return llm.exceptions.InvalidArgument(error.message)  # type: ignore[no-any-return]
    return llm.HttpError(_status(error), error.message)  # type: ignore[no-any-return]


def _status(error: KinemaError) -> int:
    if isinstance(error, Overloaded):
        return 429
    return 503 if isinstance(error, ServiceError) or error.is_retryable else 500
