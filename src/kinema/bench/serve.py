"""``kinema bench serve``: how long videos take when many are asked for.

An open-loop stream of short and long videos goes to a service, or through the simulator, which plays the same scheduler
with the costs of a device that need not be here. Reported by class: latency, slowdown against alone, how many met the
objective and how good the first ETA was; of the whole, throughput.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.table import Table

from kinema.bench.api import app
from kinema.bench.drawing import draw_device, draw_slowdown
from kinema.bench.h200 import h200_costs, simulated_request
from kinema.bench.live import LiveService
from kinema.bench.report import ClassReport, Outcome, RunReport, report_of
from kinema.bench.server import running_server
from kinema.bench.simulate import SimulatedVideo, Simulation
from kinema.bench.workload import Arrival, Body, VideoClass, poisson, read_trace
from kinema.errors import ConfigError
from kinema.hosting.process import make_folder
from kinema.request.json_text import parse_json
from kinema.shell import err, out, run
from kinema.worker.scheduler import POLICIES, Policy

__all__ = ["app"]

# Of Wan 2.1 1.3B on an H200: 5.6 s and 55 s.
_SIMULATED = ('{"num_frames": 17, "num_inference_steps": 40}', '{"num_frames": 81, "num_inference_steps": 50}')
# On the bundled model, and a tenth of the work: 0.5 s and 4 s on two CPU cores. Many short steps, as a GPU has them.
_LIVE = (
    '{"size": "96x96", "num_frames": 17, "num_inference_steps": 8}',
    '{"size": "96x96", "num_frames": 17, "num_inference_steps": 80}',
)
_BEHIND_AT_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What is asked for: the classes, and a trace or how many at which load."""

    classes: Sequence[VideoClass]
    trace: Sequence[Arrival] | None
    count: int
    load: float
    seed: int
    slo: float
    max_active: int

    @property
    def bodies(self) -> dict[str, Body]:
        """One of each class that is asked for."""
        if self.trace is not None:
            return {arrival.name: arrival.body for arrival in reversed(self.trace)}
        return {one.name: one.body for one in self.classes}

    def arrivals(self, alone_s: Mapping[str, float], load: float | None = None) -> Sequence[Arrival]:
        """The trace, or a stream that keeps the device busy for ``load`` of the time."""
        if self.trace is not None:
            return self.trace
        mean_s = sum(one.share * alone_s[one.name] for one in self.classes) / sum(one.share for one in self.classes)
        return poisson(self.classes, (load or self.load) / mean_s, self.count, self.seed)


@dataclass(frozen=True)
class Measured:
    """A run under one policy; ``behind`` is the slowdown of a short video that is asked for behind a long one."""

    report: RunReport
    behind: float | None


class Target(Protocol):
    """What is measured."""

    def measure(self, plan: Plan, policy: Policy | None) -> Measured:
        """Under that policy; None where it is the service's own."""


class Simulated:
    """Wan 2.1 1.3B on an H200, in virtual time."""

    def __init__(self) -> None:
        self._costs = h200_costs()

    def video(self, arrival: Arrival) -> SimulatedVideo:
        """Raises RequestError for a body that the model cannot make."""
        return SimulatedVideo.of(arrival, simulated_request(dict(arrival.body)), self._costs)

    def alone_s(self, plan: Plan) -> dict[str, float]:
        return {name: sum(self.video(Arrival(0, name, body)).turns_s) for name, body in plan.bodies.items()}

    def stream(self, plan: Plan, load: float | None = None) -> list[SimulatedVideo]:
        return [self.video(arrival) for arrival in plan.arrivals(self.alone_s(plan), load)]

    def behind(self, plan: Plan) -> list[SimulatedVideo]:
        """A long video, and a short one while it is made."""
        bodies = plan.bodies
        long, short = Arrival(0.0, "long", bodies["long"]), Arrival(_BEHIND_AT_S, "short", bodies["short"])
        return [self.video(long), self.video(short)]

    def measure(self, plan: Plan, policy: Policy | None) -> Measured:
        policy = policy or "shortest"
        outcomes = Simulation(policy, plan.max_active).run(self.stream(plan))
        behind = Simulation(policy).run(self.behind(plan))[1].slowdown if _has_both(plan) else None
        return Measured(report_of(outcomes, plan.slo), behind)


class Live:
    """A running service, or one that is started for each policy."""

    def __init__(self, url: str | None, model: str, api_key: str | None) -> None:
        self._url, self._model, self._api_key = url, model, api_key

    def measure(self, plan: Plan, policy: Policy | None) -> Measured:
        if self._url is not None:
            return asyncio.run(self._run(self._url, plan))
        settings = {"worker.policy": policy or "shortest", "worker.max_active": str(plan.max_active)}
        with running_server(None, self._model, settings) as url:
            return asyncio.run(self._run(url, plan))

    async def _run(self, url: str, plan: Plan) -> Measured:
        service = LiveService(url, self._api_key)
        alone_s = await service.alone_s(plan.bodies)
        behind = None
        if _has_both(plan):
            behind = await service.behind(plan.bodies["long"], plan.bodies["short"]) / alone_s["short"]
        outcomes: list[Outcome] = await service.run(plan.arrivals(alone_s), alone_s)
        return Measured(report_of(outcomes, plan.slo), behind)


