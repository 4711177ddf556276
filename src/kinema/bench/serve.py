"""``kinema bench serve``: how long videos take when many are asked for.

An open-loop stream of short and long videos goes to a service, or through the simulator, which plays the same scheduler
with the costs of a device that need not be here. Reported by class: latency, slowdown against alone, how many met the
objective and how good the first ETA was; for the whole stream, throughput.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kinema.bench import serve_output
from kinema.bench.live import LiveService
from kinema.bench.plots import draw_device, draw_slowdown, make_plots_folder
from kinema.bench.recorded import recorded_costs, simulated_request
from kinema.bench.report import Measured, summarize
from kinema.bench.server import running_server
from kinema.bench.simulate import SimulatedVideo, Simulation
from kinema.bench.workload import Arrival, Body, VideoClass, poisson
from kinema.errors import ConfigError
from kinema.request.json_text import parse_json
from kinema.shell import err
from kinema.worker.scheduler import POLICIES, Policy

# Wan 2.1 1.3B on an H200: 4.4 s and 43.5 s.
_SIMULATED = ('{"num_frames": 17, "num_inference_steps": 40}', '{"num_frames": 81, "num_inference_steps": 50}')
# The bundled model, and a tenth of the work: 0.5 s and 4 s on two CPU cores. Many short steps, as a GPU has them.
_LIVE = (
    '{"size": "96x96", "num_frames": 17, "num_inference_steps": 8}',
    '{"size": "96x96", "num_frames": 17, "num_inference_steps": 80}',
)
_BEHIND_AT_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What is asked for: a trace, or ``count`` videos of the classes at a load; and how it is judged."""

    classes: Sequence[VideoClass]
    trace: Sequence[Arrival] | None
    count: int
    load: float
    seed: int
    slo: float
    max_active: int

    @property
    def bodies(self) -> dict[str, Body]:
        """The body of each class that is asked for; in a trace that of its first video."""
        if self.trace is not None:
            return {arrival.name: arrival.body for arrival in reversed(self.trace)}
        return {one.name: one.body for one in self.classes}

    @property
    def has_short_and_long(self) -> bool:
        return {"short", "long"} <= self.bodies.keys()

    def arrivals(self, alone_s: Mapping[str, float], load: float | None = None) -> Sequence[Arrival]:
        """The trace, or a stream that keeps the device busy for ``load`` of the time."""
        if self.trace is not None:
            return self.trace
        mean_s = sum(one.share * alone_s[one.name] for one in self.classes) / sum(one.share for one in self.classes)
        return poisson(self.classes, (load or self.load) / mean_s, self.count, self.seed)


class Simulated:
    """Wan 2.1 1.3B on an H200, in virtual time."""

    def __init__(self) -> None:
        self._costs = recorded_costs()
        # By their bodies: what the turns of a video take depends on nothing else.
        self._videos: dict[str, SimulatedVideo] = {}

    def measure(self, plan: Plan, policy: Policy) -> Measured:
        """Play the stream under this policy. Raises RequestError for a body that the model cannot make."""
        outcomes = Simulation(policy, plan.max_active).run(self.stream(plan))
        behind = None
        if plan.has_short_and_long:
            behind = Simulation(policy).run(self.behind(plan, _BEHIND_AT_S))[1].slowdown
        return Measured(summarize(outcomes, plan.slo), behind)

    def stream(self, plan: Plan, load: float | None = None) -> list[SimulatedVideo]:
        """The videos of the plan, at its load or another."""
        alone_s = {name: sum(self._video(Arrival(0, name, body)).turns_s) for name, body in plan.bodies.items()}
        return [self._video(arrival) for arrival in plan.arrivals(alone_s, load)]

    def behind(self, plan: Plan, *short_at_s: float) -> list[SimulatedVideo]:
        """A long video at 0 s, and short ones at these times while it is made."""
        bodies = plan.bodies
        short = [Arrival(at_s, "short", bodies["short"]) for at_s in short_at_s]
        return [self._video(arrival) for arrival in (Arrival(0.0, "long", bodies["long"]), *short)]

    def draw(self, plan: Plan, folder: Path) -> list[Path]:
        """The two plots of docs/scheduling.md, for the videos of this plan. Raises ConfigError."""
        make_plots_folder(folder)
        behind = self.behind(plan, _BEHIND_AT_S, 3 * _BEHIND_AT_S)
        streams = {load: self.stream(plan, load) for load in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}
        return [
            draw_device(folder, POLICIES, behind),
            draw_slowdown(folder, ("shortest", "fifo"), streams, plan.slo, plan.max_active),
        ]

    def _video(self, arrival: Arrival) -> SimulatedVideo:
        body = json.dumps(arrival.body)
        if body not in self._videos:
            self._videos[body] = SimulatedVideo.of(arrival, simulated_request(dict(arrival.body)), self._costs)
        return replace(self._videos[body], at_s=arrival.at_s, name=arrival.name)


class Live:
    """A running service, or one that is started for each policy."""

    def __init__(self, url: str | None, model: str, api_key: str | None) -> None:
        self._url, self._model, self._api_key = url, model, api_key

    @property
    def is_running(self) -> bool:
        """Whether the service was there before, with a policy that is its own."""
        return self._url is not None

    def measure(self, plan: Plan, policy: Policy) -> Measured:
        """Send the stream; a running service takes it under its own policy. Raises ClientError and ServiceError."""
        if self._url is not None:
            return asyncio.run(self._run(self._url, plan))
        settings = {"worker.policy": policy, "worker.max_active": str(plan.max_active)}
        with running_server(None, self._model, settings) as url:
            return asyncio.run(self._run(url, plan))

    async def _run(self, url: str, plan: Plan) -> Measured:
        service = LiveService(url, self._api_key)
        alone_s = await service.alone_s(plan.bodies)
        behind = None
        if plan.has_short_and_long:
            behind = await service.behind(plan.bodies["long"], plan.bodies["short"]) / alone_s["short"]
        outcomes = await service.run(plan.arrivals(alone_s), alone_s)
        return Measured(summarize(outcomes, plan.slo), behind)


def make_classes(short: str | None, long: str | None, long_share: float, *, is_live: bool) -> list[VideoClass]:
    """The two classes, from bodies as JSON; by default those of the simulation, or small ones for a live service.

    Raises ConfigError.
    """
    bodies = _LIVE if is_live else _SIMULATED
    return [
        VideoClass("short", _body("--short", short or bodies[0]), 1 - long_share),
        VideoClass("long", _body("--long", long or bodies[1]), long_share),
    ]


def measure_serve(
    plan: Plan, policy_names: Sequence[str], live: Live | None, plots: Path | None, *, is_json: bool
) -> None:
    """Measure each policy by the live service, or in the simulation, and print. Raises KinemaError."""
    if plots is not None and (live is not None or plan.trace is not None):
        raise ConfigError("--plots draws the simulated stream: leave out --url, --model and --trace")
    policies = _policies(policy_names)
    target = live or Simulated()
    if live is not None and live.is_running:
        found = {"as it is": live.measure(plan, policies[0])}
    else:
        found = {policy: target.measure(plan, policy) for policy in policies}
    serve_output.show(found, slo=plan.slo, load=plan.load, seed=plan.seed, is_json=is_json)
    if plots is not None:
        for path in Simulated().draw(plan, plots):
            err.print(f"drawn: {path}")


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
