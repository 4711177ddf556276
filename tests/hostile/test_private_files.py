"""Another user of the machine, who looks at the files of a service."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.hostile.servers import running_server

pytestmark = pytest.mark.hostile


def test_no_file_of_a_service_is_readable_for_others(tmp_path: Path) -> None:
    """Neither while it runs nor after, though it was started with no mask at all, and its folder was open."""
    (tmp_path / "data").mkdir()
    before = os.umask(0)
    try:
        (tmp_path / "data").chmod(0o777)
        with running_server(tmp_path, "--engine", "fake") as server, server.client() as client:
            body = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
            client.post("/v1/videos/generations", json=body).raise_for_status()
            running = {path: path.stat().st_mode for path in (tmp_path / "data").rglob("*")}
    finally:
        os.umask(before)
    ended = {path: path.stat().st_mode for path in (tmp_path / "data").rglob("*")}
    names = {path.name for path in running}
    assert names >= {"kinema.db", "kinema.db-wal", "kinema.db-shm", "files", "videos", "1.mp4", "1.json"}
    for found in (running, ended):
        assert [path for path, mode in found.items() if stat.S_IMODE(mode) & 0o077] == []
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