@app.command("serve")
def bench_serve(
    url: Annotated[str | None, typer.Option(help="A running service; its policy is its own.")] = None,
    model: Annotated[str | None, typer.Option(help="Start a service with this model: tiny-wan or fake.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of a running service.")] = None,
    policy: Annotated[list[str], typer.Option(help="shortest, fifo or round-robin; may be repeated.")] = [  # noqa: B006
        "shortest",
        "fifo",
    ],
    trace: Annotated[Path | None, typer.Option(help="A JSON object a line: at_s, class and body.")] = None,
    videos: Annotated[int, typer.Option(min=1, help="How many are asked for, without a trace.")] = 400,
    load: Annotated[float, typer.Option(min=0.01, help="Work that comes, as a part of what the device does.")] = 0.8,
    long_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Long videos, as a part of all.")] = 0.2,
    short: Annotated[str | None, typer.Option(help="Body of the short videos, as JSON.")] = None,
    long: Annotated[str | None, typer.Option(help="Body of the long videos, as JSON.")] = None,
    slo: Annotated[float, typer.Option(min=1.0, help="Objective: at most so many times as slow as alone.")] = 3.0,
    max_active: Annotated[int, typer.Option(min=1, help="Generations that share the device.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the stream.")] = 1,
    plots: Annotated[Path | None, typer.Option(help="Folder for two drawings, from the simulator.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Latency, slowdown, objectives met and ETA error of a stream of short and long videos.

    Without --url and --model it is simulated, with the costs of Wan 2.1 1.3B on an H200.
    """

    def measured() -> None:
        target: Target = Live(url, model or "", api_key) if url or model else Simulated()
        bodies = _LIVE if url or model else _SIMULATED
        classes = [
            VideoClass("short", _body("--short", short or bodies[0]), 1 - long_share),
            VideoClass("long", _body("--long", long or bodies[1]), long_share),
        ]
        plan = Plan(classes, read_trace(trace) if trace else None, videos, load, seed, slo, max_active)
        policies: Sequence[Policy | None] = [None] if url else _policies(policy)
        found: dict[str, Measured] = {str(name or "as it is"): target.measure(plan, name) for name in policies}
        _show(found, plan, is_json=is_json)
        if plots is not None:
            _draw(plots, plan)

    run(measured)


def _body(name: str, text: str) -> Body:
    body = parse_json(text, name)
    if not isinstance(body, dict):
        raise ConfigError(f'{name} must be a JSON object, for instance {{"num_frames": 17}}')
    return body


def _policies(names: Sequence[str]) -> list[Policy]:
    found: list[Policy] = [known for name in names for known in POLICIES if known == name]
    if len(found) != len(names):
        raise ConfigError(f"--policy must be one of {', '.join(POLICIES)}")
    return found


def _has_both(plan: Plan) -> bool:
    return {"short", "long"} <= plan.bodies.keys()


def _draw(folder: Path, plan: Plan) -> None:
    make_folder(folder)
    simulated = Simulated()
    bodies = {"short": json.loads(_SIMULATED[0]), "long": json.loads(_SIMULATED[1])}
    asked = [(0.0, "long"), (_BEHIND_AT_S, "short"), (30.0, "short")]
    videos = [simulated.video(Arrival(at_s, name, bodies[name])) for at_s, name in asked]
    classes = [VideoClass(name, body, 0.2 if name == "long" else 0.8) for name, body in bodies.items()]
    drawn = Plan(classes, None, 2000, 0.8, plan.seed, plan.slo, 8)
    for path in (
        draw_device(folder, POLICIES, videos),
        draw_slowdown(folder, ("shortest", "fifo"), lambda load: simulated.stream(drawn, load), plan.slo),
    ):
        err.print(f"drawn: {path}")


def _show(found: Mapping[str, Measured], plan: Plan, *, is_json: bool) -> None:
    if is_json:
        told = {name: asdict(measured) for name, measured in found.items()}
        out.print_json(json.dumps({"slo": plan.slo, "load": plan.load, "seed": plan.seed, "policies": told}))
        return
    headers = ("", "videos", "p50 s", "p95 s", "p99 s", "x p50", "x p95", "in time", "ETA p50", "p90")
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, measured in found.items():
        for kind, report in measured.report.classes.items():
            table.add_row(f"{kind}, {name}", *_cells(report))
    out.print(table)
    for name, measured in found.items():
        whole = measured.report
        said = f"{name}: {whole.per_hour:,.1f} videos an hour, all of them in {whole.elapsed_s:,.1f} s"
        if measured.behind is not None:
            said += f"; a short video behind a long one takes {measured.behind:.2f} times as long as alone"
        if whole.eta_error_p50 is not None and whole.eta_error_p90 is not None:
            said += f"; ETA error of all p50 {100 * whole.eta_error_p50:.0f} %, p90 {100 * whole.eta_error_p90:.0f} %"
        out.print(said)
    out.print(f"[dim]x: times as slow as alone; in time: at most {plan.slo:g} x; ETA: error of the first one[/]")


def _cells(report: ClassReport) -> list[str]:
    latencies = [f"{seconds:.1f}" for seconds in (report.p50_s, report.p95_s, report.p99_s)]
    errors = ["" if error is None else f"{100 * error:.0f} %" for error in (report.eta_error_p50, report.eta_error_p90)]
    slowdowns = [f"{report.slowdown_p50:.2f}", f"{report.slowdown_p95:.2f}"]
    count = f"{report.count}, {report.lost} lost" if report.lost else str(report.count)
    return [count, *latencies, *slowdowns, f"{100 * report.slo:.0f} %", *errors]
