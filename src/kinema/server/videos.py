"""``/v1/videos``: OpenAI's Videos API, and what it lacks (cancel, events)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kinema.errors import InvalidRequest, JobNotFound, Unauthorized, UnsupportedRequest
from kinema.ids import JobId, is_job_id
from kinema.job import Job
from kinema.request.bodies import EditBody, FilmBody, RemixBody, VideoBody
from kinema.request.options import Given
from kinema.server.api import ERRORS, Api, ApiParam, Caller, CallerParam, json_response, submission_of
from kinema.server.bodies import read_body
from kinema.server.content import content_response
from kinema.server.schemas import DeletedVideo, Video, VideoEstimate, VideoList
from kinema.server.sse import EventSourceResponse, event_stream, last_event_id

_MAX_PAGE = 100
_DEFAULT_PAGE = 20
_ORDERS = ("asc", "desc")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_POSTED_TO = ("generations", "estimate", "edits", "extensions", "characters")
# The SDK polls on with whatever the first answer says: not so often that it is a load, nor so rarely that it is late.
_POLL_MS = (250, 5000)
_DEFAULT_POLL_MS = 1000
# Another one may follow.
_PREVIEW_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_MP4: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}, "application/json": {}},
        "description": "The file.",
    },
    206: {"content": {"video/mp4": {}}, "description": "The part that the Range header asks for."},
}


def _body(name: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {"requestBody": {"required": True, "content": {"application/json": schema, "multipart/form-data": schema}}}


async def _video_id(video_id: str) -> JobId:
    """The id in the path, which the names that are posted to are not."""
    if video_id in _POSTED_TO:
        raise HTTPException(405, headers={"Allow": "POST"})
    return JobId(video_id)


VideoId = Annotated[JobId, Depends(_video_id)]

router = APIRouter(prefix="/v1/videos", tags=["videos"])
# A link with a signature opens without a key.
content_router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("", response_model=Video, responses=ERRORS, openapi_extra=_body("VideoBody"))
async def create(request: Request, caller: CallerParam) -> Response:
    """Put a video into the queue and answer at once."""
    fields = await read_body(request, caller.api.max_body_bytes)
    body = VideoBody.parse(fields)
    job = await caller.api.service.submit(
        body.options(),
        model=body.model or None,
        given=body.given(),
        user=body.user,
        key_id=caller.key_id,
        submission=submission_of(request, fields),
    )
    return await _answer(request, caller.api, job)


@router.post("/estimate", response_model=VideoEstimate, responses=ERRORS, openapi_extra=_body("VideoBody"))
async def estimate(request: Request, caller: CallerParam) -> Response:
    """What `POST /v1/videos` would make of this body, and how long it would take; no video is made."""
    body = VideoBody.parse(await read_body(request, caller.api.max_body_bytes))
    resolved, found = await caller.api.service.estimate(body.options(), model=body.model or None, given=body.given())
    return json_response(VideoEstimate.of(resolved, found))


@router.post("/extensions", response_model=Video, responses=ERRORS, openapi_extra=_body("FilmBody"))
async def extend(request: Request, caller: CallerParam) -> Response:
    """Go on from the last frame of a video; the answer is the whole film, `seconds` says how much is new."""
    return await _remake(request, caller, FilmBody, lambda film: Given(continues=film))


@router.post("/edits", response_model=Video, responses=ERRORS, openapi_extra=_body("EditBody"))
async def edit(request: Request, caller: CallerParam) -> Response:
    """Make a video anew under another prompt; `strength` says how much of it may change."""
    return await _remake(request, caller, EditBody, lambda film: Given(edits=film))


@router.get("", response_model=VideoList, responses=ERRORS)
async def list_videos(request: Request, caller: CallerParam) -> Response:
    """The videos of this key by age; `after`, `limit` (0 to 100) and `order` (asc, desc) as in OpenAI's lists."""
    after, limit, order = _page(request)
    jobs, has_more = await caller.api.service.list_page(
        caller.key_id, after=after, limit=limit, is_ascending=order == "asc"
    )
    page = VideoList.of([await caller.api.video(request, job) for job in jobs], has_more=has_more)
    return json_response(page)


@router.post("/characters", include_in_schema=False)
@router.get("/characters/{character_id}", include_in_schema=False)
async def characters(_caller: CallerParam) -> Response:
    """A part of OpenAI's API that no Wan model has."""
    raise UnsupportedRequest("characters are not supported; describe who is seen in the prompt")


