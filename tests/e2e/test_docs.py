"""What the README and docs/ (api, engines, webhooks) show runs as it is written, against one service."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from kinema.cli.app import app
from tests.postgres import free_port
from tests.server_process import Server, start_server

DOCS = Path(__file__).parents[2] / "docs"
URL, RECEIVER = "http://127.0.0.1:8000", "http://127.0.0.1:9000"
# What two answers to the same request may differ in.
OWN = {"id", "created", "created_at", "queue_position", "eta_s"}
_PATIENCE_S = 60


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


RECEIVER_PROGRAM, ENDPOINT_PROGRAM = blocks("webhooks.md", "python")
RECEIVER_COMMAND, SERVICE_COMMAND = blocks("webhooks.md", "sh")
(SECRET,) = re.findall(r"WEBHOOK_SECRET=(\S+)", RECEIVER_COMMAND)


@pytest.fixture(scope="module")
def receiver_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, receiver_port: int) -> Iterator[Server]:
    """The service of docs/webhooks.md with its settings, and the fake engine."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in re.findall(r"(KINEMA_\w+)=(\S+)", SERVICE_COMMAND):
            environment.setenv(name, value.replace(RECEIVER, f"http://127.0.0.1:{receiver_port}"))
        server = start_server(tmp_path_factory.mktemp("docs"), "--engine", "fake")
    yield server
    server.stop()


def as_written(text: str, server: Server, video_id: str = "", receiver_port: int = 9000) -> str:
    """The text with this service's addresses, and with an id in place of VIDEO_ID."""
    text = text.replace(URL, server.url).replace(RECEIVER, f"http://127.0.0.1:{receiver_port}")
    return text.replace("port=9000", f"port={receiver_port}").replace("VIDEO_ID", video_id)


@contextmanager
def run(program: str, page: str) -> Iterator[dict[str, Any]]:
    """Run a program that uses the OpenAI SDK, and give its names; a program that ends closes its client."""
    made: dict[str, Any] = {}
    try:
        exec(compile(program, page, "exec"), made)
        yield made
    finally:
        if "client" in made:
            made["client"].close()


Shell = Callable[..., str]


@pytest.fixture
def shell(server: Server, tmp_path: Path) -> Shell:
    """Runs a block in a folder of its own and gives what it prints."""

    def run(block: str, video_id: str = "") -> str:
        script = ["bash", "-euc", as_written(block, server, video_id)]
        ended = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=_PATIENCE_S, check=True)
        return ended.stdout

    return run


def answers(printed: str) -> list[dict[str, Any]]:
    """The JSON objects that several curl commands print one after the other."""
    found, decoder = [], json.JSONDecoder()
    while printed := printed.lstrip():
        answer, end = decoder.raw_decode(printed)
        found.append(answer)
        printed = printed[end:]
    return found


