"""The synchronous call, the models and the probes: one short handler per endpoint: parse, call the service, answer."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Path, Request
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import JSONResponse, Response

from kinema.errors import (
    KinemaError,
    ModelNotFound,
    NoWorker,
    StorageUnavailable,
    StoreUnavailable,
    Unauthorized,
)
from kinema.job import Job, JobStatus
from kinema.request.bodies import GenerationBody
from kinema.request.capabilities import Capabilities
from kinema.server.api import Api, ApiParam, Caller, CallerParam, json_response, read_submission
from kinema.server.content import answer_with_base64
from kinema.server.description import (
    EVENT_STREAM,
    MAKES_VIDEO,
    METRICS,
    NO_KEY,
    OPENS_VIDEO,
    STREAM_HEADERS,
    answers,
    makes_video,
    submission_of,
    with_error_body,
)
from kinema.server.disconnect import asked_by, unless_gone
from kinema.server.errors import JobFailed, public_error, response_for
from kinema.server.schemas import Health, Model, ModelList, NotReady, Video, WorkerState
from kinema.server.sse import EventSourceResponse
from kinema.worker.startup import Loading

log = structlog.get_logger(__name__)


class _ModelIdConvertor(PathConvertor):
    """The rest of a path, also with line ends, which the framework's own convertor takes for another path."""

    regex = "(?s:.*)"


register_url_convertor("model_id", _ModelIdConvertor())

ModelId = Annotated[str, Path(description="The id of a model, which may contain slashes.")]

router = APIRouter()
probes = APIRouter(tags=["health"])


@router.post(
    "/v1/videos/generations",
    response_model=Video,
    responses=makes_video(
        "The finished video; with `stream`, its events, of which the last has the whole video.",
        *MAKES_VIDEO,
        *OPENS_VIDEO,
        headers=STREAM_HEADERS,
        content=EVENT_STREAM,
    ),
    openapi_extra=submission_of(GenerationBody),
    tags=["videos"],
)
async def generate(request: Request, caller: CallerParam) -> Response:
    """Make a video and answer when it is done; with `stream`, send its events while it is made.

    A client that disconnects cancels its generation, unless it sent an `Idempotency-Key` to ask for it again.
    """
    api = caller.api
    with ExitStack() as held:
        job, body, is_kept = await _submit(request, caller, held)
        request.state.job_id = job.id  # whatever fails from here on says so
        if body.stream:
            return _stream(request, api, job, held.pop_all(), is_base64=body.is_base64, is_kept=is_kept)
    job = await _wait(request, api, job, is_kept=is_kept)
    if job.status is JobStatus.FAILED:
        raise JobFailed(job)
    video = await api.video(request, job)
    if not (body.is_base64 and job.status is JobStatus.COMPLETED):
        return json_response(video)
    return await answer_with_base64(await api.service.open_artifact(job.id), video.with_base64)


async def _submit(request: Request, caller: Caller, held: ExitStack) -> tuple[Job, GenerationBody, bool]:
    """Return the job, its body without the pictures, and whether the job outlives its client.

    ``held`` gets the place of a stream.
    """
    async with read_submission(request, caller, GenerationBody) as (body, sent):
        if body.stream:  # before there is a job
            held.enter_context(caller.api.feeds.place(caller.key_id))
        job = await caller.api.service.submit(
            body.options(),
            model=body.model or None,
            given=await caller.api.service.with_named(body.given(), body.named_films, caller.key_id),
            user=body.user,
            notes=body.notes(),
            key_id=caller.key_id,
            client=caller.name,
            submission=sent,
            while_asked=asked_by(request),
        )
        return job, body.without_files(), sent.idempotency_key is not None


async def _wait(request: Request, api: Api, job: Job, *, is_kept: bool) -> Job:
    """Return the job once it has ended. When its client cannot be answered, the job is cancelled, unless it is kept."""
    try:
        return await unless_gone(request.receive, api.service.wait(job.id))
    except Exception:
        if not is_kept:
            with suppress(KinemaError):  # what went wrong first is what the client should hear of
                await api.service.cancel(job.id)
        raise


