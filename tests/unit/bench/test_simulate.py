"""The scheduler at work in virtual time, with the costs of an H200: what docs/scheduling.md promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.bench.recorded import recorded_costs, simulated_request
from kinema.bench.report import Outcome, summarize
from kinema.bench.simulate import SimulatedVideo, Simulation
from kinema.bench.workload import Arrival, VideoClass, poisson
from kinema.worker.scheduler import POLICIES, Policy

SCHEDULING = Path(__file__).parents[3] / "docs" / "scheduling.md"
SHORT = {"num_frames": 17, "num_inference_steps": 40}
LONG = {"num_frames": 81, "num_inference_steps": 50}
CLASSES = [VideoClass("short", SHORT, 0.8), VideoClass("long", LONG, 0.2)]


def video(at_s: float, body: dict[str, int], name: str = "") -> SimulatedVideo:
    return SimulatedVideo.of(Arrival(at_s, name, body), simulated_request(dict(body)), recorded_costs())


def stream(load: float, count: int, seed: int) -> list[SimulatedVideo]:
    videos = {one.name: video(0, dict(one.body), one.name) for one in CLASSES}
    mean_s = sum(one.share * sum(videos[one.name].turns_s) for one in CLASSES)
    arrivals = poisson(CLASSES, load / mean_s, count, seed)
    return [replace(videos[one.name], at_s=one.at_s) for one in arrivals]


def test_a_short_video_is_a_tenth_of_a_long_one() -> None:
    """The recorded costs give this ratio, which docs/scheduling.md is about, and the seconds that stand there."""
    short_s, long_s = sum(video(0, SHORT).turns_s), sum(video(0, LONG).turns_s)
    assert short_s / long_s == pytest.approx(0.1, abs=0.01)
    page = SCHEDULING.read_text(encoding="utf-8")
    assert f"({long_s:.1f} s alone)" in page
    assert f"({short_s:.1f} s alone)" in page


@pytest.mark.parametrize("at_s", [0.001, 10.0, 30.0, 54.0])
def test_a_short_video_behind_a_long_one_is_done_almost_as_soon_as_alone(at_s: float) -> None:
    """It takes at most 1.4 times as long, whenever it comes; first come, first served makes it up to ten times."""
    videos = [video(0, LONG), video(at_s, SHORT)]
    assert Simulation("shortest").run(videos)[1].slowdown <= 1.4
    if at_s < 45:
        assert Simulation("fifo").run(videos)[1].slowdown > 2.2


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
def test_throughput_is_that_of_fifo(load: float) -> None:
    """No policy lets the device wait, so all videos are done at the same time."""
    videos = stream(load, 200, seed=3)
    hourly = [summarize(Simulation(policy).run(videos), 3).per_hour for policy in POLICIES]
    assert hourly == pytest.approx([hourly[0]] * len(hourly), rel=1e-6)


def test_most_short_videos_are_in_time_where_fifo_lets_most_of_them_wait() -> None:
    """At a load of 80 %; the long ones pay for it, by less than half of their time."""
    videos = stream(0.8, 400, seed=1)
    shortest, fifo = (summarize(Simulation(policy).run(videos), 3).classes for policy in ("shortest", "fifo"))
    assert shortest["short"].slo > 0.95
    assert fifo["short"].slo < 0.5
    assert shortest["long"].p50_s < 1.5 * fifo["long"].p50_s


def test_the_first_eta_of_a_short_video_is_right() -> None:
    """Whatever runs and waits when it is asked for: nine in ten are off by less than 15 %."""
    report = summarize(Simulation("shortest").run(stream(0.8, 400, seed=1)), 3).classes["short"]
    assert report.eta_error_p90 is not None
    assert report.eta_error_p90 <= 0.15


@pytest.mark.parametrize("seed", [1, 2, 4])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_most_first_etas_are_right(load: float, seed: int) -> None:
    """Nine in ten of all videos are off by less than 15 %, though nobody knows which video comes next."""
    report = summarize(Simulation("shortest").run(stream(load, 400, seed)), 3)
    assert report.eta_error_p90 is not None
    assert report.eta_error_p90 <= 0.15


def test_the_last_of_the_places_is_not_kept_by_long_videos() -> None:
    """Four long ones and four places: the short one waits for one of them to end, with eight it does not."""
    videos = [video(0, LONG)] * 4 + [video(1, SHORT)]
    assert Simulation(max_active=4).run(videos)[4].slowdown > 5
    assert Simulation(max_active=8).run(videos)[4].slowdown < 1.4


@settings(max_examples=settings().max_examples // 4)
@given(
    seed=st.integers(0, 1000),
    load=st.sampled_from([0.3, 0.9, 2.0]),
    policy=st.sampled_from(POLICIES),
    max_active=st.integers(1, 9),
)
def test_time_is_accounted_for(seed: int, load: float, policy: Policy, max_active: int) -> None:
    """Each video has the device for exactly its turns, one has it at a time, and none ends before its time alone."""
    videos = stream(load, 25, seed)
    simulation = Simulation(policy, max_active)
    outcomes = simulation.run(videos)
    for number, (one, outcome) in enumerate(zip(videos, outcomes, strict=True)):
        spans = [span for span in simulation.spans if span.number == number]
        assert sum(span.end_s - span.start_s for span in spans) == pytest.approx(sum(one.turns_s))
        assert spans[0].start_s >= one.at_s
        assert spans[-1].end_s == pytest.approx(one.at_s + (outcome.latency_s or 0.0))
        assert outcome.slowdown >= 1 - 1e-9
    ends = [span.end_s for span in simulation.spans]
    assert all(span.start_s >= end - 1e-9 for end, span in zip(ends, simulation.spans[1:], strict=False))


def test_a_report_counts_what_was_lost() -> None:
    """A lost video counts as late, and has no latency."""
    outcomes = [Outcome("short", 0, 2.0, 1.0, eta_s=1.0), Outcome("short", 1, 4.0, 1.0), Outcome("short", 2, None, 1.0)]
    report = summarize(outcomes, slo=3.0)
    short = report.classes["short"]
    assert (short.count, short.lost, short.p50_s, short.p99_s) == (3, 1, 2.0, 4.0)
    assert (short.slowdown_p95, short.slo, short.eta_error_p90) == (4.0, pytest.approx(1 / 3), 0.5)
    assert (report.elapsed_s, report.per_hour) == (5.0, pytest.approx(1440))
