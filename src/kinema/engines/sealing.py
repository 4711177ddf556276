"""Checkpoints as bytes that say what they belong to and whether they are whole.

A line with the SHA-256 of all that follows, a line of JSON, and then whatever the engine wrote. Nothing of it is run
when it is read. A checkpoint is used for the request and by the engine that made it, or not at all.
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
class Opened:
    """``facts`` and ``content`` as ``seal`` got them."""

    facts: Mapping[str, Any]
    content: bytes


def seal(made_by: EngineFacts, request: GenerationRequest, facts: Mapping[str, Any], content: bytes = b"") -> bytes:
    """``facts`` are plain data for JSON."""
    said = {"format": _FORMAT, "engine": made_by.model_dump(), "request": _digest_of(request), "facts": facts}
    header = json.dumps(said).encode()
    return b"\n".join([_digest(header, content), header, content])


def unseal(data: bytes | None, by: EngineFacts, request: GenerationRequest) -> Opened | None:
    """What the checkpoint holds; None, with a line in the log, when there is none or it is not for this."""
    if data is None:
        return None
    try:
        return _open(data, by, request)
    except ValueError as exc:
        log.warning("a checkpoint is not used, the video is begun again", reason=str(exc))
        return None


def _open(data: bytes, by: EngineFacts, request: GenerationRequest) -> Opened:
    """Raises ValueError with the reason when it is not for this."""
    digest, _, rest = data.partition(b"\n")
    header, _, content = rest.partition(b"\n")
    if digest != _digest(header, content):
        raise ValueError("it is damaged")
    said = json.loads(header)
    for name, expected in (("format", _FORMAT), ("engine", by.model_dump()), ("request", _digest_of(request))):
        if said.get(name) != expected:
            raise ValueError(f"it is of another {name}")
    return Opened(said["facts"], content)


def _digest(header: bytes, content: bytes) -> bytes:
    digest = hashlib.sha256(header + b"\n")
    digest.update(content)
    return digest.hexdigest().encode()


def _digest_of(request: GenerationRequest) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