def test_a_video_from_the_request_to_the_file(shell: Shell, tmp_path: Path) -> None:
    """Each command of docs/api.md in its order; the answers have what the page shows."""
    create, follow, first_frame, edit, extend, webm, live = blocks("api.md", "sh")
    shown, shown_later, _ = map(json.loads, blocks("api.md", "json"))

    (created,) = answers(shell(create))
    assert created.keys() == shown.keys()
    assert {name: created[name] for name in shown.keys() - OWN} == {name: shown[name] for name in shown.keys() - OWN}

    events, _, video = shell(follow, created["id"]).rpartition("\n\n")
    (shown_event,) = blocks("api.md", "")
    assert fields_of(shown_event) in [fields_of(event) for event in events.split("\n\n")]
    (finished,) = answers(video)
    changed = {name for name in finished if finished[name] != created[name]}
    # Both may be null at once: before the first video of a service, and where a worker has a free place.
    assert changed | {"queue_position", "eta_s"} == shown_later.keys()
    assert (finished["status"], finished["data"][0].keys()) == ("completed", shown_later["data"][0].keys())
    assert finished["timings"].keys() == shown_later["timings"].keys()
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"

    # A player needs a screen; what it is given is saved instead.
    shell(live.replace("| ffplay -", "-o live.mp4").strip(), created["id"])
    assert (tmp_path / "live.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()

    (moved,) = answers(shell(first_frame, created["id"]))
    edited = answers(shell(edit, created["id"]))
    (extended,) = answers(shell(extend, created["id"]))
    assert [video["status"] for video in (moved, *edited, extended)] == ["queued"] * 4
    assert [video["strength"] for video in edited] == [0.6, 0.6]
    assert [video["output_format"] for video in answers(shell(webm))] == ["webm"]
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert f"`num_frames` ({extended['num_frames']})" in page
    assert f"`seconds` ({extended['seconds']})" in page.replace("\n", " ")


def fields_of(event: str) -> tuple[list[str], dict[str, Any]]:
    """A server-sent event: its first lines, and its data without the id of the video."""
    *lines, data = event.strip().splitlines()
    fields = json.loads(data.removeprefix("data: "))
    return lines, {name: value for name, value in fields.items() if name != "id"}


def test_the_programs_for_the_openai_sdk_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video, its edit and its extension; and the line that silences the SDK names its message."""
    monkeypatch.chdir(tmp_path)
    program, silence = blocks("api.md", "python")
    with run(as_written(program, server), "docs/api.md") as made:
        assert (tmp_path / "circle.mp4").read_bytes()[4:8] == b"ftyp"
        assert [made[name].status for name in ("blue", "longer", "same")] == ["queued"] * 3
        with pytest.warns(DeprecationWarning, match="The Sora API is scheduled to permanently shut down"):
            made["client"].videos.retrieve(made["video"].id)
        with warnings.catch_warnings(action="error"), run(silence, "docs/api.md"):
            made["client"].videos.retrieve(made["video"].id)


def test_the_program_of_the_readme_runs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves a video."""
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("../README.md", "python")
    with run(as_written(program, server), "README.md"):
        assert (tmp_path / "heart.mp4").read_bytes()[4:8] == b"ftyp"


def test_the_generate_commands_of_the_readme_find_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a prompt, a picture of the checkout and the video before, by the fake engine; it has no tiers, so that one
    is made by the bundled model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)
    lines = [line for block in blocks("../README.md", "bash") for line in block.splitlines()]
    made = [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/kinema generate ")]
    assert len(made) == 4
    for arguments in made:
        ended = CliRunner().invoke(app, [*arguments, *([] if "--tier" in arguments else ["--engine", "fake"])])
        assert ended.exit_code == 0, ended.output
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"star.mp4", "heart.mp4", "up.mp4", "blue.mp4"}


def test_a_word_in_the_prompt_of_the_fake_engine_has_its_effect(shell: Shell) -> None:
    """The command of docs/engines.md: a narrower video, and a warning."""
    (block,) = blocks("engines.md", "sh")
    (answer,) = answers(shell(block))
    assert answer["warnings"] == ["the video is 112 pixels wide, not 128"]


@pytest.fixture
def receiver(server: Server, receiver_port: int, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The whole receiver of docs/webhooks.md, as a program that listens."""
    program = tmp_path / "receiver.py"
    program.write_text(as_written(RECEIVER_PROGRAM, server, receiver_port=receiver_port), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, program.name],
        cwd=tmp_path,
        env={**os.environ, "WEBHOOK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(_PATIENCE_S, process.kill)
    watchdog.start()
    assert process.stdout is not None
    with process.stdout:
        try:
            read_until(process, "Uvicorn running")
            yield process
        finally:
            watchdog.cancel()
            process.terminate()
            process.wait(_PATIENCE_S)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read what the program prints up to a line that has the text. Fails when the program ends before."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return
    pytest.fail(f"the receiver ended:\n{''.join(printed)}")


def test_the_receiver_saves_a_finished_video(
    server: Server,
    receiver: subprocess.Popen[str],
    receiver_port: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A message with the right signature; one without any, and one with another endpoint's, are refused."""
    with server.client() as client:
        video = client.post("/v1/videos", json={"prompt": "a red circle"}).raise_for_status().json()
        read_until(receiver, f"saved {video['id']}.mp4")
        content = client.get(f"/v1/videos/{video['id']}/content").content
    assert (tmp_path / f"{video['id']}.mp4").read_bytes() == content
    assert httpx.post(f"http://127.0.0.1:{receiver_port}/kinema", json={}).status_code == 400

    with run(as_written(ENDPOINT_PROGRAM, server, receiver_port=receiver_port), "docs/webhooks.md") as made:
        made["client"].webhooks.delete(made["endpoint"].id)
    assert capsys.readouterr().out.endswith("\n400\n")
