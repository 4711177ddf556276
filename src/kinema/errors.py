"""Every error of Kinema, once.

    KinemaError
      RequestError             the caller's fault; nothing was started
        Unauthorized
        InvalidRequest
        UnsupportedRequest
        ModelNotFound
        JobNotFound
        JobNotFinished
        NoVideo
        FileGone
        PayloadTooLarge
        UnsupportedMediaType
        RangeNotSatisfiable
        WebhookNotFound
        WebhookFailed
        Overloaded
        QuotaExceeded
      GenerationError          how an accepted job ended
        EngineFailed
        OutOfMemory
        WorkerLost
        Drained
        WaitedTooLong
      ServiceError             ours; the same request may work later
        NoWorker
        StoreUnavailable
        StorageUnavailable
          StorageFull
        DecoderUnavailable
      ConfigError              at start: names the key, the value and what would be accepted

A docstring's first line is the default message, so it is one sentence that a client may read.
Which HTTP status each one gets is decided in ``server/errors.py`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator


class KinemaError(Exception):
    """Something went wrong."""

    code: str = "error"
    # Whether the same work may succeed when it is tried again, on another worker or later.
    is_retryable: bool = False

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message or self.summary())
        self.param = param

    @classmethod
    def summary(cls) -> str:
        """The first line of the class's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @property
    def message(self) -> str:
        return str(self)


class RequestError(KinemaError):
    """The request cannot be served."""


class Unauthorized(RequestError):
    """No valid API key; send one of this server's as 'Authorization: Bearer KEY'."""

    code = "invalid_api_key"


class InvalidRequest(RequestError):
    """The request is not valid."""

    code = "invalid_value"


class UnsupportedRequest(RequestError):
    """The model cannot make what was asked for."""

    code = "unsupported"


class ModelNotFound(RequestError):
    """No such model is served here."""

    code = "model_not_found"


class JobNotFound(RequestError):
    """No such video."""

    code = "not_found"

    @classmethod
    def named(cls, job_id: str) -> JobNotFound:
        """The error that names the id, or the beginning of a long one."""
        return cls(f"no video {job_id[:100]!r}")


class JobNotFinished(RequestError):
    """The video is not finished."""

    code = "not_finished"


class NoVideo(RequestError):
    """The job ended without a video."""

    code = "no_video"


class FileGone(RequestError):
    """The file is no longer there."""

    code = "file_gone"


class PayloadTooLarge(RequestError):
    """The request body is too large."""

    code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    """The request body must be application/json or multipart/form-data."""

    code = "unsupported_media_type"


class RangeNotSatisfiable(RequestError):
    """The file does not have the bytes that were asked for."""

    code = "range_not_satisfiable"

    def __init__(self, message: str | None = None, *, size_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes


class WebhookNotFound(RequestError):
    """No such webhook endpoint."""

    code = "not_found"


class WebhookFailed(RequestError):
    """The webhook endpoint did not answer."""

    code = "webhook_failed"


class Overloaded(RequestError):
    """The queue is full; try again later."""

    code = "overloaded"
    is_retryable = True

    def __init__(self, message: str | None = None, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(RequestError):
    """This key has stored as much as it may; delete videos that are not needed any more."""

    # OpenAI's own word for what does not get better by waiting.
    code = "insufficient_quota"


class GenerationError(KinemaError):
    """The video could not be made."""


class EngineFailed(GenerationError):
    """The engine failed while it made the video."""

    code = "engine_failed"


class OutOfMemory(GenerationError):
    """The device ran out of memory; ask for a smaller size or fewer frames."""

    code = "out_of_memory"


class WorkerLost(GenerationError):
    """The worker stopped before the video was finished."""

    code = "worker_lost"
    is_retryable = True


class Drained(GenerationError):
    """The worker stopped and gave the video back."""

    code = "drained"
    is_retryable = True


class WaitedTooLong(GenerationError):
    """The video waited for a worker for as long as it may; send the request again."""

    code = "waited_too_long"


class ServiceError(KinemaError):
    """The service cannot do this now."""

    is_retryable = True


class NoWorker(ServiceError):
    """No worker for this model is ready."""

    code = "no_worker"
    # A worker that starts anew reads its weights first.
    retry_after_s = 5


class StoreUnavailable(ServiceError):
    """The job database cannot be reached."""

    code = "store_unavailable"
    # What holds it up is over by then: a transaction of a frozen server is ended after a few seconds.
    retry_after_s = 2


class StorageUnavailable(ServiceError):
    """The file storage cannot be reached."""

    code = "storage_unavailable"


class StorageFull(StorageUnavailable):
    """The storage has too little free space for new videos; delete some, or ask whoever runs this server."""

    code = "storage_full"


class DecoderUnavailable(ServiceError):
    """Pictures and films cannot be read now; try again later."""

    code = "decoder_unavailable"


class ConfigError(KinemaError):
    """The configuration is not valid."""

    code = "config"


def by_code(code: str) -> type[KinemaError]:
    """The class of an error that another process told by its code; EngineFailed for one that is not known here."""
    return _BY_CODE.get(code, EngineFailed)


def _below(parent: type[KinemaError]) -> Iterator[type[KinemaError]]:
    for child in parent.__subclasses__():
        yield child
        yield from _below(child)


# The first of each code. One that needs more than words to be made is not told between processes.
_BY_CODE = {cls.code: cls for cls in reversed([*_below(KinemaError)]) if cls not in {RangeNotSatisfiable}}
