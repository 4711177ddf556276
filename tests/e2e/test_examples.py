"""The scripts under examples/ do what they print, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.etcd import running_etcd
from tests.postgres import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples/launch"
# On two idle cores the cluster stands after 20 s; machines that test are not idle.
_PATIENCE_S = 240


@dataclass
class Script:
    """A running example: what it has printed so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read_until(self, ending: str) -> str:
        """All that it has printed, once a line begins so. Fails when the script ends before."""
        assert self.process.stdout is not None
        # A script that hangs is killed, which ends the reading.
        watchdog = threading.Timer(_PATIENCE_S, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line)
                if line.startswith(ending):
                    return "".join(self.lines)
        finally:
            watchdog.cancel()
        pytest.fail(f"the script ended:\n{''.join(self.lines)}")

    def end(self, with_signal: signal.Signals) -> int:
        self.process.send_signal(with_signal)
        code = self.process.wait(_PATIENCE_S)
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)
        return code


@contextmanager
def launched(name: str, *arguments: str, folder: Path, launch: Path = LAUNCH, **environment: str) -> Iterator[Script]:
    """The script in a folder of its own, with kinema on its PATH, as after `pip install`."""
    process = subprocess.Popen(
        [launch / name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=surroundings(folder) | environment,
        # A shell that starts the tests in the background has interrupts ignored, and a script could not undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here hold locks
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield Script(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(_PATIENCE_S)


@pytest.fixture
def launch(tmp_path: Path, forked_kinema: list[str]) -> Path:
    """A copy of the scripts in a checkout whose kinema is forked, for tests of the scripts rather than of its start."""
    write_kinema(tmp_path, f'exec {shlex.join(forked_kinema)} "$@"')
    return shutil.copytree(LAUNCH, tmp_path / "examples/launch")


def write_kinema(checkout: Path, script: str) -> None:
    stand_in = checkout / ".venv/bin/kinema"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)


def surroundings(folder: Path) -> dict[str, str]:
    """Without settings of whoever runs the tests; temporary files in that folder, by which processes are told apart."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("KINEMA_", "ETCD_", "DYN_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # PostgreSQL's account must be able to reach its folder.
    for part in (folder, *folder.parents):
        if part == Path(tempfile.gettempdir()):
            break
        part.chmod(part.stat().st_mode | 0o011)
    return clean | {"PATH": path, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}


def processes_of(folder: Path) -> list[str]:
    """The command lines of all processes that have the folder in their environment: children of a script above."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def make_video(printed: str) -> dict[str, object]:
    """The answer to the printed curl line, as a shell runs it, but for a short video: the README's line makes one of
    the model's own length."""
    line = re.search(r"^ *(curl .*\\\n.*-d '(.*)')$", printed, re.MULTILINE)
    assert line is not None, printed
    command, body = line.groups()
    short = json.dumps(json.loads(body) | {"num_frames": 9, "num_inference_steps": 2})
    command = command.replace(body, short)
    made = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    answer: dict[str, object] = json.loads(made.stdout)
    assert answer["status"] == "completed", answer
    return answer


def content_of(answer: dict[str, object], url: str) -> bytes:
    return httpx.get(f"{url}/v1/videos/{answer['id']}/content").raise_for_status().content


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("postgres")  # skips where it is not installed
def test_the_local_cluster_makes_the_video_that_it_prints(tmp_path: Path, launch: Path) -> None:
    """Either frontend gives the file; a killed worker is reported and missed by nobody; the end leaves nothing."""
    with launched("local-cluster.sh", "--port", "0", folder=tmp_path, launch=launch) as script:
        printed = script.read_until("Ctrl-C")
        urls = re.findall(r"frontend \d +(\S+)", printed)
        workers = [int(pid) for pid in re.findall(r"worker \d .* pid (\d+)", printed)]
        assert (len(urls), len(workers)) == (2, 3)
        os.kill(workers[0], signal.SIGKILL)
        script.read_until(f"worker-1 (pid {workers[0]}) has ended with code 137")
        answer = make_video(printed)
        films = {content_of(answer, url) for url in urls}
        assert len(films) == 1
        assert script.end(signal.SIGINT) == 130
    assert script.lines[-1] == "stopping\n"
    assert processes_of(tmp_path) == []
    assert list(tmp_path.glob("kinema*")) == []


def test_a_process_that_ended_before_the_script_waited_is_reported(tmp_path: Path) -> None:
    """Bash has then forgotten that it was killed."""
    script = tmp_path / "script.sh"
    script.write_text(
        f"set -euo pipefail; . {LAUNCH}/processes.sh\n"
        "start one sleep 60; one=$pid\n"
        "start other sleep 60\n"
        "kill -KILL $one\n"
        "while kill -0 $one 2>/dev/null; do :; done\n"
        "report_end\n"
        "kill $pid\n"
        "report_end\n"
    )
    ended = subprocess.run(
        ["bash", script], capture_output=True, text=True, env=surroundings(tmp_path), timeout=_PATIENCE_S, check=True
    )
    reports = re.findall(r"^(\w+) \(pid \d+\) has ended with code (\d+)", ended.stdout, re.MULTILINE)
    assert reports == [("one", "137"), ("other", "143")]
    assert processes_of(tmp_path) == []


@pytest.mark.timeout(600)
def test_t2v_makes_the_video_that_it_prints(tmp_path: Path) -> None:
    """With the bundled model and an etcd of its own; the data folder stays, and nothing else."""
    etcd = f"http://127.0.0.1:{free_port()}"
    with launched("t2v.sh", "--wan-size", "tiny", "--port", "0", folder=tmp_path, ETCD_ENDPOINTS=etcd) as script:
        printed = script.read_until("Ctrl-C")
        assert f"starting etcd at {etcd}\n" in printed
        answer = make_video(printed)
        assert answer["model"] == "tiny-wan"
        assert script.end(signal.SIGTERM) == 143
    assert processes_of(tmp_path) == []
    assert [path.name for path in tmp_path.glob("kinema*")] == ["kinema-data"]
    (film,) = (tmp_path / "kinema-data/files").rglob("*.mp4")
    assert str(answer["id"]) in str(film)


def test_t2v_takes_the_etcd_that_answers(tmp_path: Path, launch: Path) -> None:
    """Of several addresses too."""
    with running_etcd() as etcd:
        endpoints = f"http://127.0.0.1:{free_port()},{etcd.url}"
        arguments = ("--wan-size", "tiny")
        with launched("t2v.sh", *arguments, folder=tmp_path, launch=launch, ETCD_ENDPOINTS=endpoints) as script:
            script.read_until(f"etcd answers at {etcd.url}")
            assert script.end(signal.SIGINT) == 130
        assert processes_of(tmp_path) == []


def test_an_interrupt_at_any_moment_ends_everything(tmp_path: Path) -> None:
    """A copy of the script in a checkout whose kinema only sleeps, interrupted up to 4 ms after it found its etcd."""
    launch = shutil.copytree(LAUNCH, tmp_path / "examples/launch")
    write_kinema(tmp_path, "exec sleep 60")
    with running_etcd() as etcd:
        for attempt in range(20):
            with launched("t2v.sh", folder=tmp_path, launch=launch, ETCD_ENDPOINTS=etcd.url) as script:
                script.read_until("etcd answers")
                time.sleep(attempt * 200e-6)
                assert script.end(signal.SIGINT) == 130
            assert processes_of(tmp_path) == []


def test_a_part_that_does_not_start_ends_the_script_with_its_reason(tmp_path: Path, launch: Path) -> None:
    """The end of that part's log, a sentence, and no process."""
    etcd = f"http://127.0.0.1:{free_port()}"
    arguments = ("--model", "./absent", "--port", "0")
    with launched("t2v.sh", *arguments, folder=tmp_path, launch=launch, ETCD_ENDPOINTS=etcd) as script:
        printed = script.read_until("t2v.sh: worker did not start")
        assert "no such folder" in printed
        assert script.process.wait(_PATIENCE_S) == 1
    assert processes_of(tmp_path) == []


def test_t2v_starts_the_engine_that_is_asked_for(tmp_path: Path, launch: Path) -> None:
    """SGLang with 14b on two GPUs, or as many as are said; here its package is missing, and the worker says so."""
    etcd = f"http://127.0.0.1:{free_port()}"
    arguments = ("--wan-size", "14b", "--engine", "sglang", "--port", "0")
    with launched("t2v.sh", *arguments, folder=tmp_path, launch=launch, ETCD_ENDPOINTS=etcd) as script:
        printed = script.read_until("t2v.sh: worker did not start")
        assert "SGLang spreads each layer over 2 GPUs\n" in printed
        assert "the package sglang is missing; pip install 'kinema[sglang]'" in printed
        assert script.process.wait(_PATIENCE_S) == 1
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "arguments", "code", "sentence"),
    [
        ("t2v.sh", ["--wan-size", "3b"], 2, "--wan-size 3b: must be 1b, 14b or tiny"),
        ("t2v.sh", ["--wan-size"], 2, "--wan-size needs a value"),
        ("t2v.sh", ["--fast"], 2, "--fast is not an option; accepted are --wan-size, --model"),
        ("t2v.sh", ["--engine", "vllm"], 2, "--engine vllm: must be wan, sglang or fake"),
        ("t2v.sh", ["--port", "http"], 2, "--port http: must be a number from 0 to 65535"),
        ("local-cluster.sh", ["--port", "65535"], 2, "--port 65535: must be a number from 0 to 65534"),
        ("local-cluster.sh", ["--workers", "9"], 2, "--workers is not an option; accepted are --port"),
        ("t2v.sh", ["--wan-size", "tiny"], 1, "no etcd answers at ETCD_ENDPOINTS=http://127.0.0.2:1"),
        ("t2v.sh", ["--help"], 0, "--wan-size SIZE"),
        ("local-cluster.sh", ["--help"], 0, "two frontends and three workers"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    name: str, arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    """Exit code 2 for an option that cannot be, and nothing is started."""
    environment = surroundings(tmp_path) | {"ETCD_ENDPOINTS": "http://127.0.0.2:1"}
    ended = subprocess.run(
        [LAUNCH / name, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert ended.returncode == code, ended.stderr
    said = ended.stderr if code else ended.stdout
    assert sentence in said
    assert (code == 0) == (len(said.splitlines()) > 1)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["kinema-data"])
