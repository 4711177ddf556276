"""The commands of docs/backup.md, as they are written, against a service that has videos."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.postgres import PostgresServer
from tests.server_process import Server, running_server

PAGE = (Path(__file__).parents[2] / "docs/backup.md").read_text(encoding="utf-8")
ADOPT, BACK_UP, BACK_UP_POSTGRES, RESTORE, RESTORE_POSTGRES, SWEEP = re.findall(
    r"^```sh\n(.*?)^```$", PAGE, re.M | re.S
)
(HEALTH,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
SMALL = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
_PATIENCE_S = 60

Shell = Callable[..., str]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a block of the page in the folder of the service."""

    def run(block: str, path: str = "", **environment: str) -> str:
        (tmp_path / "bin").mkdir(exist_ok=True)
        kinema = tmp_path / "bin/kinema"
        kinema.write_text(f'#!/bin/sh\nexec {sys.executable} -m kinema "$@"\n', encoding="utf-8")
        kinema.chmod(0o755)
        found = f"{tmp_path / 'bin'}:{path}:{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", "-euc", block.replace("kinema-data", "data")],
            env={**os.environ, **environment, "PATH": found},
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            timeout=_PATIENCE_S,
            check=True,
        )
        return ended.stdout

    return run


def make(server: Server) -> tuple[str, bytes]:
    """The id of a new video and its file."""
    with server.client() as client:
        video = client.post("/v1/videos/generations", json=SMALL).raise_for_status().json()["id"]
        return video, client.get(f"/v1/videos/{video}/content").raise_for_status().content


def content(server: Server, video: str) -> bytes:
    with server.client() as client:
        return client.get(f"/v1/videos/{video}/content").raise_for_status().content


def health_when(server: Server, sweeping: str) -> dict[str, Any]:
    """What `/health` says after a sweep that ended so."""
    deadline = time.monotonic() + _PATIENCE_S
    with server.client() as client:
        while (health := client.get("/health").raise_for_status().json())["sweeping"] != sweeping:
            assert time.monotonic() < deadline, health
            time.sleep(0.02)
    return {name: health[name] for name in json.loads(HEALTH)}


def grow_old(folder: Path) -> None:
    """Let the files be of yesterday, since a sweep leaves new ones alone."""
    yesterday = time.time() - 24 * 3600
    for path in (folder / "data/files/videos").rglob("*"):
        os.utime(path, (yesterday, yesterday))


def test_a_service_comes_back_from_its_copy(shell: Shell, tmp_path: Path) -> None:
    """All is lost, then the database alone is old; the page's sweep removes what that does not know, when told to."""
    sweeps = {"KINEMA_RETENTION_SWEEP_EVERY_S": "0.05"}
    with running_server(tmp_path, "--engine", "fake", settings=sweeps) as server:
        first, film = make(server)
        shell(BACK_UP)
        make(server)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    shell(RESTORE)

    with running_server(tmp_path, "--engine", "fake", settings=sweeps) as server:
        assert content(server, first) == film
        second, _ = make(server)
    (tmp_path / "backup/files").rename(tmp_path / "backup/nothing")
    (tmp_path / "backup/files").mkdir()
    shell(RESTORE)
    grow_old(tmp_path)

    with running_server(tmp_path, "--engine", "fake", settings=sweeps) as server:
        assert content(server, first) == film
        stored = [*(tmp_path / f"data/files/videos/{second}").iterdir()]
        size = sum(path.stat().st_size for path in stored)
        assert health_when(server, "held") == {"sweeping": "held", "files_held": len(stored), "bytes_held": size}
        line = f"videos/{second}\t{len(stored)}\t{size}\tunknown\n"
        assert shell(SWEEP) == 2 * line
        assert not (tmp_path / f"data/files/videos/{second}").exists()
        assert health_when(server, "working")["files_held"] == 0
        assert content(server, first) == film
    told = dict(row.split("\t") for row in shell(ADOPT).splitlines())
    assert (told["known videos in the storage"], told["unknown videos in the storage"]) == ("1", "0")


def test_a_service_on_postgres_comes_back_from_its_copy(
    shell: Shell, tmp_path: Path, postgres: PostgresServer, postgres_url: str
) -> None:
    """The storage is newer than its database then, and loses nothing."""
    arguments = ("--engine", "fake", "--database", postgres_url)
    programs, url = str(postgres.programs), {"KINEMA_JOBS_DATABASE_URL": postgres_url}
    with running_server(tmp_path, *arguments) as server:
        first, film = make(server)
        shell(BACK_UP_POSTGRES, programs, **url)
        second, _ = make(server)
    shell(RESTORE_POSTGRES, programs, **url)
    grow_old(tmp_path)
    with running_server(tmp_path, *arguments) as server, server.client() as client:
        assert content(server, first) == film
        assert client.get(f"/v1/videos/{second}").status_code == 404
        assert health_when(server, "held")["files_held"] == len([*(tmp_path / f"data/files/videos/{second}").iterdir()])
