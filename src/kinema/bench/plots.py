"""The plots of the pages: two of docs/scheduling.md, from the simulator, and as recorded one each of docs/memory.md and
docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kinema.bench.recorded import REPORTS
from kinema.bench.report import summarize
from kinema.bench.simulate import SimulatedVideo, Simulation
from kinema.bench.svg import COLOURS, Bar, Line, device_chart, line_chart
from kinema.errors import ConfigError
from kinema.worker.scheduler import Policy

_STORE_CALLS = {"list": "list", "get": "get", "claim and give back": "claim", "estimate": "estimate"}
_COLOURS = {"short": COLOURS[1], "long": COLOURS[0]}


def make_plots_folder(folder: Path) -> None:
    """Make the folder of ``--plots``. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--plots {folder}: {exc.strerror}; give a folder that can be written to") from exc


def draw_device(folder: Path, policies: Sequence[Policy], videos: Sequence[SimulatedVideo]) -> Path:
    """Who had the device while short videos arrived behind a long one, under each policy."""
    rows: dict[str, list[Bar]] = {}
    for policy in policies:
        simulation = Simulation(policy)
        simulation.run(videos)
        rows[policy] = [Bar(span.start_s, span.end_s, _COLOURS[videos[span.number].name]) for span in simulation.spans]
    asked = ", ".join(f"{video.at_s:g}" for video in videos if video.name == "short")
    owners = {f"short, asked for at {asked} s": _COLOURS["short"], "long, asked for at 0 s": _COLOURS["long"]}
    return _write(folder / "device.svg", device_chart("Who has the device", rows, owners))


def draw_slowdown(
    folder: Path,
    policies: Sequence[Policy],
    streams: Mapping[float, Sequence[SimulatedVideo]],
    slo: float,
    max_active: int,
) -> Path:
    """The 95th percentile of the slowdown by load, for each class and policy; ``streams`` has the videos by load."""
    lines: dict[tuple[str, Policy], list[tuple[float, float]]] = {}
    for load, videos in streams.items():
        for policy in policies:
            for name, found in summarize(Simulation(policy, max_active).run(videos), slo).classes.items():
                lines.setdefault((name, policy), []).append((load, found.slowdown_p95))
    drawn = [
        Line(f"{name}, {policy}", points, _COLOURS.get(name, COLOURS[2]), is_dashed=policy != policies[0])
        for (name, policy), points in lines.items()
    ]
    title = "Times as slow as alone: 95 of 100 videos are at most so slow"
    return _write(folder / "slowdown.svg", line_chart(title, "load of the device", "slowdown", drawn))


def draw_memory(folder: Path) -> Path:
    """How long a video takes by the memory that the engine may use, as ``reports/memory.json`` has it."""
    rows = {
        f"{report['model'].removeprefix('Wan 2.1 ')}, {limit_of(report)}": [
            Bar(0, report["denoise_s"], COLOURS[0]),
            Bar(report["denoise_s"], report["whole_s"], COLOURS[1]),
        ]
        for report in json.loads((REPORTS / "memory.json").read_text(encoding="utf-8"))
    }
    owners = {"steps": COLOURS[0], "prompt, decode and file": COLOURS[1]}
    title = "A video of 832x480, 81 frames, by the memory that the engine may take"
    return _write(folder / "cards.svg", device_chart(title, rows, owners))


def draw_store(folder: Path) -> Path:
    """What calls of the job database cost by the number of finished jobs, as ``reports/store.json`` has it."""
    recorded = json.loads((REPORTS / "store.json").read_text(encoding="utf-8"))
    drawn = [
        Line(
            f"{label}, {database}",
            [(int(count), calls[call]) for count, calls in report["calls_ms"].items()],
            colour,
            is_dashed=database != "SQLite",
        )
        for database, report in recorded.items()
        for (call, label), colour in zip(_STORE_CALLS.items(), COLOURS, strict=True)
    ]
    chart = line_chart(
        "A call by the number of finished jobs", "finished jobs", "ms", drawn, bottom=0.1, is_x_counted=True
    )
    return _write(folder / "store.svg", chart)


def limit_of(report: Mapping[str, Any]) -> str:
    """The limit of a recorded run, for people."""
    return "no limit" if report["limit_gb"] is None else f"{report['limit_gb']} GB"


def _write(path: Path, drawing: str) -> Path:
    path.write_text(drawing, encoding="utf-8")
    return path
