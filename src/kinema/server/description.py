"""The API's description at ``/openapi.json``: what a route says of itself beside what FastAPI reads off its signature.

A route names the errors that it may answer with (``answers`` and its like), the headers that it reads
(``request_headers``) and the model of its body (``body_of``); ``describe`` puts all of it together. The tests compare
every answer with it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from kinema import errors
from kinema.request.bodies import Body
from kinema.request.fields import PICTURE_KINDS
from kinema.server.errors import (
    CrossOrigin,
    HeadersTooLarge,
    InternalError,
    MalformedRequest,
    RequestStalled,
    ServerStopping,
    TooManyConnections,
    UnknownHost,
    UploadsFull,
    UrlTooLong,
    error_object,
    status_of,
)
from kinema.server.schemas import ErrorBody, NotReady, Video

Json = dict[str, Any]
Responses = dict[int | str, Json]
Kind = type[errors.KinemaError]
Kinds = tuple[Kind, ...]

_EVERY_CALL: Kinds = (
    MalformedRequest,
    RequestStalled,
    UrlTooLong,
    UnknownHost,
    HeadersTooLarge,
    InternalError,
    ServerStopping,
    TooManyConnections,
)
_READS: Kinds = (errors.Unauthorized, errors.StoreUnavailable)
_CHANGES: Kinds = (*_READS, CrossOrigin)
_READS_BODY: Kinds = (
    errors.InvalidRequest,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.StorageUnavailable,
    UploadsFull,
)
_CHOOSES_MODEL: Kinds = (
    errors.UnsupportedRequest,
    errors.ModelNotFound,
    errors.Overloaded,
    errors.NoWorker,
    errors.DecoderUnavailable,
)
_STORES: Kinds = (errors.QuotaExceeded, errors.StorageUnavailable, errors.StorageFull)
# The errors of opening the file of a video, and of making a video.
OPENS_VIDEO: Kinds = (
    errors.JobNotFound,
    errors.JobNotFinished,
    errors.NoVideo,
    errors.FileGone,
    errors.StorageUnavailable,
)
MAKES_VIDEO: Kinds = (errors.EngineFailed, errors.OutOfMemory, errors.WorkerLost, errors.WaitedTooLong)

_DESCRIPTION = """\
Video models of the Wan family behind an OpenAI-compatible API.

