"""``kinema bench start``: what a server waits for from its first line of code to ready, stage by stage.

The model is a folder, or a published architecture with random weights that are written to one: bfloat16 with the VAE in
float32. The first start has a data folder without compiled kernels; the later ones find what it left. Weights that
were just written are in the page cache, so no start waits for a disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
from rich.table import Table

from kinema.bench.server import NotStarted, stop
from kinema.bench.wan.subject import write_architecture
from kinema.shell import err, out

# How often the log and the port are looked at.
_POLL_S = 0.01
_WEIGHTS = dict.fromkeys(("text_encoder", "image_encoder"), "model.safetensors")
_OTHER_WEIGHTS = "diffusion_pytorch_model.safetensors"
# For the imports of a process that writes, which the server must not find done.
_WRITE = "import sys; from kinema.bench.wan.start import write_weights; write_weights(sys.argv[1], sys.argv[2])"


@dataclass(frozen=True)
class Start:
    """One start: seconds from the beginning of the process until the port answers and until the server is ready, and
    the seconds of each stage. ``notes`` are the engine's own lines about its stages."""

    port_s: float
    ready_s: float
    stages: dict[str, float]
    notes: list[str]


def measure_start(architecture: str | None, model: str, runs: int, output: Path | None, *, is_json: bool) -> None:
    """Start a server once with nothing compiled, then ``runs`` times, and print what that took. Raises KinemaError."""
    with TemporaryDirectory(prefix="kinema-bench-") as name:
        folder = Path(name)
        if architecture is not None:
            with err.status("writing random weights"):
                model = str(write_random(architecture, folder / architecture))
        with err.status("starting servers"):
            starts = [_start(model, folder, folder / f"serve-{number}.log") for number in range(runs + 1)]
    text = json.dumps({"model": architecture or model, "starts": [asdict(start) for start in starts]}, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    out.print_json(text) if is_json else out.print(_table(starts))


def write_random(architecture: str, folder: Path) -> Path:
    """Make a folder with the architecture's configs and random weights, and return it.

    Raises ConfigError for an unknown name.
    """
    folder.mkdir()
    write_architecture(architecture, folder)
    subprocess.run([sys.executable, "-c", _WRITE, architecture, str(folder)], check=True)  # noqa: S603 - our own words
    return folder


def write_weights(architecture: str, path: str) -> None:
    """Write random weights for the configs in this folder, in diffusers' layout."""
    import torch  # noqa: PLC0415 - loaded by the process that writes, and by no other

    from kinema.bench.wan.random_weights import fill  # noqa: PLC0415 - loads torch
    from kinema.engines.wan.checkpoint import read_configs  # noqa: PLC0415 - for those above
    from kinema.engines.wan.empty_weights import (  # noqa: PLC0415 - loads torch
        EmptyWeights,
        empty_image_encoder,
        empty_text_encoder,
        empty_transformers,
        empty_vae,
    )
    from kinema.engines.wan.tensors import write_tensors  # noqa: PLC0415 - loads torch

    checkpoint = read_configs(architecture, Path(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(empty: EmptyWeights) -> None:
        fill(empty, device)
        file = checkpoint.path / empty.component / _WEIGHTS.get(empty.component, _OTHER_WEIGHTS)
        write_tensors(file, empty.targets, {})

    write(empty_text_encoder(checkpoint, device, torch.bfloat16))
    if (image_encoder := empty_image_encoder(checkpoint, device, torch.bfloat16)) is not None:
        write(image_encoder)
    for transformer in empty_transformers(checkpoint, device, torch.bfloat16):
        write(transformer)
    write(empty_vae(checkpoint, device))


def _start(model: str, folder: Path, log: Path) -> Start:
    """Start a server on this model, and stop it when it is ready. Raises NotStarted."""
    with _serving(model, folder, log) as process, log.open(encoding="utf-8") as lines, httpx.Client() as client:
        watch = _Watch(process, client)
        while watch.ready_s is None:
            watch.look(lines.readline())
        return watch.result()


@contextmanager
def _serving(model: str, folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "kinema", "serve", "--model", model, "--port", "0"]
    command += ["--data-dir", str(folder / "data")]
    # Kernels that Triton has compiled elsewhere would make a first start a later one.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
    environment |= {"KINEMA_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder)  # noqa: S603 - our own
    try:
        yield process
    finally:
        stop(process)


class _Watch:
    """Reads a server's log from the beginning of its process on, and asks its port whether it answers."""

    def __init__(self, process: subprocess.Popen[bytes], client: httpx.Client) -> None:
        self._process = process
        self._client = client
        self._began = time.perf_counter()
        self._url: str | None = None
        self._port_s: float | None = None
        self._marks: list[tuple[str, float]] = [("process", 0.0)]
        self._notes: list[str] = []
        self._last_line = ""
        self.ready_s: float | None = None

    def look(self, line: str) -> None:
        """Take the next line of the log, or wait a moment when there is none. Raises NotStarted when it has ended."""
        if line:
            self._read(line)
        elif self._process.poll() is not None:
            raise NotStarted(f"the service to measure did not start: {self._last_line}")
        else:
            time.sleep(_POLL_S)
        if self._url is not None and self._port_s is None and self._answers(self._url):
            self._port_s = self._now()

    def result(self) -> Start:
        """What was seen. It is complete once ``ready_s`` is known."""
        assert self.ready_s is not None
        ends = [at for _, at in self._marks[1:]] + [self.ready_s]
        stages: dict[str, float] = {}
        for (stage, began), end in zip(self._marks, ends, strict=True):
            stages[stage] = round(stages.get(stage, 0.0) + end - began, 3)
        port_s = self.ready_s if self._port_s is None else self._port_s
        return Start(round(port_s, 3), round(self.ready_s, 3), stages, self._notes)

    def _read(self, line: str) -> None:
        self._last_line = line.strip()
        try:
            record: Mapping[str, object] = json.loads(line)
        except ValueError:
            return
        event = str(record.get("event", ""))
        if event == "listening":
            self._url = str(record["url"])
        elif event == "starting":
            self._marks.append((str(record["stage"]), self._now()))
        elif event == "ready":
            self.ready_s = self._now()
        elif event.startswith("start: "):
            self._notes.append(event)

    def _answers(self, url: str) -> bool:
        try:
            return self._client.get(f"{url}/live").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _now(self) -> float:
        return time.perf_counter() - self._began


def _table(starts: list[Start]) -> Table:
    """The first start beside the medians of the others."""
    first, *later = starts
    table = Table("seconds", "first start", f"later, median of {len(later)}")
    for name in ("port_s", "ready_s"):
        label = {"port_s": "the port answers", "ready_s": "ready"}[name]
        table.add_row(label, f"{getattr(first, name):.2f}", f"{median(getattr(one, name) for one in later):.2f}")
    for stage, seconds in first.stages.items():
        others = median(one.stages.get(stage, 0.0) for one in later)
        table.add_row(f"  {stage}", f"{seconds:.2f}", f"{others:.2f}")
    return table
