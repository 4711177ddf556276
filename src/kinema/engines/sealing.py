"""The bytes of a checkpoint: they say which request and engine they belong to, and whether they are whole.

They are a line with the SHA-256 of all that follows, a line of JSON, and then whatever the engine wrote; reading them
runs no code. A checkpoint is used for the same request and by an engine with the same facts, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from kinema.manifest import EngineFacts
from kinema.request.request import GenerationRequest

log = structlog.get_logger(__name__)

_FORMAT = "kinema-checkpoint-1"


@dataclass(frozen=True, slots=True)
class Unsealed:
    """The ``facts`` and ``content`` that were given to ``seal``."""

    facts: Mapping[str, Any]
    content: bytes


def seal(made_by: EngineFacts, request: GenerationRequest, facts: Mapping[str, Any], content: bytes = b"") -> bytes:
    """A checkpoint of the request, by the engine with the facts ``made_by``; ``facts`` are plain data for JSON."""
    fields = {"format": _FORMAT, "engine": made_by.model_dump(), "request": _digest_of(request), "facts": facts}
    header = json.dumps(fields).encode()
    return b"\n".join([_digest(header, content), header, content])


def unseal(data: bytes | None, by: EngineFacts, request: GenerationRequest) -> Unsealed | None:
    """What the checkpoint holds; None when there is no checkpoint, or, with a line in the log, when it does not fit."""
    if data is None:
        return None
    try:
        return _open(data, by, request)
    except ValueError as exc:
        log.warning("a checkpoint is not used, the video is begun again", reason=str(exc))
        return None


def _open(data: bytes, by: EngineFacts, request: GenerationRequest) -> Unsealed:
    """Raises ValueError with the reason when the checkpoint does not fit."""
    digest, _, rest = data.partition(b"\n")
    header, _, content = rest.partition(b"\n")
    if digest != _digest(header, content):
        raise ValueError("it is damaged")
    fields = json.loads(header)
    for name, expected in (("format", _FORMAT), ("engine", by.model_dump()), ("request", _digest_of(request))):
        if fields.get(name) != expected:
            raise ValueError(f"it is of another {name}")
    return Unsealed(fields["facts"], content)


def _digest(header: bytes, content: bytes) -> bytes:
    digest = hashlib.sha256(header + b"\n")
    digest.update(content)
    return digest.hexdigest().encode()


def _digest_of(request: GenerationRequest) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