Bodies are JSON or `multipart/form-data`, on every route that takes one. Every error has the same shape, with a `code`
for programs and a sentence in `message`. A path that begins with `/videos` is served as `/v1/videos`. A path that ends
in a slash does not exist.
"""
_SECURITY_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "One of the keys in `server.api_keys` or `server.keys`. A server without keys asks for none.",
    },
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key", "description": "The same key, as Azure sends it."},
}
# The empty one stands for a server without keys, and for a link that is signed.
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"api-key": []}, {}]
NO_KEY: Json = {"security": []}

_REQUEST_HEADERS = {
    "Idempotency-Key": "Makes a submission safe to repeat: the same key with the same body is the same video; with "
    "another body it is refused with 400. At most 255 characters.",
    "x-stainless-retry-count": "The number of tries before this one, as the OpenAI SDKs count them. A second try with "
    "the same body within half an hour is the same video.",
    "Last-Event-ID": "The `id` of the last event that was seen; the stream goes on after it.",
    "Range": "The part of the file that is asked for, as `bytes=FIRST-LAST`; a range with several parts is ignored.",
    "If-Range": "The ETag for which Range holds; for another file Range is ignored.",
    "If-None-Match": "ETags of files that the client has; the answer is 304 when the file is one of them.",
    "X-Request-ID": "The client's own id for this request, of up to 128 letters, digits and `._:-`; it comes back in "
    "the answer and is in the server's log.",
}
_ANSWER_HEADERS = {
    "x-request-id": "The id of this request, for instance to look for in the server's log.",
    "x-should-retry": "`false`: do not send the request again by yourself. The OpenAI SDKs obey.",
    "retry-after": "Seconds after which to try again.",
    "www-authenticate": "`Bearer`.",
    "connection": "`close`: the rest of the request is not read.",
    "openai-poll-after-ms": "Milliseconds after which to look at the video again.",
    "cache-control": "Whether the answer may be kept.",
    "x-accel-buffering": "`no`: asks a proxy to pass each event on at once.",
    "etag": "The name of this very file, for If-None-Match and If-Range.",
    "accept-ranges": "`bytes`.",
    "location": "The file itself, which opens there without a key for a quarter of an hour.",
    "content-range": "The part that this is, and the size of the whole file.",
    "content-disposition": "A name for the file.",
    "x-content-type-options": "`nosniff`.",
}
_HEADERS_OF: Mapping[Kind, Sequence[str]] = {
    errors.Unauthorized: ("www-authenticate",),
    errors.Overloaded: ("retry-after",),
    errors.NoWorker: ("retry-after",),
    errors.StoreUnavailable: ("retry-after",),
    errors.RangeNotSatisfiable: ("content-range",),
    MalformedRequest: ("connection",),
    RequestStalled: ("connection",),
    UrlTooLong: ("connection",),
    HeadersTooLarge: ("connection",),
    TooManyConnections: ("connection", "retry-after"),
    UploadsFull: ("retry-after",),
}
FILE_HEADERS = ("etag", "accept-ranges", "cache-control", "content-disposition", "x-content-type-options")
STREAM_HEADERS = ("cache-control", "x-accel-buffering")
_SCHEMAS = "#/components/schemas/"
_FILE = {"type": "string", "format": "binary"}
# The fields of a form that replace a field of JSON, where that may be a file.
_FILE_FIELDS: Mapping[str, Json] = {
    "input_reference": {
        "input_reference": _FILE
        | {
            "description": f"The first frame, a file ({PICTURE_KINDS}); or a text as in the JSON body. "
            "A second file of this name is the last frame."
        },
    },
    "last_frame": {
        "last_frame": _FILE
        | {"description": f"The last frame, a file ({PICTURE_KINDS}); or a text as in the JSON body."},
    },
    "video": {
        "video": _FILE | {"description": "An MP4, MOV or WebM file."},
        "video[id]": {
            "type": "string",
            "description": "In place of a file: the id of a finished video of this server.",
        },
    },
}
METRICS: Json = {"text/plain": {"schema": {"type": "string"}, "example": "kinema_jobs_waiting 3.0\n"}}
EVENT_STREAM: Json = {
    "text/event-stream": {
        "schema": {"type": "string"},
        "example": 'id: 3\nevent: progress\ndata: {"id": "video_...", "object": "video.event", '
        '"status": "in_progress", "progress": 40, "stage": "denoise", "step": 2, "total": 5}\n\n',
    }
}


LIST_EVENT_STREAM: Json = {
    "text/event-stream": {
        "schema": {"type": "string"},
        "example": 'id: 5b0c...\nevent: video\ndata: {"id": "video_...", "object": "video", "status": "in_progress", '
        '"progress": 40}\n\n',
    }
}


class Answers(TypedDict, total=False):
    """Parts of a 200: the names of its headers, and its media types other than JSON."""

    headers: Sequence[str]
    content: Mapping[str, Json]


def answers(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route: its 200, and every status that these errors have."""
    by_status = defaultdict(list)
    for kind in dict.fromkeys((*kinds, *_EVERY_CALL)):
        by_status[status_of(kind)].append(kind)
    refusals: Responses = {status: _refusal(found) for status, found in sorted(by_status.items())}
    return {200: answer(said, **ok)} | refusals


