"""A service that is started with a database that does not know the videos of its storage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.servers import running_server
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_SMALL = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
_PATIENCE_S = 60
_SWEEPS = {"KINEMA_RETENTION_SWEEP_EVERY_S": "0.05"}


def _make_videos(server: Server, count: int) -> list[str]:
    with server.client() as client:
        return [
            client.post("/v1/videos/generations", json=_SMALL).raise_for_status().json()["id"] for _ in range(count)
        ]


def _videos_in(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("data/files/videos/*/*.mp4")}


def _grow_old(folder: Path) -> None:
    """Let the files be of yesterday, since a sweep leaves new ones alone."""
    yesterday = time.time() - 24 * 3600
    for path in (folder / "data/files/videos").rglob("*"):
        os.utime(path, (yesterday, yesterday))


def _kinema(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kinema", *arguments, "--data-dir", str(folder / "data")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=_PATIENCE_S, check=False)


def _health_when(server: Server, sweeping: str) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE_S
    with server.client() as client:
        while (health := client.get("/health").raise_for_status().json())["sweeping"] != sweeping:
            assert time.monotonic() < deadline, health
            time.sleep(0.02)
    return health


def test_a_forgotten_database_costs_no_video(tmp_path: Path) -> None:
    """The start is refused, with a sentence; the videos are there, and so is the service with the right database."""
    with running_server(tmp_path, "--engine", "fake", settings=_SWEEPS) as server:
        ids = {*_make_videos(server, 12)}
    _grow_old(tmp_path)
    refused = _kinema(tmp_path, "serve", "--engine", "fake", "--port", "0", "--database", f"sqlite:///{tmp_path}/o.db")
    assert refused.returncode == 2
    assert "error: storage.url = 'file://" in refused.stderr
    assert "belong to another job database" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert _videos_in(tmp_path) == ids
    with running_server(tmp_path, "--engine", "fake", settings=_SWEEPS) as server, server.client() as client:
        assert all(client.get(f"/v1/videos/{one}/content").status_code == 200 for one in ids)


def test_an_older_database_costs_no_video(tmp_path: Path) -> None:
    """Videos of the time since its copy was made stay until somebody says that they may go; `/health` counts them."""
    with running_server(tmp_path, "--engine", "fake", settings=_SWEEPS) as server:
        before = {*_make_videos(server, 2)}
    shutil.copy(tmp_path / "data/kinema.db", tmp_path / "copy.db")
    with running_server(tmp_path, "--engine", "fake", settings=_SWEEPS) as server:
        since = {*_make_videos(server, 3)}
    shutil.copy(tmp_path / "copy.db", tmp_path / "data/kinema.db")
    for beside in ("-wal", "-shm"):
        (tmp_path / f"data/kinema.db{beside}").unlink(missing_ok=True)
    _grow_old(tmp_path)
    with running_server(tmp_path, "--engine", "fake", settings=_SWEEPS) as server:
        held = _health_when(server, "held")
        stored = [path for one in since for path in (tmp_path / f"data/files/videos/{one}").iterdir()]
        assert held["files_held"] == len(stored)
        assert held["bytes_held"] == sum(path.stat().st_size for path in stored)
        assert _videos_in(tmp_path) == before | since

        told = _kinema(tmp_path, "storage", "sweep")
        assert told.returncode == 0, told.stderr
        lines = [line.split("\t") for line in told.stdout.splitlines()]
        assert {(folder, kind) for folder, _, _, kind in lines} == {(f"videos/{one}", "unknown") for one in since}
        assert sum(int(count) for _, count, _, _ in lines) == held["files_held"]
        assert _videos_in(tmp_path) == before | since

        assert _kinema(tmp_path, "storage", "sweep", "--yes").returncode == 0
        assert _videos_in(tmp_path) == before
        assert _health_when(server, "working")["files_held"] == 0
    said = "files that the database does not know are kept; `kinema storage sweep` lists them"
    assert len(server.said(said)) == 1
