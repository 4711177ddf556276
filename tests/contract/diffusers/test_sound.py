"""Videos with sound by the diffusers engine: what the stock pipeline makes of it, and in the file."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from kinema.cli.generate import generate_file
from kinema.engines.base import Frames
from kinema.engines.diffusers.families import FAMILIES
from kinema.inputs import prepare
from kinema.request.options import NOTHING_GIVEN, GenerationOptions
from tests.contract.diffusers.test_families import engine_of, request_for, stock_output

pytestmark = pytest.mark.filterwarnings("ignore")

FFPROBE = shutil.which("ffprobe")
WITH_SOUND = [family for family in FAMILIES if family.has_sound]


@pytest.mark.parametrize("family", WITH_SOUND, ids=[family.name for family in WITH_SOUND])
def test_the_sound_is_that_of_the_stock_pipeline(family: Any) -> None:
    """Each chunk of frames has its part; together they are as long as the video, which is a little less or more."""
    request = request_for(family, "text", seed=3)
    engine = engine_of(family.name)
    assert engine.capabilities.has_sound
    sounds = [output.sound for output in engine.generate(request) if isinstance(output, Frames)]
    assert all(sound is not None for sound in sounds)
    rate = sounds[0].rate  # type: ignore[union-attr]
    samples = np.concatenate([sound.samples for sound in sounds])  # type: ignore[union-attr]
    waves = np.atleast_2d(np.asarray(stock_output(family, "text", seed=3).audio[0], np.float32))
    stock = np.rint(waves.clip(-1, 1) * 32767).astype(np.int16).T
    length = min(len(stock), round(request.num_frames * rate / request.fps))
    assert samples.shape == (length, 2)
    assert np.array_equal(samples[:, :1], stock[:length, :1])
    assert samples.any()


def film_of_ltx2(folder: Path, kind: str) -> Path:
    """A file of nine frames, eight a second."""
    engine = engine_of("LTX-2")
    options = GenerationOptions(
        prompt="a cat", size="64x64", num_frames=9, fps=8, num_inference_steps=1, seed=3, output_format=kind
    )
    prepared = prepare(NOTHING_GIVEN, options, engine.capabilities)
    path = folder / f"film.{kind}"
    generate_file(engine, prepared, path, lambda _output: None)
    return path


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_ltx2_makes_a_file_with_sound(tmp_path: Path, kind: str) -> None:
    """Of the length of the video to 20 ms, in a track that any player reads."""
    path = film_of_ltx2(tmp_path, kind)
    with av.open(io.BytesIO(path.read_bytes())) as container:
        (sound,) = container.streams.audio
        assert (sound.codec_context.name, sound.rate) == ({"mp4": "aac", "webm": "opus"}[kind], 48_000)
        num_samples = sum(frame.samples for frame in container.decode(sound))
    assert abs(num_samples / 48_000 - 9 / 8) < 0.02


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("webm", "opus")])
def test_ffprobe_reads_the_sound(tmp_path: Path, kind: str, codec: str) -> None:
    """By the container's tables, which players go by."""
    if FFPROBE is None:
        pytest.skip("ffprobe is not installed")
    command = [FFPROBE, "-v", "error", "-of", "json", "-show_streams", "-show_packets", "-select_streams", "a"]
    run = subprocess.run([*command, film_of_ltx2(tmp_path, kind)], capture_output=True, check=True, timeout=60)
    told = json.loads(run.stdout)
    assert run.stderr == b""
    (stream,) = told["streams"]
    assert (stream["codec_name"], stream["sample_rate"], stream["channels"]) == (codec, "48000", 2)
    last = told["packets"][-1]
    assert abs(float(last["pts_time"]) + float(last["duration_time"]) - 9 / 8) < 0.02


def test_sound_that_is_missing_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline may give none."""
    engine: Any = engine_of("LTX-2")
    (family,) = (one for one in WITH_SOUND if one.name == "LTX-2")
    call = engine._call

    def silent(*arguments: Any) -> Any:
        output = call(*arguments)
        output.audio = None
        return output

    monkeypatch.setattr(engine, "_call", silent)
    request = request_for(family, "text", seed=3).model_copy(update={"num_inference_steps": 1})
    outputs = list(engine.generate(request))
    assert [output.sound for output in outputs if isinstance(output, Frames)] == [None] * 3
    assert "the video is silent: the model gave no sound" in [getattr(output, "text", "") for output in outputs]