def _stream(request: Request, api: Api, job: Job, held: ExitStack, *, is_base64: bool, is_kept: bool) -> Response:
    async def final(job: Job) -> dict[str, Any]:
        try:
            return (await api.video(request, job, is_base64=is_base64)).model_dump(mode="json")
        except Exception as exc:
            log.exception("the last event has no video", job_id=job.id)
            return Video.from_job(job).model_dump(mode="json") | {"error": public_error(exc).model_dump()}

    async def give_up() -> None:
        if not is_kept:
            await api.service.cancel(job.id)

    return EventSourceResponse(api.feeds.follow(job, final), held, on_gone=give_up)


@router.get("/v1/models", response_model=ModelList, responses=answers("The models.", Unauthorized), tags=["models"])
async def models(caller: CallerParam) -> Response:
    """List the models that are served."""
    return json_response(ModelList(data=[_model(caller.api, can) for can in caller.api.service.models()]))


@router.get(
    "/v1/models/{model_id:model_id}",
    response_model=Model,
    responses=answers("The model.", Unauthorized, ModelNotFound, NoWorker),
    tags=["models"],
)
async def model(caller: CallerParam, model_id: ModelId) -> Response:
    """Show one model: its defaults (`preset`) and its bounds (`limits`)."""
    return json_response(_model(caller.api, caller.api.service.model(model_id)))


def _model(api: Api, can: Capabilities) -> Model:
    return Model.from_capabilities(can, api.started_at, api.service.memory_of(can.model))


@probes.get("/live", openapi_extra=NO_KEY, responses=answers("The process answers."))
async def live() -> dict[str, str]:
    """Tell whether the process answers."""
    return {"status": "live"}


@probes.get(
    "/ready",
    openapi_extra=NO_KEY,
    responses=with_error_body(
        answers("A worker is ready.", NoWorker, StoreUnavailable, StorageUnavailable), 503, NotReady
    ),
    response_model=dict[str, str],
)
async def ready(api: ApiParam) -> Response:
    """Tell whether the job database and the storage can be used and a worker takes jobs: 200, or 503 with the reason
    or the stage that the worker of this process has reached."""
    await api.service.readiness.check()
    if api.service.is_ready():
        return JSONResponse({"status": "ready"})
    loading = api.service.loading()
    if loading is None:
        return response_for(NoWorker("no worker is ready yet"))
    return response_for(NoWorker(f"no worker is ready yet: {loading}"), beside=_starting(loading))


@probes.get(
    "/health",
    openapi_extra=NO_KEY,
    responses=answers("The server works.", StoreUnavailable),
    response_model=Health,
)
async def health(api: ApiParam) -> Response:
    """Tell whether the parts work, how many jobs wait, and which stage a worker that starts has reached."""
    loading, swept = api.service.loading(), api.service.sweep_state()
    return JSONResponse(
        {
            "status": "ready" if api.service.is_ready() else "starting",
            **({} if loading is None else _starting(loading)),
            "models": [can.model for can in api.service.models()],
            "workers": [WorkerState.of(worker).model_dump() for worker in api.service.workers()],
            "jobs_waiting": await api.service.count_waiting(),
            "sweeping": swept.sweeping,
            "files_held": swept.num_files,
            "bytes_held": swept.size_bytes,
        }
    )


@probes.get(
    "/metrics",
    openapi_extra=NO_KEY,
    responses=answers("The metrics.", StoreUnavailable, content=METRICS),
    response_class=Response,
)
async def metrics(api: ApiParam) -> Response:
    """Give the numbers of `/health` to Prometheus."""
    from kinema.server.metrics import CONTENT_TYPE, Numbers  # noqa: PLC0415 - a start has no need of its library

    service = api.service
    waiting, swept = await service.count_waiting(), service.sweep_state()
    numbers = Numbers(service.is_ready(), waiting, swept, service.workers())
    return Response(numbers.text(), media_type=CONTENT_TYPE)


def _starting(loading: Loading) -> dict[str, Any]:
    """Return the fields that the probes have while a worker starts."""
    return {"status": "starting", "loading": asdict(loading)}
