"""``kinema bench serve``: its workloads, what it prints and draws, and a live service under its load."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from kinema.bench.app import app
from kinema.bench.live import LiveService
from kinema.bench.report import summarize
from kinema.bench.workload import Arrival, VideoClass, poisson, read_trace
from kinema.errors import ConfigError

DOCS = Path(__file__).parents[3] / "docs"
ETA_ERRORS = ("eta_error_p50", "eta_error_p90")
CLASSES = [VideoClass("short", {"num_frames": 5}, 0.75), VideoClass("long", {}, 0.25)]


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_poisson_stream_has_its_rate_and_its_shares() -> None:
    """The same seed gives the same stream."""
    arrivals = poisson(CLASSES, per_s=2.0, count=4000, seed=1)
    assert arrivals[-1].at_s / 4000 == pytest.approx(0.5, rel=0.05)
    assert Counter(one.name for one in arrivals)["short"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert arrivals == poisson(CLASSES, per_s=2.0, count=4000, seed=1) != poisson(CLASSES, 2.0, 4000, seed=2)


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    """A JSON object a line."""
    trace = tmp_path / "trace.jsonl"
    lines = [{"at_s": 2, "class": "long", "body": {}}, {"at_s": 0.5, "class": "short", "body": {"num_frames": 5}}]
    trace.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_trace(trace) == [Arrival(0.5, "short", {"num_frames": 5}), Arrival(2.0, "long", {})]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; it has a JSON object a line"),
        ("{}", r"line 1: not \{\"at_s\": 1.5"),
        ('{"at_s": 0, "class": "a", "body": {}}\nnonsense', "line 2: not"),
        ('{"at_s": -1, "class": "a", "body": {}}', "line 1: at_s must be a number of seconds from 0"),
        ('{"at_s": "NaN", "class": "a", "body": {}}', "line 1: at_s must be a number of seconds from 0"),
    ],
)
def test_a_trace_that_is_none_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    """The message has the number of the line, and an example."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_trace(trace)


def test_the_simulation_is_told_in_json() -> None:
    """By policy and class; the same seed gives the same figures."""
    told = json.loads(bench("--videos", "50", "--json"))
    assert told["policies"].keys() == {"shortest", "fifo"}
    assert told["policies"]["shortest"]["behind"] < 2.2 < told["policies"]["fifo"]["behind"]
    assert told["policies"]["fifo"]["report"]["classes"]["long"]["count"] > 0
    assert told == json.loads(bench("--videos", "50", "--json"))


def test_the_simulation_is_shown_and_drawn(tmp_path: Path) -> None:
    """A table, and two drawings that are XML."""
    shown = bench("--videos", "50", "--policy", "round-robin", "--plots", str(tmp_path))
    assert "short, round-robin" in shown
    assert "videos an hour" in shown
    for name in ("device.svg", "slowdown.svg"):
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")


def test_the_page_on_scheduling_says_what_comes_out(tmp_path: Path) -> None:
    """Its figures and its drawings are those of this version."""
    page = DOCS / "scheduling.md"
    policies = ("--policy", "shortest", "--policy", "fifo", "--policy", "round-robin")
    told = json.loads(bench("--json", *policies, "--plots", str(tmp_path)))["policies"]
    for policy, measured in told.items():
        assert f"{measured['report']['per_hour']:.1f} videos an hour" in page.read_text()
        for kind, report in measured["report"]["classes"].items():
            seconds = [f"{report[name]:.1f}" for name in ("p50_s", "p95_s", "p99_s")]
            times = [f"{report[name]:.2f}" for name in ("slowdown_p50", "slowdown_p95")]
            errors = [" " if (error := report[name]) is None else f" {100 * error:.0f} % " for name in ETA_ERRORS]
            cells = [f"{kind}, `{policy}`", *seconds, *times, f"{100 * report['slo']:.0f} %"]
            assert f"| {' | '.join(cells)} |{errors[0]}|{errors[1]}|" in page.read_text()
    assert f"takes {told['shortest']['behind']:.2f} times as long as alone" in page.read_text()
    assert f"takes {told['fifo']['behind']:.2f} times" in page.read_text()
    for name in ("device.svg", "slowdown.svg"):
        assert (DOCS / "scheduling" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--policy", "lifo"), "--policy must be one of shortest, fifo, round-robin"),
        (("--short", "[]"), "--short must be a JSON object"),
        (("--trace", "missing.jsonl"), "cannot read the trace missing.jsonl"),
        (("--model", "fake", "--plots", "here"), "--plots draws the simulated stream"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments: tuple[str, str], sentence: str) -> None:
    """The command ends with the exit code of a wrong configuration."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.fixture(scope="module")
def address() -> object:
    from kinema.bench.server import running_server

    with running_server(None, "fake", {"worker.max_active": "3"}) as url:
        yield url


async def test_a_live_service_is_measured(address: str) -> None:
    """Every video is asked for, followed to its end and compared with alone; one that fails is lost."""
    service = LiveService(address)
    small = {"size": "64x64", "num_inference_steps": 1}
    bodies = {"short": {**small, "num_frames": 1}, "long": {**small, "num_frames": 33}}
    alone_s = await service.alone_s(bodies)
    assert alone_s["short"] > 0
    assert await service.behind({**bodies["long"], "prompt": "[slow]", "num_inference_steps": 50}, bodies["short"]) > 0
    arrivals = [Arrival(0.01 * number, "short", bodies["short"]) for number in range(8)]
    arrivals.append(Arrival(0.0, "long", {"prompt": "[fail]"}))
    report = summarize(await service.run(arrivals, alone_s), slo=1e6)
    assert (report.classes["short"].count, report.classes["short"].lost, report.classes["short"].slo) == (8, 0, 1.0)
    assert report.classes["short"].eta_error_p90 is not None
    assert (report.classes["long"].count, report.classes["long"].lost) == (1, 1)
