"""A device that fails under a running service, and folders that ask for more than a model has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kinema.engines.wan.checkpoint import BUNDLED
from tests.hostile.servers import begin_server, running_server

pytestmark = pytest.mark.hostile

# Python runs a file of this name at its start. The device of the fake engine fails as CUDA does, for good.
_SITE = """
import kinema.engines.fake as fake

whole = fake.FakeEngine._announce

def fails(self, request, output):
    if "[cuda]" in request.prompt:
        self.is_broken = True
    if getattr(self, "is_broken", False):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return whole(self, request, output)

fake.FakeEngine._announce = fails
"""
_SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 4}
_PATIENCE_S = 60.0


def test_a_device_that_fails_takes_no_job_with_it(tmp_path: Path) -> None:
    """The process ends with an error; the next one makes what the failed one had, and what waited for it."""
    (tmp_path / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    ids = []
    server = begin_server(tmp_path, "--engine", "fake", settings={"PYTHONPATH": path})
    with server.client() as client:
        for prompt in ("[slow] before", "[cuda]", "after", "after that"):
            try:
                ids.append(client.post("/v1/videos", json={**_SMALL, "prompt": prompt}).json()["id"])
            except httpx.TransportError:  # the server was quicker
                break
    assert len(ids) > 1
    assert server.process.wait(_PATIENCE_S) == 1
    assert "the device failed" in server.log.read_text(encoding="utf-8")
    with running_server(tmp_path, "--engine", "fake") as again, again.client() as client:
        deadline = time.monotonic() + _PATIENCE_S
        for job_id in ids:
            while (job := client.get(f"/v1/videos/{job_id}").json())["status"] != "completed":
                assert job["status"] in ("queued", "in_progress"), job
                assert time.monotonic() < deadline
                time.sleep(0.05)


def _change(model: Path, file: str, **values: object) -> None:
    path = model / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def _deep(model: Path) -> None:
    (model / "model_index.json").write_text("[" * 50_000, encoding="utf-8")


def _huge(model: Path) -> None:
    _change(model, "transformer/config.json", num_layers=1000, ffn_dim=2**20)


def _all_header(model: Path) -> None:
    """A file of a tebibyte, which is not on the disk, and whose header is all of it."""
    with (model / "vae" / "diffusion_pytorch_model.safetensors").open("wb") as sparse:
        sparse.write((2**40 - 8).to_bytes(8, "little"))
        sparse.truncate(2**40)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_deep, "model_index.json cannot be read: it is nested too deeply"),
        (_huge, "transformer has no tensor blocks.6.attn1"),
        (_all_header, "the header of diffusion_pytorch_model.safetensors has 1099511627768 bytes"),
    ],
)
def test_a_folder_that_asks_for_more_than_it_has_is_refused(
    change: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    """In one sentence, with little more memory than the libraries of an engine take."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny-wan"], model)
    change(model)
    command = [sys.executable, "-m", "kinema", "serve", "--port", "0"]
    command += ["--data-dir", str(tmp_path), "--model", str(model)]
    with (tmp_path / "log").open("w+b") as log, subprocess.Popen(command, stderr=log) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = " ".join(log.read().decode().split())
    assert process.returncode == 2, said
    assert sentence in said
    assert "Traceback" not in said
    assert used.ru_maxrss * 1024 < 700e6
