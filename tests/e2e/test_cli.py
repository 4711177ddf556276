"""The commands as a user types them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import structlog
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

from kinema import __version__
from kinema.cli.app import app
from tests.forked import Forked
from tests.unit.engines.wan.test_checkpoint import make_folder, write
from tests.unit.engines.wan.tiny import tiny_with

Here = Callable[..., Result]
There = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def there(tmp_path: Path, forked_kinema: list[str]) -> There:
    """Runs a command in a process of its own."""
    return lambda *arguments: run(*forked_kinema, *arguments, cwd=tmp_path)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """Runs a command in this process, which has the engine's libraries already, and leaves the process as it was."""
    monkeypatch.chdir(tmp_path)
    handler, logging = signal.getsignal(signal.SIGTERM), structlog.get_config()
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    structlog.configure(**logging)
    signal.signal(signal.SIGTERM, handler)


def test_generate_saves_a_video_and_prints_its_path(tmp_path: Path, here: Here, there: There) -> None:
    """Text-to-video: the path alone on standard output; the same seed gives the same file, in another process too."""
    arguments = ["a red circle moving right", "--size", "64x64", "--num-frames", "9", "--steps", "3", "--seed", "5"]
    first = there("generate", *arguments, "-o", "made/one.mp4")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(tmp_path / "made" / "one.mp4")
    assert here("generate", *arguments, "-o", "two.mp4").exit_code == 0
    assert (tmp_path / "made" / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with av.open(str(tmp_path / "two.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 9


def test_generate_takes_a_first_frame(tmp_path: Path, here: Here) -> None:
    """Image-to-video; what was done to the image is said."""
    Image.new("RGB", (100, 80), (10, 200, 10)).save(tmp_path / "first.png")
    arguments = ["it moves up", "--image", "first.png", "--size", "64x64", "--num-frames", "5", "--steps", "2"]
    made = here("generate", *arguments)
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "kinema.mp4").stat().st_size > 0
    assert "note:" in made.stderr


def test_the_bundled_image_to_video_model_keeps_the_given_frames(tmp_path: Path, here: Here) -> None:
    """In the finished file, with a first frame alone and with a last one; it is replayed, and wants a first frame."""
    first, last = (disc(x) for x in (44, 84))
    first.save(tmp_path / "first.png")
    last.save(tmp_path / "last.png")
    small = ["--model", "tiny-wan-i2v", "--num-frames", "9", "--steps", "4", "--seed", "5"]
    given = ["it moves to the right", *small, "--image", "first.png"]
    assert here("generate", *given, "-o", "one.mp4").exit_code == 0
    assert here("generate", *given, "--last-frame", "last.png", "-o", "two.mp4").exit_code == 0
    one, two = (frames_of(tmp_path / name) for name in ("one.mp4", "two.mp4"))
    assert min(psnr(one[0], first), psnr(two[0], first), psnr(two[-1], last)) > 25
    assert psnr(one[-1], first) < 25, "the shape moves"
    again = here("replay", "two.mp4", *small[:2], "--image", "first.png", "--last-frame", "last.png")
    assert (again.exit_code, again.stdout) == (0, "the same bytes\n"), again.stderr
    refused = here("generate", "a red circle", *small)
    assert refused.exit_code == 1
    assert "tiny-wan-i2v needs a first frame" in refused.stderr.replace("\n", " ")


def disc(x: int) -> Image.Image:
    """A red one on white, 128x128."""
    picture = Image.new("RGB", (128, 128), (246, 246, 246))
    ImageDraw.Draw(picture).ellipse((x - 20, 44, x + 20, 84), fill=(228, 38, 38))
    return picture


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def psnr(frame: np.ndarray, given: Image.Image) -> float:
    error = frame.astype(float) - np.asarray(given, dtype=float)
    return float(10 * np.log10(255**2 / (error**2).mean()))


def test_generate_edits_a_film(tmp_path: Path, here: Here) -> None:
    """Video-to-video: the film's size and length, and the steps that its strength leaves."""
    first = ["a red circle moving right", "--size", "64x64", "--num-frames", "9", "--steps", "3", "--seed", "5"]
    assert here("generate", *first, "-o", "first.mp4").exit_code == 0
    edit = ["a blue circle moving right", "--video", "first.mp4", "--strength", "0.6", "--steps", "5", "-o", "edit.mp4"]
    made = here("generate", *edit)
    assert made.exit_code == 0, made.stderr
    assert "64x64, 9 frames at 16 fps, 3 steps" in made.stderr
    assert re.search(r"done: model loaded in \d+\.\d s, video made in \d+\.\d s", made.stderr)
    with av.open(str(tmp_path / "edit.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 9


def test_a_tier_is_made_and_made_again(tmp_path: Path, here: Here) -> None:
    """It is told, and replayed by its values when the model has other tiers."""
    folder = tiny_with(
        tmp_path / "model", {"draft": {"num_inference_steps": 2, "guidance_scale": 1, "solver": "euler"}}
    )
    small = ["a red circle", "--model", "model", "--size", "64x64", "--num-frames", "5", "--seed", "5"]
    made = here("generate", *small, "--tier", "draft", "-o", "one.mp4")
    assert made.exit_code == 0, made.stderr
    assert "2 steps, guidance 1, seed 5, tier draft" in made.stderr
    (folder / "kinema.json").unlink()
    again = here("replay", "one.mp4", "--model", "model")
    assert (again.exit_code, again.stdout.strip()) == (0, "the same bytes"), again.stderr
    refused = here("generate", *small, "--tier", "draft", "-o", "two.mp4")
    assert (refused.exit_code, "model has no tier 'draft' here" in refused.stderr.replace("\n", " ")) == (1, True)


def test_replay_makes_a_video_again(tmp_path: Path, here: Here, there: There) -> None:
    """From text and from a first frame: the verdict alone on standard output, and 1 when the bytes differ.

    The video from text is made in this process and again in another one.
    """
    Image.new("RGB", (100, 80), (10, 200, 10)).save(tmp_path / "first.png")
    small = ["--size", "64x64", "--num-frames", "5", "--steps", "2", "--seed", "5"]
    assert here("generate", "a red circle", *small, "-o", "one.mp4").exit_code == 0
    assert here("generate", "it moves", *small, "--image", "first.png", "-o", "two.mp4").exit_code == 0
    one = there("replay", "one.mp4")
    assert (one.returncode, one.stdout) == (0, "the same bytes\n"), one.stderr
    two = here("replay", "two.mp4", "--image", "first.png", "-o", "again.mp4")
    assert (two.exit_code, two.stdout) == (0, "the same bytes\n"), two.stderr
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    tampered = (tmp_path / "one.mp4").read_bytes().replace(b'"seed":5', b'"seed":6')
    (tmp_path / "three.mp4").write_bytes(tampered)
    three = here("replay", "three.mp4")
    assert (three.exit_code, three.stdout[:18]) == (1, "different pictures"), three.stderr
    assert len(list(tmp_path.glob("*"))) == 5, "nothing else was left"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["replay", "absent.mp4"], 1, "error: absent.mp4: No such file or directory; give an MP4"),
        (["replay", "/dev/null"], 1, "/dev/null: video is empty"),
        (["generate", "x", "--size", "832"], 1, "WIDTHxHEIGHT"),
        (["generate", "x", "--image", "absent.png"], 1, "give a PNG, JPEG, WebP, AVIF, GIF or HEIC"),
        (["generate", "x", "--video", "absent.mp4"], 1, "--video absent.mp4: No such file or directory; give an MP4"),
        (["generate", "x", "--video", "."], 1, "--video .: Is a directory; give an MP4"),
        (["generate", "x", "--video", "/dev/null"], 1, "video is empty; an MP4, MOV or WebM film"),
        (["generate", ""], 1, "prompt must not be empty"),
        (["generate", "x", "--steps", "0"], 1, "--steps must be a whole number from 1 to 200"),
        (["generate", "x", "--guidance", "nan"], 1, "--guidance must be a number from 0 to 30"),
        (["generate", "x", "--model", "./absent"], 2, "no such folder"),
        (["models", "--model", "./guidance_scale"], 2, "'./guidance_scale': no such folder"),
        (["generate", "x", "--device", "warp"], 2, "give auto, cpu or cuda:0"),
        (["generate", "x", "--engine", "fake", "-o", "x.avi"], 1, "give one that ends in .mp4"),
        (["generate", "x", "--engine", "fake", "-o", "/dev/full"], 1, "give one that ends in .mp4"),
        (["generate", "x", "--engine", "fake", "-o", "/proc/nope/x.mp4"], 1, "--output /proc/nope/x.mp4 cannot be"),
        (["generate", "x\udcff", "--engine", "fake"], 1, "prompt is not valid Unicode"),
        (["generate", "x", "--image", "a.png", "--video", "b.mp4"], 1, "--image and --video exclude each other"),
        (["models", "--config", "absent.toml"], 2, "cannot read the settings in absent.toml"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    arguments: list[str], code: int, sentence: str, tmp_path: Path, here: Here
) -> None:
    """Exit code 2 for a configuration that cannot work, 1 for a request; no traceback, no file."""
    ended = here(*arguments)
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == code, ended.stderr
    assert sentence in ended.stderr.replace("\n", " ")
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--data-dir", "/proc/nope", "--engine", "fake", "--port", "0"], "data_dir = '/proc/nope'"),
        (["serve", "--storage", "nowhere://x", "--engine", "fake", "--port", "0"], "nowhere"),
        (["frontend", "--host", "::1%nowhere"], "server.host = '::1%nowhere'"),
        (["frontend", "--namespace", "A.b"], "cluster.namespace = 'A.b'"),
        (["worker", "--model", "./absent"], "no such folder"),
        (["serve", "--engine", "fake", "--loras", "."], "engine.wan.loras is a setting of wan, and engine.name is"),
    ],
)
def test_a_process_that_cannot_start_says_why(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    """With exit code 2, and no traceback."""
    process = Forked(arguments, os.environ, tmp_path)
    with process.stderr:
        said = process.stderr.read()
    assert (process.wait(), "Traceback" in said) == (2, False), said
    assert sentence in said.replace("\n", " ")


@pytest.mark.parametrize("command", [["config"], ["models"], ["serve", "--port", "0"], ["generate", "x"]])
def test_a_working_directory_that_is_gone_is_a_sentence(command: list[str], tmp_path: Path) -> None:
    """Relative paths mean nothing then."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.rmdir({str(gone)!r}); import kinema.cli.app as app; app.main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=gone, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "the folder in which this command was started does not exist any more" in ended.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_settings_are_shown_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    """A letter that the terminal does not have is shown as its number."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "KINEMA_DATA_DIR": "日本"}
    ended = subprocess.run(
        [sys.executable, "-m", "kinema", "config"], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert b"data_dir\t\\u65e5\\u672c\t" in ended.stdout


REFUSED = "error: the model folder model: kinema.json: num_frames 18 -> 17: must be"


@pytest.mark.parametrize("command", [["models"], ["generate", "x"], ["serve", "--port", "0"], ["worker"]])
def test_a_model_that_does_not_make_its_defaults_is_refused_alike(
    command: list[str], tmp_path: Path, here: Here, there: There
) -> None:
    """By each command that takes one, before a weight is read. Those that serve end their process."""
    write(make_folder(tmp_path / "model"), "kinema.json", {"num_frames": 18})
    if command[0] in ("models", "generate"):
        ended = here(*command, "--model", "./model")
        assert (ended.exit_code, ended.stderr[: len(REFUSED)]) == (2, REFUSED)
    else:
        process = there(*command, "--model", "./model")
        assert (process.returncode, REFUSED in process.stderr) == (2, True), process.stderr


def test_models_config_and_version_print(tmp_path: Path, there: There) -> None:
    """What is served, every setting with its origin, and the version."""
    (tmp_path / "kinema.toml").write_text("[server]\nport = 8123\n", encoding="utf-8")
    told = there("models").stdout.splitlines()[-1]
    assert told.startswith("tiny-wan\ttext, image, video\t128x128, 33 frames")
    config = there("config").stdout
    line = next(line for line in config.splitlines() if line.startswith("server.port"))
    assert line.split("\t")[:4] == ["server.port", "8123", "kinema.toml", "KINEMA_SERVER_PORT"]
    assert __version__ in run(sys.executable, "-m", "kinema", "--version", cwd=tmp_path).stdout
