"""What the transport is told in these tests."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """All of ``TransportSettings``, for one machine."""

    discovery: Literal["etcd", "file"] = "file"
    etcd_endpoints: str | None = None
    file_dir: Path | None = None
    namespace: str = "test"
    lease_s: float = 5.0
    silence_s: float = 3.0
    max_message_mb: float = 4.0
    host: str | None = "127.0.0.1"

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        given = json.loads(text)
        return cls(**given | {"file_dir": given["file_dir"] and Path(given["file_dir"])})
