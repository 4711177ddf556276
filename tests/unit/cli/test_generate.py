"""One video to one file: the file is replaced by a whole one or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from kinema.cli.generate import generate_file, saved_film
from kinema.cli.given import InputPaths
from kinema.cli.terminal import run_generate
from kinema.engines.base import Note, Output
from kinema.engines.fake import FakeEngine
from kinema.errors import InvalidRequest, KinemaError, StorageUnavailable
from kinema.inputs import prepare
from kinema.media.film import open_film
from kinema.request.options import NOTHING_GIVEN, GenerationOptions, Given
from kinema.settings import EngineSettings
from kinema.shell import as_flags

OPTIONS = GenerationOptions(prompt="a cat", size="64x64", num_frames=5, num_inference_steps=1, seed=1)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A film that was there before."""
    path = tmp_path / "film.mp4"
    path.write_bytes(b"an older film")
    yield path
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"], "something was left behind"


def make(path: Path, *, stopped_by: BaseException | None = None) -> None:
    engine = FakeEngine()
    prepared = prepare(NOTHING_GIVEN, OPTIONS, engine.capabilities)

    def on_output(output: Output) -> None:
        if stopped_by is not None and output.index == 2:
            raise stopped_by

    with saved_film(path) as unfinished:
        generate_file(engine, prepared, unfinished, on_output)


def test_a_film_takes_the_place_of_an_older_one(old: Path) -> None:
    """With the permissions of a file that anybody makes."""
    make(old)
    with av.open(str(old)) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5
    mask = os.umask(0)
    os.umask(mask)
    assert old.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_film_is_edited(old: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It gives size, rate and length, and with little strength it is what one sees."""
    source = tmp_path_factory.mktemp("source") / "source.mp4"
    make(source)
    can = FakeEngine().capabilities
    given = Given(edits=source.read_bytes())
    prepared = prepare(given, GenerationOptions(prompt="a dog", strength=0.25, seed=1), can)
    request = prepared.request
    assert (str(request.size), request.num_frames, request.strength) == ("64x64", 5, 0.25)
    with saved_film(old) as unfinished:
        generate_file(FakeEngine(), prepared, unfinished, lambda _output: None)
    edited, first = (open_film(path).fit(request.size, request.fps, 5).frames for path in (old, source))
    assert np.abs(edited.astype(int) - first).mean() < 40
    fitted = prepare(given, GenerationOptions(prompt="a dog", size="96x64"), can)
    assert fitted.warnings[-1] == "video 64x64 was scaled and cropped to 96x64"


def test_a_film_that_is_continued_is_fitted_with_a_note(tmp_path: Path) -> None:
    """The new film is behind the older one, in the size that was asked for."""
    source = tmp_path / "source.mp4"
    make(source)
    options = GenerationOptions(prompt="it goes on", size="96x64", num_frames=5, num_inference_steps=1, seed=1)
    prepared = prepare(Given(continues=source.read_bytes()), options, FakeEngine().capabilities)
    assert prepared.warnings == ("video 64x64 was scaled and cropped to 96x64",)
    generate_file(FakeEngine(), prepared, tmp_path / "longer.mp4", lambda _output: None)
    longer = open_film(tmp_path / "longer.mp4").shape
    assert (str(longer.size), longer.num_frames) == ("96x64", 9)


def test_a_film_has_the_size_of_its_frames(tmp_path: Path) -> None:
    """An engine that makes another than was asked for says so, and who looks on is told."""
    engine, outputs = FakeEngine(), list[Output]()
    options = OPTIONS.model_copy(update={"prompt": "waves [narrow]"})
    prepared = prepare(NOTHING_GIVEN, options, engine.capabilities)
    generate_file(engine, prepared, tmp_path / "film.mp4", outputs.append)
    assert str(open_film(tmp_path / "film.mp4").shape.size) == "48x64"
    assert Note("the video is 48 pixels wide, not 64") in outputs


def test_an_image_and_a_film_exclude_each_other(tmp_path: Path) -> None:
    """An edit has its frames already."""
    image, film = Path("a.png"), Path("b.mp4")
    for inputs, flag in ((InputPaths(image, None, film), "--image"), (InputPaths(None, image, film), "--last-frame")):
        with pytest.raises(InvalidRequest, match=f"{flag} and --video exclude each other"):
            run_generate(EngineSettings(name="fake"), OPTIONS, inputs, tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), InvalidRequest("no")])
def test_what_was_there_stays_when_the_film_fails(old: Path, reason: BaseException) -> None:
    """Also on Ctrl-C."""
    with pytest.raises(type(reason)):
        make(old, stopped_by=reason)
    assert old.read_bytes() == b"an older film"


@pytest.mark.parametrize("error", [OSError, av.error.ExternalError])
def test_a_full_disk_is_one_sentence(old: Path, error: type[Exception]) -> None:
    """Whichever library found it full."""
    with pytest.raises(StorageUnavailable, match=r"--output .*film\.mp4 cannot be written: No space left"):
        make(old, stopped_by=error(errno.ENOSPC, "No space left on device"))
    assert old.read_bytes() == b"an older film"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The file that it names is replaced."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "film.mp4"
    link.symlink_to(tmp_path / "elsewhere" / "real.mp4")
    make(link)
    assert link.is_symlink()
    assert link.stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("film.avi", "ends in .mp4, .webm, .gif"),
        ("film", "ends in .mp4"),
        ("folder.mp4", "is not a file"),
        ("pipe.mp4", "is not a file"),
        ("text/film.mp4", "cannot be written: "),
        ("x" * 300 + ".mp4", "cannot be written: File name too long"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_work(name: str, sentence: str, tmp_path: Path) -> None:
    """The block is not entered."""
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "text").write_text("")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(KinemaError) as refused, saved_film(tmp_path / name):
        pytest.fail("the block was entered")
    assert sentence in refused.value.message


def test_a_sentence_about_fields_is_told_in_flags() -> None:
    """Whole names alone: a longer one is another field."""
    told = as_flags("num_inference_steps: see guidance_scale_2, guidance_scale, input_reference and last_frame")
    assert told == "--steps: see guidance_scale_2, --guidance, --image and --last-frame"