@router.get("/{video_id}", response_model=Video, responses=ERRORS)
async def retrieve(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """One video, as it is now."""
    return await _answer(request, caller.api, await caller.api.service.find(video_id, caller.key_id))


@router.delete("/{video_id}", response_model=DeletedVideo, responses=ERRORS)
async def delete(caller: CallerParam, video_id: VideoId) -> Response:
    """Forget a video and its files, whatever its status; one in progress is stopped."""
    job = await caller.api.service.find(video_id, caller.key_id)
    await caller.api.service.delete(job.id)
    return json_response(DeletedVideo(id=job.id))


@router.post("/{video_id}/cancel", response_model=Video, responses=ERRORS)
async def cancel(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Stop a video; one that has ended stays as it is."""
    job = await caller.api.service.find(video_id, caller.key_id)
    return await _answer(request, caller.api, await caller.api.service.stop(job.id))


@router.post("/{video_id}/remix", response_model=Video, responses=ERRORS, openapi_extra=_body("RemixBody"))
async def remix(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """The same video with another prompt: every parameter that is not sent is as it was, the seed too."""
    fields = await read_body(request, caller.api.max_body_bytes)
    body = RemixBody.parse(fields)
    first = await caller.api.service.find(video_id, caller.key_id)
    job = await caller.api.service.submit(
        body.options_after(first.request),
        model=body.model or first.request.model,
        given=body.given() or await caller.api.service.given(first),
        user=body.user,
        key_id=caller.key_id,
        submission=submission_of(request, fields),
        remixed_from=first.id,
    )
    return await _answer(request, caller.api, job)


@router.get("/{video_id}/events", responses=ERRORS, response_class=Response)
async def events(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """What happened to the video and what happens next, as server-sent events, to its end; `Last-Event-ID` resumes.

    With `follow=false` what happened so far, and no more.
    """
    is_following = _flag(request, "follow", default=True)
    job = await caller.api.service.find(video_id, caller.key_id)

    async def final(_folded: Job) -> dict[str, Any]:
        return (await caller.api.video(request, await caller.api.service.get(job.id))).model_dump(mode="json")

    happened = caller.api.service.events(job.id, is_following=is_following)
    return EventSourceResponse(event_stream(job, happened, final, after_seq=last_event_id(request.headers)))


@content_router.head("/{video_id}/content", include_in_schema=False)
@content_router.get("/{video_id}/content", responses=_MP4 | ERRORS, response_class=Response)
async def content(request: Request, api: ApiParam, video_id: VideoId) -> Response:
    """The finished video as MP4; `variant=thumbnail` is a WebP, `variant=spritesheet` a JPEG, `variant=manifest` the
    JSON that says how to make it again; Range is honoured. `variant=preview` is the newest preview, a JPEG, also
    while the video is made.
    """
    job = await _find_shown(request, api, video_id)
    variant = request.query_params.get("variant") or "video"
    if variant == "preview":
        return Response(await api.service.preview(job.id), headers=_PREVIEW_HEADERS, media_type="image/jpeg")
    opened = await api.service.open_artifact(job.id, variant)
    extension = opened.artifact.key.rpartition(".")[2]
    return await content_response(request, opened, f"{video_id}.{extension}")


async def _find_shown(request: Request, api: Api, job_id: JobId) -> Job:
    """The job of a link that is signed, or whose key was sent."""
    signature = request.query_params.get("signature")
    if signature is None:
        return await api.service.find(job_id, api.keys.identify(request.headers))
    try:
        job = await api.service.get(job_id)
    except JobNotFound:
        job = None
    if job is None or not api.keys.is_signed(job.key_id, job_id, signature):
        raise Unauthorized("the signature of this link is not valid; ask for the video again to get a new link")
    return job


async def _answer(request: Request, api: Api, job: Job) -> Response:
    video = await api.video(request, job)
    poll_ms = _DEFAULT_POLL_MS
    if video.eta_s is not None:
        poll_ms = int(min(max(video.eta_s * 50, _POLL_MS[0]), _POLL_MS[1]))
    return json_response(video, {"openai-poll-after-ms": str(poll_ms)})


async def _remake(request: Request, caller: Caller, form: type[FilmBody], giving: Callable[[bytes], Given]) -> Response:
    """A job that works on a film, made by the model of that film unless another is named."""
    fields = await read_body(request, caller.api.max_body_bytes)
    body = form.parse(fields)
    film, source = await _film(caller, body)
    job = await caller.api.service.submit(
        body.options(),
        model=body.model or (source.request.model if source else None),
        given=giving(film),
        user=body.user,
        key_id=caller.key_id,
        submission=submission_of(request, fields),
    )
    return await _answer(request, caller.api, job)


async def _film(caller: Caller, body: FilmBody) -> tuple[bytes, Job | None]:
    """The film that was sent, or that of a finished video, and that video."""
    if isinstance(body.video, bytes):
        return body.video, None
    assert body.video is not None, "checked with the body"
    source = await caller.api.service.find(body.video, caller.key_id)
    return await caller.api.service.film(source.id, caller.key_id), source


def _flag(request: Request, name: str, *, default: bool) -> bool:
    text = request.query_params.get(name)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return _FLAGS[text.lower()]


def _page(request: Request) -> tuple[JobId | None, int, str]:
    query = request.query_params
    after, limit, order = query.get("after"), query.get("limit", str(_DEFAULT_PAGE)), query.get("order", "desc")
    if after is not None and not is_job_id(after):
        raise InvalidRequest(f"after {after[:40]!r} is not the id of a video", param="after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and int(limit) <= _MAX_PAGE):
        raise InvalidRequest(f"limit must be a whole number from 0 to {_MAX_PAGE}", param="limit")
    if order not in _ORDERS:
        raise InvalidRequest(f"order must be one of {', '.join(_ORDERS)}", param="order")
    return (None if after is None else JobId(after)), int(limit), order
