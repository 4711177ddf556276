"""The sglang engine keeps its promises before the real library, on a CPU; run by `make test-sglang`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kinema.engines.base import Engine, Note
from kinema.engines.sglang.engine import SglangEngine
from kinema.errors import EngineFailed
from kinema.media.film import open_film
from tests.contract.engine import IMAGE, NUM_FRAMES, EngineContract, begin, frames_of, make_all, request_for
from tests.contract.processes import ProcessContract
from tests.contract.standins import changed_model, image_pipeline
from tests.sglang.real import engine_before_library

# The library takes 25 s to begin on two idle cores, and some tests end it.
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


class TestDiffusers(EngineContract):
    """diffusers' pipeline in the library, from text."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_library(backend="diffusers")


class TestDiffusersImages(EngineContract):
    """diffusers' pipeline in the library, from a picture."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_library(str(image_pipeline(folder)), backend="diffusers")

    def test_a_file_that_is_no_picture_is_said(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """The library logs it and returns nothing; the video fails with its reason, and the next one is made."""
        monkeypatch.setattr("kinema.engines.sglang.engine._write_image", no_picture)
        with pytest.raises(EngineFailed, match=r"sglang made no video: .*image"):
            list(begin(engine, image=IMAGE))
        monkeypatch.undo()
        assert len(frames_of(make_all(engine))) == NUM_FRAMES

    def test_a_picture_of_another_size_is_refused(self, engine: Engine) -> None:
        """Before the library sees it; and a model that begins with a picture gets one."""
        with pytest.raises(EngineFailed, match="the first frame is"):
            list(begin(engine, image=IMAGE[:32]))
        with pytest.raises(EngineFailed, match="needs a first frame"):
            list(engine.generate(request_for(engine)))


class TestOwnPipeline(EngineContract):
    """The library's own pipeline, from text."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_library(backend="sglang")


class TestDiffusersProcess(ProcessContract):
    """What diffusers' callback stops."""

    @classmethod
    def make(cls, folder: Path) -> SglangEngine:
        return engine_before_library(backend="diffusers")


class TestOwnPipelinesProcess(ProcessContract):
    """What the hook on the library's progress bar stops."""

    @classmethod
    def make(cls, folder: Path) -> SglangEngine:
        return engine_before_library(backend="sglang")


def test_a_size_that_the_library_does_not_keep_is_measured(tmp_path: Path) -> None:
    """Of a model whose config gives its VAE twice its factor: the library says 96x64, and makes half of that."""
    model = changed_model(tmp_path, "vae/config.json", {"scale_factor_spatial": 16})
    engine = engine_before_library(str(model), backend="sglang")
    engine.load()
    try:
        outputs = make_all(engine)
    finally:
        engine.close()
    assert frames_of(outputs).shape == (NUM_FRAMES, 32, 48, 3)
    (note,) = (output.text for output in outputs if isinstance(output, Note))
    assert note == "sglang made 9 frames of 48x32, not 9 frames of 96x64"


def test_the_command_makes_a_film(tmp_path: Path) -> None:
    """By the settings alone, as anybody begins."""
    path = tmp_path / "film.mp4"
    command = [
        "generate",
        "a red circle",
        "--engine",
        "sglang",
        "--output",
        str(path),
        "--num-frames",
        "9",
        "--steps",
        "2",
    ]
    subprocess.run([sys.executable, "-m", "kinema", *command], check=True, cwd=tmp_path)
    shape = open_film(path).shape
    assert (str(shape.size), shape.num_frames_at(16)) == ("128x128", 9)


def no_picture(_image: object, path: Path) -> Path:
    path.write_bytes(b"no picture")
    return path
