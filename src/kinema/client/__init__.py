"""A small client of the service: ``Client``, and ``AsyncClient`` with the same methods.

It knows only the HTTP API: importing it loads neither the server nor a model's libraries.
"""

from __future__ import annotations

from kinema.client.asynchronous import AsyncClient
from kinema.client.calls import Looked
from kinema.client.errors import (
    ApiError,
    BadRequest,
    ClientError,
    ConnectionFailed,
    InvalidApiKey,
    NotFound,
    Overloaded,
    ServerFailed,
    UnexpectedAnswer,
    WaitedTooLong,
)
from kinema.client.models import (
    CancelledEvent,
    CompletedEvent,
    EndEvent,
    Estimate,
    FailedEvent,
    InputFile,
    ListEvent,
    ListReset,
    Lora,
    Manifest,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    StartedEvent,
    Usage,
    Video,
    VideoChanged,
    VideoDatum,
    VideoDeleted,
    VideoError,
    VideoEvent,
    VideoRow,
)
from kinema.client.submission import VideoOptions
from kinema.client.synchronous import Client

__all__ = [
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "CancelledEvent",
    "Client",
    "ClientError",
    "CompletedEvent",
    "ConnectionFailed",
    "EndEvent",
    "Estimate",
    "FailedEvent",
    "InputFile",
    "InvalidApiKey",
    "ListEvent",
    "ListReset",
    "Looked",
    "Lora",
    "Manifest",
    "NotFound",
    "Overloaded",
    "PreviewEvent",
    "ProgressEvent",
    "QueuedEvent",
    "ServerFailed",
    "StartedEvent",
    "UnexpectedAnswer",
    "Usage",
    "Video",
    "VideoChanged",
    "VideoDatum",
    "VideoDeleted",
    "VideoError",
    "VideoEvent",
    "VideoOptions",
    "VideoRow",
    "WaitedTooLong",
]
