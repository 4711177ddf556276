"""The application: its routes, the middleware that every request passes, and the API's description."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from functools import cache
from pathlib import Path

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kinema import __version__
from kinema.request.bodies import EditBody, FilmBody, GenerationBody, RemixBody, VideoBody
from kinema.server import routes, usage_routes, videos, webhook_routes
from kinema.server.api import Api
from kinema.server.body import BodyReader
from kinema.server.description import describe
from kinema.server.docs_page import add_docs_page
from kinema.server.errors import InternalError, ServerStopping, UnknownHost, add_error_handlers, response_for
from kinema.server.feeds import Feeds
from kinema.server.hosts import Hosts
from kinema.server.keys import Keys
from kinema.server.links import Links
from kinema.server.list_feeds import ListFeeds
from kinema.server.uploads import Uploads
from kinema.service.service import GenerationService
from kinema.service.webhooks import Webhooks
from kinema.settings import ServerSettings

log = structlog.get_logger(__name__)

_FORMS = (GenerationBody, VideoBody, RemixBody, FilmBody, EditBody, *webhook_routes.FORMS)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def create_app(
    service: GenerationService,
    settings: ServerSettings,
    sender: Webhooks,
    link_secret: bytes,
    folder: Path | None = None,
) -> FastAPI:
    """Return the HTTP side of one service, with the secret that signs its links. It starts and stops nothing.

    Large bodies lie in ``folder`` while they come, by default in the system's folder for temporary files.
    """
    app = FastAPI(title="Kinema", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    keys = Keys(settings.api_keys.get_secret_value(), settings.keys_by_id)
    links = Links(link_secret, settings.link_lifetime_h * 3600)
    feeds = Feeds(service, settings.max_streams_per_key)
    list_feeds = ListFeeds(service)
    uploads = Uploads(int(settings.max_uploads_mb * 2**20), folder)
    bodies = BodyReader(uploads, int(settings.max_body_mb * 2**20), settings.stall_s)
    app.state.api = Api(service, settings, keys, links, feeds, list_feeds, bodies, started_at=int(time.time()))
    app.state.webhooks = sender
    of_keys = (
        *(videos.short_router, routes.router, videos.router, videos.content_router),
        *(usage_routes.router, webhook_routes.router),
    )
    for router in (*of_keys, routes.probes):
        # `include_router` would make each route anew, which takes 30 ms at an application's first request.
        app.router.routes.extend(router.routes)
    add_docs_page(app)
    add_error_handlers(app)
    app.add_middleware(RequestMiddleware, hosts=Hosts(settings), root_path=settings.root_path)
    app.openapi = cache(lambda: describe(app, _FORMS, settings.root_path))  # type: ignore[method-assign]
    return app


class RequestMiddleware:
    """Refuses requests for another host, takes ``root_path`` off their paths, and puts an ``x-request-id`` on every
    answer. Answers with an error when a handler raises an exception that nobody expected, and when uvicorn cancels it
    at a shutdown.

    It is plain ASGI because Starlette's own handler raises an unexpected exception again after the answer. Then
    uvicorn drops the connection, which the client believes it may use again.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, root_path: str) -> None:
        self._app = app
        self._hosts = hosts
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope["root_path"] = self._root_path  # links begin with it
        if (scope["path"] + "/").startswith(self._root_path + "/"):
            scope["path"] = scope["path"].removeprefix(self._root_path) or "/"
        if scope["path"].startswith("/videos"):  # a base URL without its /v1 is a common slip
            scope["path"] = "/v1" + scope["path"]
        # A handler puts the accepted job's id here, so that an error can name it.
        state = scope.setdefault("state", {})
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._hosts.check(scope)
                await self._app(scope, receive, send_with_id)
            except UnknownHost as exc:
                await response_for(exc)(scope, receive, send_with_id)
            except asyncio.CancelledError:
                if not is_started:
                    await response_for(ServerStopping(), state.get("job_id"))(scope, receive, send_with_id)
                # Not raised again: this is the end of the request's task, and uvicorn would log it as a failure.
            except ClientDisconnect:
                log.info("a client went away before its request was whole")
            except Exception:
                log.exception("a request failed unexpectedly", method=scope["method"], path=scope["path"])
                if is_started:
                    raise  # the answer is cut short, and only a closed connection says so
                await response_for(InternalError(), state.get("job_id"))(scope, receive, send_with_id)


def _request_id(headers: Headers) -> str:
    """Return the client's own id when it is a short plain word, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
