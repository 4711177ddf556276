"""The errors of a call.

    ClientError
      ConnectionFailed       nobody answered, or the connection broke
      WaitedTooLong          the time that was given to ``wait`` is over; the video is still being made
      UnexpectedAnswer       the answer does not come from a Kinema server
      ApiError               the server's own error, with its status, code, param and request id
        BadRequest           400 and every other 4xx
          InvalidApiKey      401
          NotFound           404
          Overloaded         429
        ServerFailed         5xx

A video that could not be made is not an error of a call: the call returns a ``Video`` with the status ``failed``.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import httpx

from kinema.errors import KinemaError
from kinema.masking import masked

_LONGEST_QUOTE = 200


class ClientError(KinemaError):
    """The call failed."""


class ConnectionFailed(ClientError):
    """The server could not be reached."""

    code = "connection_failed"
    is_retryable = True


class WaitedTooLong(ClientError):
    """The video is not finished yet."""

    code = "waited_too_long"
    is_retryable = True


class UnexpectedAnswer(ClientError):
    """The answer does not come from a Kinema server."""

    code = "unexpected_answer"


class ApiError(ClientError):
    """The server answered with an error."""

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None, request_id: str | None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code or type(self).code
        self.request_id = request_id


class BadRequest(ApiError):
    """The server does not accept the request."""

    code = "bad_request"


class InvalidApiKey(BadRequest):
    """The server does not know the API key."""

    code = "invalid_api_key"


class NotFound(BadRequest):
    """There is no such video."""

    code = "not_found"


class Overloaded(BadRequest):
    """The server's queue is full."""

    code = "overloaded"
    is_retryable = True


class ServerFailed(ApiError):
    """The server could not do it."""

    code = "server_error"
    is_retryable = True


_CLASSES: dict[int, type[ApiError]] = {401: InvalidApiKey, 404: NotFound, 429: Overloaded}


def api_error(response: httpx.Response) -> ApiError:
    """Return the error for an answer with a status of 400 or more, whose body has been read."""
    told = _told(response)
    status = response.status_code
    kind = _CLASSES.get(status, BadRequest if status < HTTPStatus.INTERNAL_SERVER_ERROR else ServerFailed)
    return kind(
        str(told.get("message") or f"HTTP {status} {response.reason_phrase}: {response.text[:_LONGEST_QUOTE]}"),
        status=status,
        code=told.get("code"),
        param=told.get("param"),
        request_id=response.headers.get("x-request-id"),
    )


def connection_failed(exc: httpx.HTTPError, url: str) -> ConnectionFailed:
    """Return the error for a request that got no answer. A password in the address is masked."""
    url = masked(url)
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionFailed(f"no server answers at {url}")
    if isinstance(exc, httpx.TimeoutException):
        return ConnectionFailed(f"{url} did not answer in time")
    return ConnectionFailed(f"the connection to {url} broke: {str(exc) or type(exc).__name__}")


def _told(response: httpx.Response) -> dict[str, Any]:
    """Return the object under ``error``; an empty one when not Kinema answered but, for example, a proxy."""
    try:
        body = response.json()
    except ValueError:
        return {}
    told = body.get("error") if isinstance(body, dict) else None
    return told if isinstance(told, dict) else {}
