"""``/v1/videos``: OpenAI's Videos API, and the calls that it lacks (estimate, cancel, events)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import WithJsonSchema
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import Response

from kinema.errors import (
    FileGone,
    InvalidRequest,
    JobNotFound,
    Overloaded,
    RangeNotSatisfiable,
    Unauthorized,
    UnsupportedRequest,
)
from kinema.ids import JobId, is_job_id
from kinema.job import Job
from kinema.jobs.listing import JobPage
from kinema.request.bodies import EditBody, FilmBody, RemixBody, VideoBody
from kinema.request.fields import TRUTHS
from kinema.request.options import Given
from kinema.server import live
from kinema.server.api import Api, ApiParam, Caller, CallerParam, ShortRoute, json_response, read_submission
from kinema.server.content import content_response
from kinema.server.description import (
    EVENT_STREAM,
    FILE_HEADERS,
    LIST_EVENT_STREAM,
    OPENS_VIDEO,
    STREAM_HEADERS,
    Responses,
    answer,
    body_of,
    changes,
    files,
    makes_video,
    reads,
    request_headers,
    submission_of,
    takes_video,
)
from kinema.server.disconnect import asked_by, unless_gone
from kinema.server.list_filters import Fields, InPrompt, OfModel, Starred, Statuses, read_is_slim, read_wanted
from kinema.server.paging import After, Ids, Limit, Order, read_after, read_ids, read_is_ascending, read_limit
from kinema.server.schemas import DeletedVideo, Deletion, DeletionList, Video, VideoEstimate, VideoList, VideoRowList
from kinema.server.sse import EventSourceResponse, last_event_id
from kinema.service.intake import StoredInput
from kinema.service.service import LiveVideo, OpenArtifact

# The last part of other paths; none of them is the id of a video.
_NAMES = ("generations", "estimate", "edits", "extensions", "characters", "events")
# Milliseconds between polls. The SDK keeps to what the first answer says: more often is a load, less often is late.
_POLL_MS = (250, 5000)
_DEFAULT_POLL_MS = 1000
# A newer preview may follow.
_PREVIEW_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_POLL_HEADERS = ("openai-poll-after-ms",)
_FILES = files("video/mp4", "video/webm", "image/gif", "image/webp", "image/jpeg", "application/json")
_OPENS_FILE = (*OPENS_VIDEO, InvalidRequest, Overloaded)
_OPEN_HEADERS = (*FILE_HEADERS, "x-accel-buffering")
_UNCHANGED: Responses = {304: answer("The client has this file already.", headers=FILE_HEADERS)}


class _VideoIdConvertor(StringConvertor):
    """The part of a path that is an id. It is none of the names in _NAMES."""

    regex = f"(?!(?:{'|'.join(_NAMES)})(?:/|$))[^/]+"


register_url_convertor("video_id", _VideoIdConvertor())

VideoId = Annotated[JobId, Path(description="The id of a video.")]
Variant = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "enum": ["video", "thumbnail", "spritesheet", "manifest", "preview", "live"]}),
    Query(
        description="`video` (default): the MP4, WebM or GIF; `thumbnail`: a WebP picture; `spritesheet`: a JPEG with "
        "frames of the video; `manifest`: JSON that says how to make the video again; `preview`: the newest preview, a "
        "JPEG, also while the video is made; `live`: the video while it is decoded, a fragmented MP4 without sound "
        "that goes on to the last frame. Its answer begins with the first frame, and it has no Range. A video that "
        "breaks off ends the connection. Of a finished video it is the file itself."
    ),
]
Signature = Annotated[
    str | None, Query(description="In place of a key: the signature in the `url` of a video, which opens this video.")
]
Expires = Annotated[str | None, Query(description="The end of that `url`, in seconds since the epoch.")]
Follow = Annotated[
    str | None,
    WithJsonSchema({"type": "boolean"}),
    Query(description="`true` (default): go on with what happens next; `false`: end with the events so far."),
]

router = APIRouter(prefix="/v1/videos", tags=["videos"])
short_router = APIRouter(prefix="/v1/videos", tags=["videos"], route_class=ShortRoute)
# A link with a signature opens without a key.
content_router = APIRouter(prefix="/v1/videos", tags=["videos"])


@short_router.post(
    "",
    response_model=Video,
    responses=makes_video("The video, as it was accepted.", *OPENS_VIDEO, headers=_POLL_HEADERS),
    openapi_extra=submission_of(VideoBody),
)
async def create(request: Request, caller: CallerParam) -> Response:
    """Put a video into the queue and answer at once."""
    async with read_submission(request, caller, VideoBody) as (body, sent):
        job = await caller.api.service.submit(
            body.options(),
            model=body.model or None,
            given=await caller.api.service.with_named(body.given(), body.named_films, caller.key_id),
            user=body.user,
            key_id=caller.key_id,
            client=caller.name,
            submission=sent,
            while_asked=asked_by(request),
        )
    return await _answer(request, caller.api, job)


@router.post(
    "/estimate",
    response_model=VideoEstimate,
    responses=takes_video("The video that would be made, and its times.", *OPENS_VIDEO),
    openapi_extra=body_of(VideoBody),
)
async def estimate(request: Request, caller: CallerParam) -> Response:
    """Tell what `POST /v1/videos` would make of this body and how long it would take; no video is made."""
    async with caller.api.bodies.read(request, caller.name, VideoBody.parse) as body:
        resolved, found = await caller.api.service.estimate(
            body.options(),
            model=body.model or None,
            given=await caller.api.service.with_named(body.given(), body.named_films, caller.key_id),
            key_id=caller.key_id,
            client=caller.name,
            while_asked=asked_by(request),
        )
    return json_response(VideoEstimate.of(resolved, found))


@router.post(
    "/extensions",
    response_model=Video,
    responses=makes_video("The video, as it was accepted.", *OPENS_VIDEO, headers=_POLL_HEADERS),
    openapi_extra=submission_of(FilmBody),
)
async def extend(request: Request, caller: CallerParam) -> Response:
    """Continue a video from its last frame.

    The new video is the whole film; the `seconds` that are sent are the length of the new part.
    """
    return await _remake(request, caller, FilmBody, lambda film: Given(continues=film))


@router.post(
    "/edits",
    response_model=Video,
    responses=makes_video("The video, as it was accepted.", *OPENS_VIDEO, headers=_POLL_HEADERS),
    openapi_extra=submission_of(EditBody),
)
async def edit(request: Request, caller: CallerParam) -> Response:
    """Make a video anew under another prompt; `strength` says how much of it may change."""
    return await _remake(request, caller, EditBody, lambda film: Given(edits=film))


@router.get("", response_model=VideoList | VideoRowList, responses=reads("A page of the list.", InvalidRequest))
async def list_videos(
    request: Request,
    caller: CallerParam,
    after: After = None,
    limit: Limit = None,
    order: Order = None,
    ids: Ids = None,
    status: Statuses = None,
    model: OfModel = None,
    prompt: InPrompt = None,
    starred: Starred = None,
    fields: Fields = None,
) -> Response:
    """List the videos of this key by age, all or those that are looked for, or those of some ids, in their order."""
    is_slim, wanted = read_is_slim(fields), read_wanted(status, model, prompt, starred)
    if any(ids or ()):
        if after or limit or order or wanted != read_wanted(None, None, None, None):
            raise InvalidRequest("ids stands alone, without after, limit, order and what is looked for", param="ids")
        found = await caller.api.service.find_many(_read_ids(ids), caller.key_id)
        return await _page(request, caller.api, JobPage(found, has_more=False, last_id=None), is_slim=is_slim)
    after_id = read_after(after, is_job_id, "video")
    page = await caller.api.service.list_page(
        caller.key_id,
        wanted,
        after=None if after_id is None else JobId(after_id),
        limit=read_limit(limit),
        is_ascending=read_is_ascending(order),
    )
    return await _page(request, caller.api, page, is_slim=is_slim)


async def _page(request: Request, api: Api, page: JobPage, *, is_slim: bool) -> Response:
    if is_slim:
        rows = [await api.row(request, job) for job in page.jobs]
        return json_response(VideoRowList.of(rows, has_more=page.has_more, last_id=page.last_id))
    videos = [await api.video(request, job) for job in page.jobs]
    return json_response(VideoList.of(videos, has_more=page.has_more, last_id=page.last_id))


@router.delete(
    "", response_model=DeletionList, responses=changes("What became of each of these videos.", InvalidRequest)
)
async def delete_many(caller: CallerParam, ids: Ids = None) -> Response:
    """Delete videos and their files, whatever their status; `deleted` is false for one that this key does not have."""
    wanted = _read_ids(ids)
    deleted = set()
    for job in await caller.api.service.find_many(wanted, caller.key_id):
        with suppress(JobNotFound):  # deleted meanwhile
            await caller.api.service.delete(job.id)
            deleted.add(job.id)
    return json_response(DeletionList(data=[Deletion(id=one, deleted=one in deleted) for one in wanted]))


@router.get(
    "/events",
    responses=reads(
        "The changes, without an end.", InvalidRequest, Overloaded, headers=STREAM_HEADERS, content=LIST_EVENT_STREAM
    ),
    response_class=Response,
    openapi_extra=request_headers("Last-Event-ID"),
)
async def list_events(request: Request, caller: CallerParam, follow: Follow = None) -> Response:
    """Send each video of this key that changes, as it is then, as server-sent events without an end.

    An event `video` has the row of `GET /v1/videos?fields=slim`, and `deleted` the answer of a deletion. Where
    Last-Event-ID is missing, too old or unknown, the first event is `reset`: read the list then; what changes later
    follows. After a break the stream has each video that changed meanwhile once.
    """
    is_following = _flag("follow", follow, default=True)
    api = caller.api
    with ExitStack() as held:
        held.enter_context(api.feeds.place(caller.key_id))
        mark, reset = await api.list_feeds.begin(caller.key_id, request.headers.get("last-event-id", ""))
        base = str(request.base_url)  # the links begin with it
        make_row = partial(api.row, request)
        chunks = api.list_feeds.follow(caller.key_id, mark, reset, make_row, same_for=base, is_following=is_following)
        return EventSourceResponse(chunks, held.pop_all())


@router.post("/characters", include_in_schema=False)
@router.get("/characters/{character_id}", include_in_schema=False)
async def characters(_caller: CallerParam) -> Response:
    """Refuse a part of OpenAI's API that no Wan model has."""
    raise UnsupportedRequest("characters are not supported; describe who is seen in the prompt")


