"""The bytes of a checkpoint: they say which request and engine they belong to, and whether they are whole.

They are a line with the SHA-256 of all that follows, a line of JSON, and then whatever the engine wrote; reading them
runs no code. A checkpoint is used for the same request and by an engine with the same facts, or not at all. Anybody who
can write to storage can write a whole one, so what it says of itself is checked before it is followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from kinema.errors import InvalidRequest
from kinema.manifest import EngineFacts
from kinema.request.json_text import parse_json
from kinema.request.request import GenerationRequest

log = structlog.get_logger(__name__)

_FORMAT = "kinema-checkpoint-1"
# The first line: SHA-256 in hex.
_DIGEST_CHARS = 64
# The second line has about 1 kB.
_MAX_HEADER_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Unsealed:
    """``num_done`` of the request's steps are done, and ``content`` is what was given to ``seal``."""

    num_done: int
    content: bytes


def seal(made_by: EngineFacts, request: GenerationRequest, facts: Mapping[str, Any], content: bytes = b"") -> bytes:
    """A checkpoint of the request, by the engine with the facts ``made_by``; ``facts`` are plain data for JSON, with
    ``num_done``, the number of steps that are done."""
    fields = {"format": _FORMAT, "engine": made_by.model_dump(), "request": _digest_of(request), "facts": facts}
    header = json.dumps(fields).encode()
    return b"\n".join([_digest(header + b"\n", content), header, content])


def unseal(data: bytes | None, by: EngineFacts, request: GenerationRequest) -> Unsealed | None:
    """What the checkpoint holds; None when there is no checkpoint, or, with a line in the log, when it does not fit."""
    if data is None:
        return None
    try:
        return _open(memoryview(data), by, request)
    except (ValueError, InvalidRequest) as exc:
        log_unused(exc)
        return None


def log_unused(reason: Exception) -> None:
    """Log why a checkpoint is not used."""
    log.warning("a checkpoint is not used, the video is begun again", reason=str(reason))


def _open(data: memoryview, by: EngineFacts, request: GenerationRequest) -> Unsealed:
    """Raises ValueError or InvalidRequest with the reason when the checkpoint does not fit."""
    rest = data[_DIGEST_CHARS + 1 :]
    if bytes(data[: _DIGEST_CHARS + 1]) != _digest(rest) + b"\n":
        raise ValueError("it is damaged")
    header, has_end, _ = bytes(rest[:_MAX_HEADER_BYTES]).partition(b"\n")
    fields = parse_json(header.decode(), "its header", max_fields=None) if has_end else None
    if not isinstance(fields, dict):
        raise ValueError("it has no header")
    for name, expected in (("format", _FORMAT), ("engine", by.model_dump()), ("request", _digest_of(request))):
        if fields.get(name) != expected:
            raise ValueError(f"it is of another {name}")
    facts = fields.get("facts")
    num_done = facts.get("num_done") if isinstance(facts, dict) else None
    if type(num_done) is not int or not 0 < num_done <= request.num_denoising_steps:
        raise ValueError("it is of no step of the request")
    return Unsealed(num_done, bytes(rest[len(header) + 1 :]))


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def _digest_of(request: GenerationRequest) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
