"""The client, `kinema jobs`, `kinema bench` and docs/client.md against a real server."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from kinema.cli.app import app
from kinema.client import Client, CompletedEvent, ProgressEvent, VideoOptions
from tests.server_process import Server, start_server

DOCS = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
SMALL: VideoOptions = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2}
# Two seconds without work: the fake engine's word for 0.2 s a step.
SLOW = "a red circle [slow]"
LONG: VideoOptions = {"size": "64x64", "num_frames": 5, "num_inference_steps": 10}

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("fake"), "--engine", "fake", "--model", "fake")
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def kinema(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINEMA_CLIENT_URL", server.url)
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    signal.signal(signal.SIGTERM, before)


def test_events_outlive_the_server(tmp_path: Path) -> None:
    """kill -9 while a video is followed: once the server is there again the events go on, each once, to the end."""
    arguments = ("--engine", "fake", "--model", "fake")
    first = start_server(tmp_path, *arguments)
    second = None
    try:
        with Client(first.url) as client:
            seen = []
            for event in client.events(client.create(SLOW, **LONG)):
                seen.append(event)
                if second is None and isinstance(event, ProgressEvent):
                    first.stop(signal.SIGKILL)
                    second = start_server(tmp_path, *arguments, "--port", first.url.rpartition(":")[2])
    finally:
        for server in (first, second):
            if server is not None:
                server.stop()
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert isinstance(seen[-1], CompletedEvent)
    assert [event.attempt for event in seen if event.type == "started"] == [1, 2]


def test_a_video_is_found_by_the_end_of_its_id(kinema: Run, client: Client) -> None:
    """As list shows it; what fits none is an error."""
    made = client.wait(client.create("a red circle", **SMALL))
    assert kinema("jobs", "list", "-n", "1").stdout.startswith(f"{made.id}\tcompleted\t100\tfake\t64x64\t")
    shown = kinema("jobs", "show", made.id[-8:])
    assert shown.stdout.startswith(f"id\t{made.id}\nstatus\tcompleted\n")
    missing = kinema("jobs", "show", "nothing")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "no ids end in 'nothing' among the newest 1,000 videos" in missing.stderr


FLAGS = ("--size", "64x64", "--num-frames", "6", "--steps", "2", "--guidance-scale", "3", "--seed", "7")


def test_create_prints_the_id(kinema: Run, client: Client) -> None:
    """The flags are those of generate, what was adjusted is said, and the command does not wait."""
    asked = ("--negative-prompt", "blur", "--priority", "low", "--preview-every", "1")
    created = kinema("jobs", "create", "a red circle", *FLAGS, *asked)
    assert created.exit_code == 0, created.stderr
    made = client.get(created.stdout.strip())
    assert (made.prompt, made.size, made.num_frames, made.num_inference_steps) == ("a red circle", "64x64", 5, 2)
    assert (made.guidance_scale, made.seed, made.negative_prompt) == (3, 7, "blur")
    assert (made.priority, made.preview_every) == ("low", 1)
    assert "note: --num-frames 6 -> 5" in created.stderr
    assert f"kinema jobs watch {made.id} follows it" in created.stderr
    assert kinema("jobs", "create", "x", "--num-inference-steps", "0").stderr.startswith("error: --steps must be")


def test_create_waits_and_saves(kinema: Run, client: Client, tmp_path: Path) -> None:
    """With --output the path is printed in place of the id, and the exit code says whether there is a video."""
    saved = kinema("jobs", "create", "a red circle", *FLAGS, "-o", "made/one.mp4")
    assert (saved.exit_code, saved.stdout) == (0, f"{tmp_path}/made/one.mp4\n"), saved.stderr
    newest = next(client.list())
    assert (tmp_path / "made" / "one.mp4").read_bytes() == client.download(newest)
    waited = kinema("jobs", "create", "a red circle", *FLAGS, "--wait")
    assert waited.exit_code == 0
    assert client.get(waited.stdout.strip()).status == "completed"
    failed = kinema("jobs", "create", "a red circle [fail]", *FLAGS, "-o", "two.mp4")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "failed: " in failed.stderr
    assert not (tmp_path / "two.mp4").exists()


def test_create_takes_an_image_or_a_video(kinema: Run, client: Client, tmp_path: Path) -> None:
    """A first frame, or a film to edit; not both."""
    Image.new("RGB", (100, 80), (10, 200, 10)).save(tmp_path / "first.png")
    moved = kinema("jobs", "create", "it moves", *FLAGS, "--image", "first.png", "-o", "moved.mp4")
    assert moved.exit_code == 0, moved.stderr
    assert "--image 100x80 was scaled and cropped to 64x64" in moved.stderr
    edited = kinema("jobs", "create", "a dog", "--steps", "4", "--video", "moved.mp4", "--strength", "0.5", "--wait")
    assert edited.exit_code == 0, edited.stderr
    assert client.get(edited.stdout.strip()).num_frames == 5
    pictures = ["--image", "first.png", "--last-frame", "first.png"]
    framed = kinema("jobs", "create", "it moves", *FLAGS, *pictures, "-o", "framed.mp4")
    assert framed.exit_code == 0, framed.stderr
    assert "--last-frame 100x80 was scaled and cropped to 64x64" in framed.stderr
    both = kinema("jobs", "create", "x", "--image", "first.png", "--video", "moved.mp4")
    assert "error: --image and --video exclude each other" in both.stderr
    absent = kinema("jobs", "create", "x", "--image", "absent.png")
    assert (
        absent.stderr
        == "error: --image absent.png: No such file or directory; give a PNG, JPEG, WebP, AVIF, GIF or HEIC file\n"
    )


def test_create_checks_the_output_before_it_asks(kinema: Run, client: Client) -> None:
    """No video is made that cannot be saved."""
    newest = [video.id for video in islice(client.list(), 1)]
    for path in ("/proc/y.mp4", "/proc/x/y.mp4"):
        refused = kinema("jobs", "create", "a red circle", *FLAGS, "-o", path)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert f"--output {path} cannot be written" in refused.stderr
    assert [video.id for video in islice(client.list(), 1)] == newest


def test_watch_ends_as_the_video_does(kinema: Run, client: Client) -> None:
    """0 for a completed one, 1 for a cancelled one."""
    made = client.create("a red circle", **SMALL)
    watched = kinema("jobs", "watch", made.id)
    assert watched.exit_code == 0
    assert "completed" in watched.stderr
    stopped = client.create(SLOW, **LONG)
    assert kinema("jobs", "cancel", stopped.id).stdout == f"{stopped.id} cancelled\n"
    watched = kinema("jobs", "watch", stopped.id)
    assert watched.exit_code == 1
    assert "cancelled" in watched.stderr


def test_events_are_json_lines(kinema: Run, client: Client) -> None:
    """The last one has the video."""
    made = client.create("a red circle", **SMALL)
    lines = [json.loads(line) for line in kinema("jobs", "events", made.id).stdout.splitlines()]
    assert [line["type"] for line in lines][:2] == ["queued", "started"]
    assert lines[-1]["video"]["id"] == made.id


def test_download_saves_under_the_videos_name(kinema: Run, client: Client, tmp_path: Path) -> None:
    """Or where it is told to; a video that is not there leaves no file."""
    made = client.wait(client.create("a red circle", **SMALL))
    assert kinema("jobs", "download", made.id).stdout == f"{tmp_path / made.id}.mp4\n"
    assert (tmp_path / f"{made.id}.mp4").read_bytes() == client.download(made)
    manifest = kinema("jobs", "download", made.id, "--variant", "manifest").stdout.strip()
    assert manifest == f"{tmp_path / made.id}.json"
    assert json.loads(Path(manifest).read_bytes())["id"] == made.id
    assert kinema("jobs", "download", made.id, "--variant", "thumbnail").stdout == f"{tmp_path / made.id}.webp\n"
    failed = kinema("jobs", "download", made.id, "-o", "/proc/x/y.mp4")
    assert failed.exit_code == 1
    assert "--output /proc/x/y.mp4 cannot be written" in failed.stderr
    assert kinema("jobs", "download", "video_" + "0" * 32, "-o", "none.mp4").exit_code == 1
    assert not (tmp_path / "none.mp4").exists()


def test_one_id_that_fails_does_not_keep_the_others(kinema: Run, client: Client) -> None:
    """They are deleted, and the exit code says that one was not."""
    first, second = (client.create("a red circle", **SMALL) for _ in range(2))
    deleted = kinema("jobs", "delete", first.id, "video_" + "0" * 32, second.id)
    assert deleted.stdout == f"{first.id} deleted\n{second.id} deleted\n"
    assert deleted.exit_code == 1
    assert "error: no video" in deleted.stderr


def test_videos_get_stars_and_lose_them(kinema: Run, client: Client) -> None:
    """What is shown of a video says so."""
    made = client.create("a red circle", **SMALL)
    assert kinema("jobs", "star", made.id).stdout == f"{made.id} starred\n"
    assert client.get(made).starred
    assert "while it has its star" in kinema("jobs", "show", made.id).stdout
    assert kinema("jobs", "star", made.id, "--remove").stdout == f"{made.id} not starred\n"
    assert not client.get(made).starred


def test_no_server_says_what_to_do(kinema: Run) -> None:
    """In one line."""
    refused = kinema("jobs", "list", "--url", "http://127.0.0.1:9")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "error: no server answers at http://127.0.0.1:9; is `kinema serve` running? --url gives its address\n"
    )


def test_the_service_is_measured(kinema: Run) -> None:
    """On a server of its own, in a few requests."""
    few = ("--runs", "1", "--submissions", "4", "--polls", "10", "--calls", "2", "--concurrency", "2")
    measured = kinema("bench", "api", "--json", *few)
    assert measured.exit_code == 0, measured.stderr
    report = json.loads(measured.stdout)
    assert report["poll"]["per_s"] > 0
    assert 0 < report["overhead_p50_ms"] < report["call"]["p50_ms"]
    assert "synchronous calls" in kinema("bench", "api", *few).stdout


def test_a_call_is_measured_part_by_part(kinema: Run, tmp_path: Path) -> None:
    """On a server of its own; the parts are the whole, and nothing was done before the request came."""
    path = tmp_path / "report.json"
    few = ("--model", "fake", "--size", "64x64", "--frames", "1", "--frames", "5", "--steps", "4", "--guidance", "1")
    measured = kinema("bench", "call", *few, "--runs", "1", "--base64", "--output", str(path))
    assert measured.exit_code == 0, measured.stderr
    assert "request to answer" in measured.stdout
    calls = json.loads(path.read_text())["calls"]
    assert list(calls) == ["1 frames", "5 frames"]
    for call in calls.values():
        assert min(call.values()) > -0.002  # the answer's times are in whole milliseconds
        assert sum(call.values()) == pytest.approx(2 * call["whole_s"])
    refused = kinema("bench", "call", *few, "--url", "http://127.0.0.1:9")
    assert refused.exit_code == 1
    assert "the service did not answer" in refused.stderr


def test_a_server_that_cannot_start_is_not_measured(kinema: Run) -> None:
    """Its own words say why."""
    refused = kinema("bench", "api", "--database", "nonsense")
    assert refused.exit_code == 1
    assert "the service to measure did not start" in refused.stderr
    assert "jobs.database_url is not a SQLAlchemy URL" in refused.stderr


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL))
def test_the_examples_of_the_docs_run(example: str, server: Server, kinema: Run) -> None:
    """As they stand, but for the address."""
    exec(compile(example.replace("http://127.0.0.1:8000", server.url), "docs/client.md", "exec"), {"__name__": "docs"})


def test_the_commands_of_the_docs_run(kinema: Run, client: Client) -> None:
    """As they stand, but for the id."""
    made = client.wait(client.create("a red circle", **SMALL))
    block = re.search(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        command = shlex.split(line.replace("ID", made.id))
        assert command[0] == "kinema"
        assert kinema(*command[1:]).exit_code == 0, line
