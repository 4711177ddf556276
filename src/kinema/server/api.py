"""What all handlers share: the service, who asks, and how a job becomes an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from kinema.job import Job, JobStatus
from kinema.jobs.store import Submission
from kinema.request.bodies import Body, fingerprint
from kinema.server.body import read_body
from kinema.server.content import read_base64
from kinema.server.errors import CrossOrigin
from kinema.server.keys import Keys
from kinema.server.schemas import Video
from kinema.service.service import GenerationService
from kinema.settings import ServerSettings

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_MAX_IDEMPOTENCY_KEY = 255

FormT = TypeVar("FormT", bound=Body)


@dataclass(frozen=True)
class Api:
    """What the handlers work with. ``started_at`` is in seconds since the epoch."""

    service: GenerationService
    settings: ServerSettings
    keys: Keys
    started_at: int

    @property
    def max_body_bytes(self) -> int:
        return int(self.settings.max_body_mb * 2**20)

    async def video(self, request: Request, job: Job, *, is_base64: bool = False) -> Video:
        """The answer about a job. Raises FileGone and StorageUnavailable when the bytes are asked for."""
        url = b64_json = None
        if job.status is JobStatus.COMPLETED and is_base64:
            b64_json = await read_base64(await self.service.open_artifact(job.id))
        elif job.status is JobStatus.COMPLETED:
            url = self.content_url(request, job)
        outlook = await self.service.outlook(job)
        expires_at = self.service.expires_at(job)
        return Video.from_job(job, url=url, b64_json=b64_json, expires_at=expires_at, outlook=outlook)

    def content_url(self, request: Request, job: Job) -> str:
        """Where the video opens, in a browser too."""
        base = (self.settings.public_url or str(request.base_url)).rstrip("/")
        signature = self.keys.sign(job.key_id, job.id)
        return f"{base}/v1/videos/{job.id}/content" + (f"?signature={signature}" if signature else "")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the id of the client's API key, empty where none is asked for."""

    api: Api
    key_id: str


async def _api(request: Request) -> Api:
    """Not a plain function: FastAPI would run it in a thread, and wait for one when all are busy."""
    api: Api = request.app.state.api
    return api


async def _caller(request: Request) -> Caller:
    """The two checks of every call but the probes, in one dependency since each costs as much as its answer.

    Raises Unauthorized, CrossOrigin.
    """
    api: Api = request.app.state.api
    _refuse_other_origins(request, api)
    key_id = api.keys.identify(request.headers)
    request.state.key_id = key_id
    return Caller(api, key_id)


ApiParam = Annotated[Api, Depends(_api)]
CallerParam = Annotated[Caller, Depends(_caller)]


def _refuse_other_origins(request: Request, api: Api) -> None:
    """A page of any site may post a form to a server on the visitor's own machine; browsers say where it came from.

    The scheme is not compared, since a proxy may speak TLS for us.
    """
    origin = request.headers.get("origin")
    if origin is None or request.method in _SAFE_METHODS:
        return
    host = request.headers.get("host", "")
    public = "/".join((api.settings.public_url or f"http://{host}").split("/")[:3])
    if origin.lower() not in {own.lower() for own in (f"http://{host}", f"https://{host}", public)}:
        raise CrossOrigin(f"a page of {origin[:100]} may not do this; set server.public_url if that is this server")


def json_response(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """A 200 with the body, written by pydantic at once: a dictionary in between costs a poll more than its look-up."""
    return Response(body.model_dump_json(), media_type="application/json", headers=headers)


async def read_submission(request: Request, caller: Caller, form: type[FormT]) -> tuple[FormT, Submission]:
    """The body, and what tells this request from another one, and from itself when it is sent again.

    The OpenAI SDKs send no idempotency key, but count their tries. Raises RequestError.
    """
    fields = await read_body(request, caller.api.max_body_bytes)
    key = request.headers.get("idempotency-key", "")[:_MAX_IDEMPOTENCY_KEY] or None
    tries = request.headers.get("x-stainless-retry-count", "0")
    is_retry = tries.isdigit() and int(tries) > 0
    return form.parse(fields), Submission(fingerprint(request.url.path, fields), key, is_retry=is_retry)
