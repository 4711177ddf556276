"""The tools of all handlers: the service, the caller, the body of a submission, and the answer about a job."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kinema.errors import InvalidRequest
from kinema.job import Job, JobStatus
from kinema.jobs.store import Submission
from kinema.request.bodies import Body, fingerprint
from kinema.server.body import BodyReader
from kinema.server.content import read_base64
from kinema.server.errors import CrossOrigin
from kinema.server.feeds import Feeds
from kinema.server.keys import Keys
from kinema.server.links import Links
from kinema.server.list_feeds import ListFeeds
from kinema.server.schemas import Video, VideoRow
from kinema.service.service import GenerationService
from kinema.settings import ServerSettings

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# The width of the database's column.
_MAX_IDEMPOTENCY_KEY = 255
# Any number above zero; how often a client has tried is of no interest.
_RETRY_COUNT = re.compile(r"0*[1-9][0-9]*")

FormT = TypeVar("FormT", bound=Body)


@dataclass(frozen=True)
class Api:
    """The service and the settings, for the handlers. ``started_at`` is in seconds since the epoch."""

    service: GenerationService
    settings: ServerSettings
    keys: Keys
    links: Links
    feeds: Feeds
    list_feeds: ListFeeds
    bodies: BodyReader
    started_at: int

    async def video(self, request: Request, job: Job, *, is_base64: bool = False) -> Video:
        """Return the answer about a job. With ``is_base64`` it may raise FileGone and StorageUnavailable."""
        url = b64_json = live_url = None
        if job.status is JobStatus.COMPLETED and is_base64:
            b64_json = await read_base64(await self.service.open_artifact(job.id))
        elif job.status is JobStatus.COMPLETED:
            url = self.content_url(request, job)
        elif job.status is JobStatus.IN_PROGRESS:
            live_url = self.content_url(request, job, "live")
        outlook = await self.service.outlook(job)
        expires_at = self.service.expires_at(job)
        return Video.from_job(
            job, url=url, b64_json=b64_json, live_url=live_url, expires_at=expires_at, outlook=outlook
        )

    async def row(self, request: Request, job: Job) -> VideoRow:
        """Return the short answer about a job."""
        url = self.content_url(request, job) if job.status is JobStatus.COMPLETED else None
        return VideoRow.from_job(
            job, url=url, expires_at=self.service.expires_at(job), outlook=await self.service.outlook(job)
        )

    def content_url(self, request: Request, job: Job, variant: str | None = None) -> str:
        """Return the address at which the video or a ``variant`` opens, in a browser too, which sends no key."""
        base = (self.settings.public_url or str(request.base_url)).rstrip("/")
        queries = [f"variant={variant}"] if variant is not None else []
        if self.keys.accepts(job.key_id):
            queries.append(self.links.query(job.id))
        query = f"?{'&'.join(queries)}" if queries else ""
        return f"{base}/v1/videos/{job.id}/content{query}"


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a call: the id of its API key, or an empty text on a server without keys."""

    api: Api
    key_id: str
    address: str

    @property
    def name(self) -> str:
        """By what shares of the service's memory are counted: the key, or the address on a server without keys."""
        return self.key_id or self.address


async def _api(request: Request) -> Api:
    """Return the Api. FastAPI would run a plain function in a thread, for which a call may have to wait."""
    api: Api = request.app.state.api
    return api


async def _caller(request: Request) -> Caller:
    """Check where a call comes from and its key. One dependency does both: each one costs as much time as an answer.

    Raises Unauthorized, CrossOrigin.
    """
    api: Api = request.app.state.api
    _refuse_other_origins(request, api)
    key_id = api.keys.identify(request.headers)
    request.state.key_id = key_id
    return Caller(api, key_id, request.client.host if request.client else "")


ApiParam = Annotated[Api, Depends(_api)]
CallerParam = Annotated[Caller, Depends(_caller)]


class ShortRoute(APIRoute):
    """A route that is described like any other, with a short way to its handler, for what clients call most.

    The handler takes the request, the caller and the parts of the path by their names. FastAPI's own way looks for all
    parameters and keeps two stacks of what they opened, which takes longer than to answer a poll.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **given: Any) -> None:  # noqa: ANN401 - FastAPI's
        super().__init__(path, endpoint, **given)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        answer = await self.endpoint(request, await _caller(request), **request.path_params)
        await answer(scope, receive, send)


def _refuse_other_origins(request: Request, api: Api) -> None:
    """Refuse a page of another site: it could post a form to a server on the visitor's own machine.

    The browser names the page's site in ``Origin``. The scheme is not compared, since a proxy may speak TLS for us.
    """
    origin = request.headers.get("origin")
    if origin is None or request.method in _SAFE_METHODS:
        return
    host = request.headers.get("host", "")
    public = "/".join((api.settings.public_url or f"http://{host}").split("/")[:3])
    if origin.lower() not in {own.lower() for own in (f"http://{host}", f"https://{host}", public)}:
        raise CrossOrigin(f"a page of {origin[:100]} may not do this; set server.public_url if that is this server")


def json_response(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """Return a 200 with this body. pydantic writes it: a dictionary in between costs more than a poll's look-up."""
    return Response(body.model_dump_json(), media_type="application/json", headers=headers)


@asynccontextmanager
async def read_submission(
    request: Request, caller: Caller, form: type[FormT]
) -> AsyncIterator[tuple[FormT, Submission]]:
    """Give the body, and what tells whether this request was sent before. The body has its place during the block.

    The OpenAI SDKs send no idempotency key, but count their tries. Raises RequestError.
    """
    path, key = request.scope["path"], _idempotency_key(request)
    is_retry = _RETRY_COUNT.fullmatch(request.headers.get("x-stainless-retry-count", "")) is not None

    def make(fields: dict[str, Any]) -> tuple[FormT, Submission]:
        return form.parse(fields), Submission(fingerprint(path, fields), key, is_retry=is_retry)

    async with caller.api.bodies.read(request, caller.name, make) as made:
        yield made


def _idempotency_key(request: Request) -> str | None:
    """Return the client's key; None without one. Raises InvalidRequest for one that would not be kept whole."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise InvalidRequest("Idempotency-Key is sent more than once; send one")
    if keys and len(keys[0]) > _MAX_IDEMPOTENCY_KEY:
        raise InvalidRequest(f"Idempotency-Key is too long; at most {_MAX_IDEMPOTENCY_KEY} characters")
    return (keys[0] if keys else "") or None
