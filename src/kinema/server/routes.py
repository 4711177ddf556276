"""One short handler per endpoint: parse, call the service, answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from kinema.errors import KinemaError, NoWorker, UnsupportedRequest
from kinema.job import Job, JobId, JobStatus
from kinema.server.bodies import read_body
from kinema.server.content import content_response, read_base64
from kinema.server.disconnect import ClientGone, unless_gone
from kinema.server.errors import CrossOrigin, JobFailed, public_error, response_for
from kinema.server.schemas import ErrorBody, GenerationBody, Model, ModelList, Video
from kinema.server.sse import EventSourceResponse, event_stream
from kinema.service import GenerationService
from kinema.settings import ServerSettings

log = structlog.get_logger(__name__)

_BODY = {"schema": {"$ref": "#/components/schemas/GenerationBody"}}
_REQUEST_BODY = {
    "requestBody": {"required": True, "content": {"application/json": _BODY, "multipart/form-data": _BODY}}
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What was wrong with the request, and what would be accepted."},
    "5XX": {"model": ErrorBody, "description": "The video could not be made, or the service cannot do this now."},
}
_MP4: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/mp4": {}}, "description": "The video."},
    206: {"content": {"video/mp4": {}}, "description": "The part that the Range header asks for."},
}
# nginx's number for it; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Api:
    """What the handlers work with. ``started_at`` is in seconds since the epoch."""

    service: GenerationService
    settings: ServerSettings
    started_at: int

    @property
    def max_body_bytes(self) -> int:
        return int(self.settings.max_body_mb * 2**20)


async def _api(request: Request) -> Api:
    """Not a plain function: FastAPI would run it in a thread, and wait for one when all are busy."""
    api: Api = request.app.state.api
    return api


ApiParam = Annotated[Api, Depends(_api)]


async def _refuse_other_origins(request: Request, api: ApiParam) -> None:
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


router = APIRouter(dependencies=[Depends(_refuse_other_origins)])


@router.post(
    "/v1/videos/generations", response_model=Video, responses=_ERRORS, openapi_extra=_REQUEST_BODY, tags=["videos"]
)
async def generate(request: Request, api: ApiParam) -> Response:
    """Make a video and answer when it is done; with `stream`, tell how it goes in server-sent events.

    A client that disconnects cancels its generation.
    """
    body = GenerationBody.parse(await read_body(request, api.max_body_bytes))
    job = await api.service.submit(
        body.options(), model=body.model or None, image=body.input_reference, user=body.user, notes=body.notes()
    )
    request.state.job_id = job.id  # whatever fails from here on says so
    if body.stream:
        return _stream(request, api, job, is_base64=body.is_base64)
    try:
        job = await unless_gone(request.receive, api.service.wait(job.id))
    except ClientGone:
        await api.service.cancel(job.id)
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except Exception:
        with suppress(KinemaError):  # what went wrong first is what the client should hear of
            await api.service.cancel(job.id)
        raise
    if job.status is JobStatus.FAILED:
        raise JobFailed(job)
    return JSONResponse(await _video(request, api, job, is_base64=body.is_base64))


def _stream(request: Request, api: Api, job: Job, *, is_base64: bool) -> Response:
    async def final(job: Job) -> dict[str, Any]:
        try:
            return await _video(request, api, job, is_base64=is_base64)
        except Exception as exc:
            log.exception("the last event has no video", job_id=job.id)
            return Video.from_job(job).model_dump(mode="json") | {"error": public_error(exc).model_dump()}

    chunks = event_stream(job, api.service.events(job.id), final)
    return EventSourceResponse(chunks, on_gone=lambda: api.service.cancel(job.id))


async def _video(request: Request, api: Api, job: Job, *, is_base64: bool) -> dict[str, Any]:
    url = b64_json = None
    if job.status is JobStatus.COMPLETED and is_base64:
        b64_json = await read_base64(await api.service.open_artifact(job.id))
    elif job.status is JobStatus.COMPLETED:
        base = (api.settings.public_url or str(request.base_url)).rstrip("/")
        url = f"{base}/v1/videos/{job.id}/content"
    return Video.from_job(job, url=url, b64_json=b64_json).model_dump(mode="json")


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get("/v1/videos/{video_id}/content", responses=_MP4 | _ERRORS, response_class=Response, tags=["videos"])
async def content(request: Request, api: ApiParam, video_id: str) -> Response:
    """The finished video as MP4. Range and If-None-Match are honoured."""
    variant = request.query_params.get("variant", "video")
    if variant != "video":
        raise UnsupportedRequest(f"variant {variant[:40]!r} is not made; accepted: video", param="variant")
    opened = await api.service.open_artifact(JobId(video_id))
    return await content_response(request, opened, f"{video_id}.mp4")


@router.get("/v1/models", response_model=ModelList, responses=_ERRORS, tags=["models"])
async def models(api: ApiParam) -> Response:
    """What is served."""
    served = [Model.from_capabilities(can, api.started_at) for can in api.service.models()]
    return JSONResponse(ModelList(data=served).model_dump(mode="json"))


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=_ERRORS, tags=["models"])
async def model(api: ApiParam, model_id: str) -> Response:
    """One model: its defaults (`preset`) and bounds (`limits`)."""
    can = api.service.model(model_id)
    return JSONResponse(Model.from_capabilities(can, api.started_at).model_dump(mode="json"))


@router.get("/live", tags=["health"])
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/ready", responses=_ERRORS, response_model=dict[str, str], tags=["health"])
async def ready(api: ApiParam) -> Response:
    """A worker takes jobs."""
    if not api.service.is_ready():
        return response_for(NoWorker("no worker is ready yet"))
    return JSONResponse({"status": "ready"})


@router.get("/health", responses=_ERRORS, response_model=dict[str, Any], tags=["health"])
async def health(api: ApiParam) -> Response:
    """Whether the parts work, and how many jobs wait."""
    return JSONResponse(
        {
            "status": "ready" if api.service.is_ready() else "starting",
            "models": [can.model for can in api.service.models()],
            "jobs_waiting": await api.service.count_waiting(),
        }
    )
