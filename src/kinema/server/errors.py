"""Errors as HTTP answers: one table from error class to status, and one shape of the body.

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

Once a job is accepted, its ``id`` is added, and the answer says ``x-should-retry: false``. Without that the OpenAI SDK
would repeat a 5xx by itself, which would make the same video again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from kinema import errors
from kinema.job import Job, JobError
from kinema.server.disconnect import ClientGone

# nginx uses this number for a client that is gone. Nobody reads the answer.
_CLIENT_CLOSED_REQUEST = 499
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class CrossOrigin(errors.RequestError):
    """A page of another site may not do this; set server.public_url if that is this server."""

    code = "cross_origin"


class RequestStalled(errors.RequestError):
    """The request did not come in time; send it again."""

    code = "request_timeout"


class MalformedRequest(errors.RequestError):
    """This is not a request of HTTP/1.1."""

    code = "bad_request"


class UrlTooLong(errors.RequestError):
    """The URL is too long; at most 8 KiB are accepted."""

    code = "url_too_long"


class HeadersTooLarge(errors.RequestError):
    """The headers are too large; at most 100 of them and 64 KiB in all are accepted."""

    code = "headers_too_large"


class UnknownHost(errors.RequestError):
    """The request names another host; add its name to server.allowed_hosts if that is this server."""

    code = "unknown_host"


class TooManyConnections(errors.ServiceError):
    """The server has as many connections as it may have; try again."""

    code = "too_many_connections"
    retry_after_s = 1


class UploadsFull(errors.ServiceError):
    """The server holds as many bytes of request bodies as it may; try again."""

    code = "uploads_full"
    retry_after_s = 5


class InternalError(errors.KinemaError):
    """The server made a mistake; its log says more."""

    code = "internal_error"


class ServerStopping(errors.ServiceError):
    """The server is stopping; a video that it has accepted is made after the restart."""

    code = "server_stopping"


# The first row whose class an error belongs to decides.
_STATUS: tuple[tuple[type[errors.KinemaError], int], ...] = (
    (errors.Unauthorized, 401),
    (CrossOrigin, 403),
    (RequestStalled, 408),
    (UrlTooLong, 414),
    (UnknownHost, 421),
    (HeadersTooLarge, 431),
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
    (errors.QuotaExceeded, 429),
    (errors.RequestError, 400),
    (errors.StorageFull, 507),
    (errors.ServiceError, 503),
    (errors.WaitedTooLong, 503),
    (errors.KinemaError, 500),
)


class JobFailed(Exception):
    """The job that a client waited for has failed."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.id)
        self.job = job


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None, job_id: str | None = None
) -> dict[str, str | None]:
    """Return the value of ``error`` in an error's body."""
    told = {"message": message, "type": _type(status), "param": param, "code": code}
    return told if job_id is None else told | {"id": job_id}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    job_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    beside: Mapping[str, object] | None = None,
) -> Response:
    """Answer with an error. ``beside`` is what the body says beside the error."""
    error = error_object(status, message, param=param, code=code, job_id=job_id)
    headers = dict(headers or {})
    if job_id is not None:
        headers["x-should-retry"] = "false"
    # ASCII with escapes: a message may quote what the client sent, even a lone surrogate.
    content = json.dumps({"error": error, **(beside or {})}).encode("ascii")
    return Response(content, status, headers, "application/json")


def response_for(
    exc: errors.KinemaError, job_id: str | None = None, beside: Mapping[str, object] | None = None
) -> Response:
    return error_response(
        status_of(type(exc)),
        exc.message,
        param=exc.param,
        code=exc.code,
        job_id=job_id,
        headers=_headers(exc),
        beside=beside,
    )


def _headers(exc: errors.KinemaError) -> dict[str, str]:
    match exc:
        case errors.Unauthorized():
            return {"www-authenticate": "Bearer"}
        case RequestStalled():
            return {"x-should-retry": "false", "connection": "close"}
        case ServerStopping() | errors.QuotaExceeded() | errors.StorageFull():
            return {"x-should-retry": "false"}
        case errors.RangeNotSatisfiable():
            return {"content-range": f"bytes */{exc.size_bytes}"}
        case errors.Overloaded() | errors.NoWorker() | errors.StoreUnavailable() | TooManyConnections() | UploadsFull():
            return {"retry-after": str(exc.retry_after_s)}
    return {}


def status_of(kind: type[errors.KinemaError]) -> int:
    """Return the HTTP status of an error of that class."""
    return next(status for known, status in _STATUS if issubclass(kind, known))


def public_error(exc: Exception) -> JobError:
    """Return what a client may read about an exception: our own sentence, or nothing about a foreign exception."""
    told = exc if isinstance(exc, errors.KinemaError) else InternalError()
    return JobError(code=told.code, message=told.message)


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
    kind = errors.by_code(error.code)
    # What only the worker could see may still be the request's fault: a LoRA or a film that cannot be used.
    is_told = issubclass(kind, (errors.StorageUnavailable, errors.InvalidRequest, errors.UnsupportedRequest))
    status = status_of(kind) if is_told else 500
    return error_response(status, error.message, code=error.code, job_id=exc.job.id)


async def _on_client_gone(_request: Request, _exc: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """Answer what the framework itself refuses: unknown paths and wrong methods."""
    assert isinstance(exc, HTTPException)
    phrase = HTTPStatus(exc.status_code).phrase
    message, headers = exc.detail, exc.headers
    if exc.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is no {request.scope['path'][:200]} here; /docs shows every call"
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_allowed_methods(request))
        message, headers = f"{request.method[:20]} is not accepted here; {allowed} is", {"allow": allowed}
    return error_response(exc.status_code, message, code=phrase.lower().replace(" ", "_"), headers=headers)


def _allowed_methods(request: Request) -> Iterator[str]:
    """Yield the methods that any route takes on this path. The framework names only the methods of one route."""
    scope = {name: request.scope[name] for name in ("type", "path", "root_path", "headers") if name in request.scope}
    for method in _METHODS:
        if any(route.matches(scope | {"method": method})[0] is Match.FULL for route in request.app.routes):
            yield method


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
