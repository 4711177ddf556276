"""``kinema bench engine`` on the tiny model and on the configs of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kinema.bench.app import app
from kinema.bench.wan.architectures import ARCHITECTURES
from kinema.bench.wan.gauge import Gauge
from kinema.bench.wan.random_weights import draw
from kinema.bench.wan.subject import write_architecture
from kinema.engines.base import Frames
from kinema.engines.registry import create_wan
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Placement
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from tests.integration.wan.random_checkpoints import save_i2v21, save_i2v22

SHAPE = ("--device", "cpu", "--size", "64x64", "--frames", "5")
# Traced as for a compiler, which would take a minute.
AGAINST = ("--against", "diffusers", "--compile-with", "eager")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["engine", *SHAPE, *arguments], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    made = WanEngine(inspect("tiny-wan"), device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def request_(engine: WanEngine) -> GenerationRequest:
    options = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=4, seed=1)
    return resolve(options, engine.capabilities).request


def test_a_video_is_measured_from_its_prompt_to_its_file(tmp_path: Path) -> None:
    """The stages add up to the whole, steps that were not run included; diffusers' pipeline runs beside it."""
    path = tmp_path / "report.json"
    few = ("--steps", "6", "--measure-steps", "3", "--runs", "1")
    result = bench(*few, *AGAINST, "--output", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    ms = {name: stage["ms"] for name, stage in report["stages"].items()}
    assert list(ms) == ["text", "step", "denoise", "decode", "convert", "encoding", "encode", "store", "rest", "video"]
    assert ms["denoise"] == pytest.approx(6 * ms["step"])
    parts = ("text", "denoise", "decode", "encode", "store", "rest")
    assert ms["video"] == pytest.approx(sum(ms[name] for name in parts))
    for against in ("against", "against_careful"):
        assert report[against]["ratios"].keys() == {"step", "decode", "video"}
        assert report[against]["ratios"]["step"] == pytest.approx(report[against]["step_ms"] / ms["step"])
    assert report["against"]["setup"] == {"blocks": "eager", "attention": "native", "vae": "float32"}
    careful = report["against_careful"]["setup"]
    # The fastest is taken of those that run here.
    assert careful["blocks"] == "compiled (eager)"
    assert careful["attention"] in ("native", "_native_flash")
    assert careful["vae"] in ("bfloat16, channels first", "bfloat16, channels last")
    assert f"tuned: blocks compiled (eager), attention {careful['attention']}, vae {careful['vae']}" in result.stdout
    assert "3 of 6 steps were run" in result.stdout
    assert "denoise, 6 steps *" in result.stdout


def test_a_compiler_that_is_missing_costs_its_column_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The log says why; what diffusers does as published is measured all the same."""
    result = bench("--stages", "denoise", "--steps", "2", "--runs", "1", *AGAINST[:3], "none-such", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["against"]["step_ms"] > 0
    assert report["against_careful"] is None
    assert "was not measured as a careful user runs it" in caplog.text
    assert "none-such" in caplog.text


def test_what_was_not_asked_for_is_not_measured() -> None:
    """No video is made for the text and the decode alone."""
    result = bench("--stages", "text,decode", "--runs", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["stages"]) == ["text", "decode", "convert"]
    assert report["first_video_s"] is None


def test_a_step_with_a_lora_is_compared_with_one_without() -> None:
    few = ("--stages", "denoise", "--steps", "3", "--runs", "1", "--lora-rank", "4")
    result = bench(*few, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    loras = report["loras"]
    assert loras["rank"] == 4
    assert loras["ratio"] == pytest.approx(loras["step_ms"] / report["stages"]["step"]["ms"])
    assert "with a LoRA of rank 4" in bench(*few).stdout
    refused = bench("--stages", "text", "--lora-rank", "4")
    assert refused.exit_code == 2
    assert "--lora-rank compares steps" in " ".join(refused.output.split())


def test_weights_that_are_kept_in_8_bits_are_named() -> None:
    """In the report; random weights are kept so too."""
    result = bench("--stages", "text", "--runs", "1", "--weights", "fp8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights_dtype"] == "fp8"
    engine = create_wan(EngineSettings(device="cpu", weights="fp8"), inspect("tiny-wan"), draw)
    engine.load()
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" not in engine.parts.text_encoder.weights


def test_a_step_that_is_not_computed_counts_no_work() -> None:
    """Two of ten steps are not computed; the report names the mode."""
    exact, cached = (
        json.loads(bench("--steps", "10", "--stages", "denoise", "--runs", "1", "--json", *mode).stdout)
        for mode in ((), ("--step-cache",))
    )
    assert (exact["step_cache"], cached["step_cache"]) == (None, True)
    assert cached["stages"]["denoise"]["tflop"] == pytest.approx(0.8 * exact["stages"]["denoise"]["tflop"])
    assert cached["stages"]["denoise"]["ms"] == pytest.approx(10 * cached["stages"]["step"]["ms"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--stages", "text,dance"), "give some of text, denoise, decode, video"),
        (("--architecture", "wan9"), "give one of: wan2.1-t2v-1.3b"),
        (("--against", "magic"), "the only pipeline to compare with is diffusers"),
        (("--architecture", "wan2.1-t2v-14b", "--model", "tiny-wan"), "exclude each other"),
        (("--linears", "fp8", "--ablate"), "--ablate is for engine.wan.linears = 'dtype'"),
        (("--weights", "fp8", "--ablate"), "--ablate is for engine.weights = 'dtype'"),
        (("--weights", "int4"), "engine.weights = 'int4'"),
        (("--step-cache", "--ablate"), "are for engine.wan.step_cache = false"),
        (("--step-cache", "--gpus", "2"), "are for engine.wan.step_cache = false"),
        (("--gpus", "2", "--against", "diffusers"), "--gpus compares steps alone"),
        (("--gpus", "2", "--stages", "text"), "--gpus compares steps alone"),
        (("--step-cache", "--measure-steps", "4"), "are for engine.wan.step_cache = false"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    """The message names what can be measured."""
    result = bench(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_a_shared_step_is_compared_with_one_of_a_single_gpu(tmp_path: Path) -> None:
    """Each mode has its time and how far its latents are from those of a single one; here two processes share a CPU."""
    path = tmp_path / "report.json"
    few = ("--steps", "6", "--measure-steps", "2", "--runs", "1")
    result = bench("--gpus", "2", *few, "--output", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert [one["mode"] for one in report["modes"]] == ["single", "cfg", "ulysses"]
    assert [one["difference"] for one in report["modes"][:2]] == [0, 0]
    assert all(one["step_s"] > 0 for one in report["modes"])
    assert (report["gpus"], report["measured_steps"]) == (2, 2)
    assert "one run of 2 steps" in result.stdout


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_published_configs_are_those_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    """The engine accepts such a checkpoint, and the model has its name."""
    checkpoint = write_architecture(name, tmp_path)
    assert checkpoint.name == name
    assert checkpoint.capabilities().is_image_to_video == ("i2v" in name)


def test_a_model_that_needs_a_first_frame_gets_one(tmp_path: Path) -> None:
    """Of random colours: in our videos, in those of diffusers' pipeline, with a LoRA, and in what forms compute."""
    model = str(save_i2v22(tmp_path / "model"))
    few = ("--steps", "4", "--runs", "1", *AGAINST, "--ablate", "--lora-rank", "4")
    result = bench("--model", model, *few, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for against in ("against", "against_careful"):
        assert report[against]["ratios"].keys() == {"step", "decode", "video"}
    assert report["loras"]["step_ms"] > 0
    assert len(report["ablations"]) > 1


def test_a_model_that_looks_at_its_first_frame_is_measured(tmp_path: Path) -> None:
    """Without diffusers' pipeline, for which nothing has its image encoder."""
    model = str(save_i2v21(tmp_path / "model"))
    few = ("--model", model, "--steps", "4", "--runs", "1")
    report = json.loads(bench(*few, "--ablate", "--lora-rank", "4", "--json").stdout)
    assert report["loras"]["step_ms"] > 0
    assert len(report["ablations"]) > 1
    refused = bench(*few, "--against", "diffusers")
    assert refused.exit_code == 2
    assert "models without an image encoder" in " ".join(refused.output.split())


def test_random_weights_make_a_video() -> None:
    """The numbers stay in their range, and are the same in each process."""
    checkpoint = inspect("tiny-wan")
    engine = create_wan(EngineSettings(device="cpu"), checkpoint, draw)
    engine.load()
    options = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=2, seed=1)
    request = resolve(options, engine.capabilities).request
    frames = [output.data for output in engine.generate(request) if isinstance(output, Frames)]
    assert sum(map(len, frames)) == 5
    other = draw(checkpoint, Placement(torch.device("cpu")), torch.float32)
    assert torch.equal(engine.parts.transformer.network.head.weight, other.transformer.tensors["proj_out.weight"])


def test_plain_forms_give_the_served_step(engine: WanEngine, request_: GenerationRequest) -> None:
    """Two plain forms compute the same numbers: each prompt begun by itself, and the text read again."""
    from kinema.bench.wan.ablation import SampleStep, UnsharedForward

    with torch.inference_mode():
        sample = SampleStep(engine, inspect("tiny-wan"), request_)
        own, unshared = sample.forward(), sample.forward(kind=UnsharedForward)
        served = sample.velocities(own, sample.own)
        assert torch.equal(sample.velocities(unshared, sample.own), served)
        assert torch.equal(sample.velocities(own, sample.read(sample.states)), served)


def test_each_optimisation_is_left_out_once(engine: WanEngine, request_: GenerationRequest) -> None:
    """The last form leaves all of them out; a CPU has fewer of them."""
    from kinema.bench.wan.ablation import ablate

    found = ablate(engine, inspect("tiny-wan"), request_, Gauge("cpu"), runs=1)
    assert [one.name for one in found] == [
        "query, key and value in a product each",
        "all 512 text tokens attended to",
        "prompts and time read in each step",
        "the first block begun for each prompt",
        "diffusers' solver",
        "all of these",
    ]
    assert all(one.step_s > 0 and one.base == "as served" for one in found)