@short_router.get(
    "/{video_id:video_id}", response_model=Video, responses=reads("The video.", JobNotFound, headers=_POLL_HEADERS)
)
async def retrieve(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Show one video as it is now."""
    return await _answer(request, caller.api, await caller.api.service.find(video_id, caller.key_id))


@router.delete(
    "/{video_id:video_id}", response_model=DeletedVideo, responses=changes("The video is gone.", JobNotFound)
)
async def delete(caller: CallerParam, video_id: VideoId) -> Response:
    """Delete a video and its files, whatever its status; a video that is being made is stopped."""
    job = await caller.api.service.find(video_id, caller.key_id)
    await caller.api.service.delete(job.id)
    return json_response(DeletedVideo(id=job.id))


@router.post(
    "/{video_id:video_id}/cancel",
    response_model=Video,
    responses=changes(
        "The video. It is still `in_progress` where its worker takes longer than two seconds to stop.",
        JobNotFound,
        headers=_POLL_HEADERS,
    ),
)
async def cancel(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Stop a video; one that has ended stays as it is."""
    job = await caller.api.service.find(video_id, caller.key_id)
    return await _answer(request, caller.api, await caller.api.service.stop(job.id))


@router.post(
    "/{video_id:video_id}/star",
    response_model=Video,
    responses=changes("The video, with its star.", JobNotFound, headers=_POLL_HEADERS),
)
async def star(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Keep a video, whatever its status: while it has a star it does not expire."""
    job = await caller.api.service.find(video_id, caller.key_id)
    return await _answer(request, caller.api, await caller.api.service.star(job.id, is_starred=True))


@router.delete(
    "/{video_id:video_id}/star",
    response_model=Video,
    responses=changes("The video, without a star.", JobNotFound, headers=_POLL_HEADERS),
)
async def unstar(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Take the star of a video: it expires as others do, at once where its time is over."""
    job = await caller.api.service.find(video_id, caller.key_id)
    return await _answer(request, caller.api, await caller.api.service.star(job.id, is_starred=False))


@router.post(
    "/{video_id:video_id}/remix",
    response_model=Video,
    responses=makes_video("The new video, as it was accepted.", *OPENS_VIDEO, FileGone, headers=_POLL_HEADERS),
    openapi_extra=submission_of(RemixBody),
)
async def remix(request: Request, caller: CallerParam, video_id: VideoId) -> Response:
    """Make the same video with another prompt: a parameter that is not sent is as it was, the seed too."""
    async with read_submission(request, caller, RemixBody) as (body, sent):
        first = await caller.api.service.find(video_id, caller.key_id)
        new = await caller.api.service.with_named(body.given(), body.named_films, caller.key_id)
        tiers, named = caller.api.service.tiers_of(first.request.model, body.model)
        job = await caller.api.service.submit(
            body.options_after(first.request, tiers, named),
            model=body.model or first.request.model,
            given=partial(caller.api.service.given, first, new),
            user=body.user,
            key_id=caller.key_id,
            client=caller.name,
            submission=sent,
            while_asked=asked_by(request),
            remixed_from=first.id,
        )
    return await _answer(request, caller.api, job)


@router.get(
    "/{video_id:video_id}/events",
    responses=reads(
        "The events of the video.",
        JobNotFound,
        InvalidRequest,
        Overloaded,
        headers=STREAM_HEADERS,
        content=EVENT_STREAM,
    ),
    response_class=Response,
    openapi_extra=request_headers("Last-Event-ID"),
)
async def events(request: Request, caller: CallerParam, video_id: VideoId, follow: Follow = None) -> Response:
    """Send what happened to the video and what happens next, as server-sent events, to its end.

    The last event has the whole video.
    """
    is_following = _flag("follow", follow, default=True)
    api = caller.api
    job = await api.service.find(video_id, caller.key_id)

    async def final(_folded: Job) -> dict[str, Any]:
        return (await api.video(request, await api.service.get(job.id))).model_dump(mode="json")

    with ExitStack() as held:
        held.enter_context(api.feeds.place(caller.key_id))
        seen = last_event_id(request.headers)
        base = str(request.base_url)  # the link in the last event begins with it
        chunks = api.feeds.follow(job, final, after_seq=seen, is_following=is_following, same_for=base)
        return EventSourceResponse(chunks, held.pop_all())


@content_router.head(
    "/{video_id:video_id}/content",
    responses=reads("The headers alone.", *_OPENS_FILE, headers=_OPEN_HEADERS) | _UNCHANGED,
    response_class=Response,
    openapi_extra=request_headers("If-None-Match"),
)
@content_router.get(
    "/{video_id:video_id}/content",
    responses=reads("The file.", *_OPENS_FILE, RangeNotSatisfiable, headers=_OPEN_HEADERS, content=_FILES)
    | _UNCHANGED
    | {206: answer("A part of the file.", headers=(*FILE_HEADERS, "content-range"), content=_FILES)}
    | {307: answer("The storage has the file (`storage.presign`).", headers=("location", "cache-control"))},
    response_class=Response,
    openapi_extra=request_headers("Range", "If-Range", "If-None-Match"),
)
async def content(
    request: Request,
    api: ApiParam,
    video_id: VideoId,
    variant: Variant = None,
    expires: Expires = None,
    signature: Signature = None,
) -> Response:
    """Open the finished video or a file that belongs to it.

    `Range` asks for a part of the file, which is what a browser does when somebody moves to another place in the video.
    """
    job = await _find_shown(request, api, video_id, expires or "", signature)
    variant = variant or "video"
    if variant == "preview":
        return Response(await api.service.preview(job.id), headers=_PREVIEW_HEADERS, media_type="image/jpeg")
    if variant == "live" and not job.status.is_terminal:
        return await _live(request, api, job)
    opened = await api.service.open_artifact(job.id, "video" if variant == "live" else variant)
    return await content_response(request, opened, _file_name(job.id, opened))


async def _live(request: Request, api: Api, job: Job) -> Response:
    """Answer with a video that is not finished yet, when its first frame is there."""
    if request.method == "HEAD":
        return Response(headers=live.HEADERS, media_type="video/mp4")
    with ExitStack() as held:
        held.enter_context(api.feeds.place(job.key_id))
        video = await unless_gone(request.receive, api.service.watch(job.id))
        if isinstance(video, LiveVideo):
            return live.LiveResponse(video, held.pop_all())
    return await content_response(request, video, _file_name(job.id, video))


def _file_name(job_id: JobId, opened: OpenArtifact) -> str:
    return f"{job_id}.{opened.artifact.key.rpartition('.')[2]}"


async def _find_shown(request: Request, api: Api, job_id: JobId, expires: str, signature: str | None) -> Job:
    """Return the job, whose link is signed or whose key was sent. Raises JobNotFound, Unauthorized."""
    if signature is None:
        return await api.service.find(job_id, api.keys.identify(request.headers))
    api.links.check(job_id, expires, signature)
    job = await api.service.get(job_id)
    if not api.keys.accepts(job.key_id):
        raise Unauthorized("the key that made this video is no longer accepted here, so its links do not open")
    return job


def _read_ids(texts: Sequence[str] | None) -> Sequence[JobId]:
    return [JobId(one) for one in read_ids(texts, is_job_id, "video")]


async def _answer(request: Request, api: Api, job: Job) -> Response:
    video = await api.video(request, job)
    poll_ms = _DEFAULT_POLL_MS
    if video.eta_s is not None:
        poll_ms = int(min(max(video.eta_s * 50, _POLL_MS[0]), _POLL_MS[1]))
    return json_response(video, {"openai-poll-after-ms": str(poll_ms)})


async def _remake(request: Request, caller: Caller, form: type[FilmBody], giving: Callable[[bytes], Given]) -> Response:
    """Submit a job that works on a film. The model of that film makes it, unless the body names another."""
    async with read_submission(request, caller, form) as (body, sent):
        source = await _source(caller, body)

        def given() -> Given | StoredInput:
            if source is None:
                assert isinstance(body.video, bytes), "else there is a source"
                return giving(body.video)
            return caller.api.service.film(source, giving)

        job = await caller.api.service.submit(
            body.options(),
            model=body.model or (source.request.model if source else None),
            given=given,
            user=body.user,
            key_id=caller.key_id,
            client=caller.name,
            submission=sent,
            while_asked=asked_by(request),
        )
    return await _answer(request, caller.api, job)


async def _source(caller: Caller, body: FilmBody) -> Job | None:
    """Return the job whose video the body names; None when the film itself was sent. Raises JobNotFound."""
    if isinstance(body.video, bytes):
        return None
    assert body.video is not None, "checked with the body"
    return await caller.api.service.find(body.video, caller.key_id)


def _flag(name: str, text: str | None, *, default: bool) -> bool:
    if text is None:
        return default
    if text.lower() not in TRUTHS:
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return TRUTHS[text.lower()]