def reads(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route that shows what belongs to a key."""
    return answers(said, *kinds, *_READS, **ok)


def changes(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route that changes what belongs to a key; pages of other sites may not do that."""
    return answers(said, *kinds, *_CHANGES, **ok)


def takes_body(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route that changes something and has a body."""
    return changes(said, *kinds, *_READS_BODY, **ok)


def takes_video(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route whose body asks for a video."""
    return takes_body(said, *kinds, *_CHOOSES_MODEL, **ok)


def makes_video(said: str, *kinds: Kind, **ok: Unpack[Answers]) -> Responses:
    """Describe the answers of a route that puts a video into the queue."""
    return takes_video(said, *kinds, *_STORES, **ok)


def answer(said: str, *, headers: Sequence[str] = (), content: Mapping[str, Json] | None = None) -> Json:
    """Describe one answer that is not an error."""
    described: Json = {"description": said, "headers": _headers("x-request-id", *headers)}
    return described | ({"content": content} if content else {})


def with_error_body(responses: Responses, status: int, model: type[ErrorBody]) -> Responses:
    """Describe the errors of this status by a model of their own."""
    responses[status]["content"]["application/json"]["schema"] = {"$ref": _SCHEMAS + model.__name__}
    return responses


def files(*media_types: str) -> Json:
    return {media_type: {"schema": _FILE} for media_type in media_types}


def request_headers(*names: str) -> Json:
    return {"parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names]}


def body_of(form: type[Body], *, is_required: bool = True) -> Json:
    """Describe a body in both encodings. The handlers read it themselves, so FastAPI does not know it."""
    content = {
        "application/json": {"schema": {"$ref": _SCHEMAS + form.__name__}, "example": form.example},
        "multipart/form-data": {"schema": {"$ref": _SCHEMAS + _form_name(form)}},
    }
    return {"requestBody": {"required": is_required, "content": content}}


def submission_of(form: type[Body]) -> Json:
    """Describe the body of a route that makes a video, and the headers that make it safe to send the request again."""
    return body_of(form) | request_headers("Idempotency-Key", "x-stainless-retry-count")


def describe(app: FastAPI, forms: Sequence[type[Body]], root_path: str = "") -> Json:
    """Return the whole description. ``forms`` are the models of all bodies, and ``root_path`` is where clients find the
    paths."""
    described = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    if root_path:
        described["servers"] = [{"url": root_path}]
    components = described["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for form in forms:
        _add_form(components["schemas"], form)
    # For a model with a serializer FastAPI describes what the serializer returns: any object.
    for model in (ErrorBody, NotReady, Video):
        _add_model(components["schemas"], model)
    components["parameters"] = {name: _parameter(name, said) for name, said in _REQUEST_HEADERS.items()}
    components["headers"] = {
        name: {"description": said, "schema": {"type": "string"}} for name, said in _ANSWER_HEADERS.items()
    }
    components["securitySchemes"] = _SECURITY_SCHEMES
    described["security"] = _SECURITY
    for path in described["paths"].values():
        for operation in path.values():
            summary, _, rest = operation.pop("description").partition("\n\n")
            operation |= {"summary": re.sub("`|[.]$", "", summary.replace("\n", " ")), "description": rest}
            # FastAPI adds a 422 to each route with a parameter. Here no route leaves a check to FastAPI.
            operation["responses"].pop("422", None)
            for response in operation["responses"].values():
                _complete_examples(response)
            operation["parameters"] = operation.get("parameters", []) + request_headers("X-Request-ID")["parameters"]
    return described


def _refusal(kinds: Sequence[Kind]) -> Json:
    """Describe one status: a sentence and an example for each code."""
    headers = [name for kind in kinds for name in _HEADERS_OF.get(kind, ())]
    examples = {
        kind.code: {"value": {"error": error_object(status_of(kind), kind.summary(), code=kind.code)}} for kind in kinds
    }
    return {
        "description": "\n\n".join(f"`{kind.code}`: {kind.summary()}" for kind in kinds),
        "headers": _headers("x-request-id", "x-should-retry", *headers),
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS + "ErrorBody"}, "examples": examples}},
    }


def _complete_examples(response: Json) -> None:
    """Put the null back that FastAPI leaves out."""
    for media in response.get("content", {}).values():
        for example in media.get("examples", {}).values():
            example["value"]["error"].setdefault("param", None)


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _parameter(name: str, said: str) -> Json:
    return {"name": name, "in": "header", "required": False, "description": said, "schema": {"type": "string"}}


def _form_name(form: type[Body]) -> str:
    return form.__name__.removesuffix("Body") + "Form"


def _add_form(schemas: Json, form: type[Body]) -> None:
    """Add the schema of a body as JSON, and the schema of the same body as a form, in which files are parts."""
    _add_model(schemas, form)
    schema = schemas[form.__name__]
    schema["properties"] = {name: _without_null(value) for name, value in schema["properties"].items()}
    as_form = {name: value for name, value in schema.items() if name != "required"}
    properties = dict(schema["properties"])
    for name in properties.keys() & _FILE_FIELDS.keys():
        properties |= _FILE_FIELDS[name]
    required = [name for name in schema.get("required", []) if name not in _FILE_FIELDS]
    schemas[_form_name(form)] = (
        as_form | {"properties": properties, "title": _form_name(form)} | ({"required": required} if required else {})
    )


def _without_null(schema: Json) -> Json:
    """Return the schema of a field without null. A null means an absent field, and would only fill the page."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in {"anyOf", "default"}}
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


def _add_model(schemas: Json, model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
