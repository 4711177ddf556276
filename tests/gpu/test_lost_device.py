"""A real error of a CUDA device: the server's process ends with an error, and the next one makes the job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

# A process of its own has a context of its own to break. ``guide`` is called in each step, on the device thread.
_SERVE = """
import os, sys, torch
from kinema.engines.wan import denoise
from kinema.cli.app import app

guide, calls = denoise.guide, 0

def break_device(velocities, scale):
    global calls
    calls += 1
    guided = guide(velocities, scale)
    if calls > int(os.environ["BREAKS_AFTER"]):
        how = os.environ["BREAKS_BY"]
        if how == "assert":
            torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]
        else:
            # Nothing was allocated at this address.
            nowhere = torch._C._construct_storage_from_data_pointer(2**20, torch.device("cuda", 0), 4096)
            torch.empty(0, device="cuda").set_(nowhere, 0, (1024,), (1,)).sum()
    return guided

if "BREAKS_BY" in os.environ:
    denoise.guide = break_device
sys.argv = ["kinema", *sys.argv[1:]]
app()
"""
# The steps of the two trial videos (1 and 3) come first, and the first one of the job.
_FIRST_STEPS = 5
_PATIENCE_S = 60.0
_JOB = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 5, "num_inference_steps": 8, "seed": 7}


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server on the bundled model and CUDA, killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    arguments = ["serve", "--port", str(port), "--data-dir", str(folder), "--device", "cuda"]
    process = subprocess.Popen([sys.executable, "-c", _SERVE, *arguments], env={**os.environ, **environment})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def until(process: subprocess.Popen[bytes], is_so: Callable[[], bool]) -> None:
    """Wait for what the server answers."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline
        with suppress(httpx.TransportError):
            if is_so():
                return
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["assert", "access"])
def test_a_broken_context_ends_the_process_and_its_job_is_made_at_the_next_start(how: str, tmp_path: Path) -> None:
    """The job does not fail for what happened to its device."""
    with serving(tmp_path, BREAKS_BY=how, BREAKS_AFTER=str(_FIRST_STEPS)) as (process, client):
        until(process, lambda: client.get("/ready").status_code == 200)
        job_id = client.post("/v1/videos", json=_JOB).json()["id"]
        assert process.wait(_PATIENCE_S) not in (0, 2)
    with serving(tmp_path) as (process, client):
        until(process, lambda: client.get("/ready").status_code == 200)
        until(process, lambda: client.get(f"/v1/videos/{job_id}").json()["status"] == "completed")
