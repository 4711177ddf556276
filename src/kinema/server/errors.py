"""The one table: error class to HTTP status, and the one shape of an error's body.

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

Once a job is accepted, its ``id`` is added. The SDK repeats every 5xx by itself, which would make the same video again,
so an answer about an accepted job says ``x-should-retry: false``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kinema import errors
from kinema.job import Job, JobError
from kinema.server.disconnect import ClientGone

# nginx's number for it; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499


class CrossOrigin(errors.RequestError):
    """A page of another site may not do this."""

    code = "cross_origin"


# The first class that an error belongs to decides.
_STATUS: tuple[tuple[type[errors.KinemaError], int], ...] = (
    (errors.Unauthorized, 401),
    (CrossOrigin, 403),
    (errors.ModelNotFound, 404),
    (errors.JobNotFound, 404),
    (errors.WebhookNotFound, 404),
    (errors.NoVideo, 404),
    (errors.FileGone, 404),
    (errors.JobNotFinished, 404),  # not 409: SDKs repeat a 409 by themselves
    (errors.PayloadTooLarge, 413),
    (errors.UnsupportedMediaType, 415),
    (errors.RangeNotSatisfiable, 416),
    (errors.Overloaded, 429),
    (errors.RequestError, 400),
    (errors.ServiceError, 503),
    (errors.KinemaError, 500),
)


class JobFailed(Exception):
    """The job that a client waited for has failed."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.id)
        self.job = job


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    job_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    error = {"message": message, "type": _type(status), "param": param, "code": code}
    headers = dict(headers or {})
    if job_id is not None:
        error["id"] = job_id
        headers["x-should-retry"] = "false"
    # ASCII with escapes, since a message may quote what the client sent, lone surrogates included.
    content = json.dumps({"error": error}).encode("ascii")
    return Response(content, status, headers, "application/json")


def response_for(exc: errors.KinemaError, job_id: str | None = None) -> Response:
    headers = {"retry-after": str(exc.retry_after_s)} if isinstance(exc, errors.Overloaded | errors.NoWorker) else {}
    if isinstance(exc, errors.Unauthorized):
        headers = {"www-authenticate": "Bearer"}
    if isinstance(exc, errors.RangeNotSatisfiable):
        headers = {"content-range": f"bytes */{exc.size_bytes}"}
    return error_response(_status(exc), exc.message, param=exc.param, code=exc.code, job_id=job_id, headers=headers)


def unexpected_response(job_id: str | None = None) -> Response:
    """For an exception that nobody expected; it says nothing of it."""
    error = public_error(None)
    return error_response(500, error.message, code=error.code, job_id=job_id)


def stopping_response(job_id: str | None = None) -> Response:
    """For a request that the shutdown cuts short."""
    message = "The server is stopping; a video that it has accepted is made after the restart."
    headers = {"x-should-retry": "false"}
    return error_response(503, message, code="server_stopping", job_id=job_id, headers=headers)


def public_error(exc: Exception | None) -> JobError:
    """What a client may read of an exception: our own sentence, or none of it."""
    if isinstance(exc, errors.KinemaError):
        return JobError(code=exc.code, message=exc.message)
    return JobError(code="internal_error", message="The server made a mistake; its log says more.")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.KinemaError, _on_kinema_error)
    app.add_exception_handler(JobFailed, _on_job_failed)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_kinema_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, errors.KinemaError)
    return response_for(exc, getattr(request.state, "job_id", None))


async def _on_job_failed(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, JobFailed)
    error = exc.job.error or JobError(code=errors.EngineFailed.code, message=errors.EngineFailed().message)
    status = 503 if error.code == errors.StorageUnavailable.code else 500
    return error_response(status, error.message, code=error.code, job_id=exc.job.id)


async def _on_client_gone(_request: Request, _exc: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """What the framework itself refuses, such as unknown routes and wrong methods; and bodies that never come."""
    assert isinstance(exc, HTTPException)
    phrase = HTTPStatus(exc.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    message = exc.detail
    if exc.status_code == HTTPStatus.NOT_FOUND and message == phrase:
        message = f"there is no {request.url.path[:200]} here; /docs lists what there is"
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED and message == phrase:
        message = f"{request.method[:20]} is not accepted here; {(exc.headers or {}).get('Allow', 'nothing')} is"
    return error_response(exc.status_code, message, code=code, headers=exc.headers)


def _status(exc: errors.KinemaError) -> int:
    return next(status for kind, status in _STATUS if isinstance(exc, kind))


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
