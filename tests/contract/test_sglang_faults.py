"""What the library gets wrong in silence, the sglang engine says. Words in the prompt tell the stand-in what to do."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kinema.engines.base import Frames, Inputs, Note, UInt8Array
from kinema.engines.sglang.engine import SglangEngine
from kinema.engines.sglang.process_group import members_of
from kinema.engines.wan.checkpoint import BUNDLED
from kinema.errors import ConfigError, EngineFailed, OutOfMemory, WorkerLost
from tests.contract.engine import FILM, IMAGE, NUM_FRAMES, SIZE, begin, frames_of, make_all, request_for
from tests.contract.processes import LONG
from tests.contract.standins import engine_before_standin


@pytest.fixture(scope="module")
def engine() -> Iterator[SglangEngine]:
    made = engine_before_standin(sglang={"backend": "sglang"})
    made.load()
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(engine: SglangEngine) -> UInt8Array:
    return frames_of(make_all(engine))


@pytest.fixture
def make_engine() -> Iterator[Callable[..., SglangEngine]]:
    """Engines of other settings, closed at the end."""
    made = []

    def make(**settings: object) -> SglangEngine:
        made.append(engine_before_standin(**settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("[error]", "the tensor is sad"),
        ("[raise]", "the parameters are bad"),
        ("[nothing]", "made nothing and did not say why"),
        ("[float]", "of float32, not"),
    ],
)
def test_an_error_that_the_library_swallows_is_said(
    engine: SglangEngine, alone: UInt8Array, prompt: str, reason: str
) -> None:
    """With its reason where there is one; nothing is loaded again, and the next video is as ever."""
    group = engine.process_group
    with pytest.raises(EngineFailed, match=f"^sglang made no video: .*{reason}"):
        make_all(engine, prompt=prompt)
    assert np.array_equal(frames_of(make_all(engine)), alone)
    assert engine.process_group == group


def test_memory_that_does_not_do_is_said_as_such(engine: SglangEngine) -> None:
    """As by every engine."""
    with pytest.raises(OutOfMemory):
        make_all(engine, prompt="[oom]")


def test_a_device_that_failed_loses_the_worker(engine: SglangEngine) -> None:
    """Its process keeps it, and would fail every video. The words of a prompt that it repeats do not count."""
    with pytest.raises(WorkerLost, match="illegal memory access"):
        make_all(engine, prompt="[cuda]")
    with pytest.raises(EngineFailed, match="sad about"):
        make_all(engine, prompt="[error] CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ("[size]", (NUM_FRAMES, SIZE.height - 16, SIZE.width)),
        ("[frames]", (NUM_FRAMES - 4, SIZE.height, SIZE.width)),
    ],
)
def test_a_video_of_another_size_or_length_comes_with_a_note(
    engine: SglangEngine, prompt: str, made: tuple[int, int, int]
) -> None:
    """Both are measured on the frames, whatever the library says; all that was made is given."""
    outputs = make_all(engine, prompt=prompt)
    assert frames_of(outputs).shape == (*made, 3)
    (note,) = (output for output in outputs if isinstance(output, Note))
    num_frames, height, width = made
    assert note.text == f"sglang made {num_frames} frames of {width}x{height}, not {NUM_FRAMES} frames of {SIZE}"
    chunks = [output for output in outputs if isinstance(output, Frames)]
    assert outputs.index(note) < outputs.index(chunks[0])
    assert [(chunk.index, chunk.total) for chunk in chunks] == [(n, len(chunks)) for n in range(1, len(chunks) + 1)]


def test_a_video_as_it_was_asked_for_has_no_note(engine: SglangEngine) -> None:
    """A warning is for what differs."""
    assert not any(isinstance(output, Note) for output in make_all(engine))


def test_a_worker_that_dies_by_itself_fails_the_video(engine: SglangEngine, alone: UInt8Array) -> None:
    """And not the next one."""
    with pytest.raises(EngineFailed, match="SIGKILL"):
        make_all(engine, prompt="[die]")
    assert np.array_equal(frames_of(make_all(engine)), alone)


def test_a_library_that_hangs_is_begun_again(make_engine: Callable[..., SglangEngine]) -> None:
    """After the silence that the settings allow."""
    engine = make_engine(sglang={"backend": "sglang", "silence_s": 4.0})
    engine.load()
    group = engine.process_group
    assert group is not None
    began = time.monotonic()
    with pytest.raises(EngineFailed, match="said nothing for 4 s"):
        make_all(engine, prompt="[hang]")
    assert time.monotonic() - began < 20
    assert members_of(group) == []
    assert len(frames_of(make_all(engine))) == NUM_FRAMES


def test_a_video_of_several_ranks_is_cancelled_by_a_new_start(make_engine: Callable[..., SglangEngine]) -> None:
    """One that stops alone would leave the others waiting."""
    engine = make_engine(device="cuda", sglang={"backend": "sglang", "tp_size": 2})
    engine.load()
    group = engine.process_group
    assert group is not None
    outputs = begin(engine, **LONG)
    next(outputs)
    outputs.close()
    assert members_of(group) == []
    assert len(frames_of(make_all(engine))) == NUM_FRAMES


def test_weights_that_are_damaged_do_not_reach_the_library(tmp_path: Path) -> None:
    """It would read them in its own way, or all of them."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny-wan"], model)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    engine = engine_before_standin(str(model))
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.safetensors is cut off"):
        engine.load()
    assert engine.process_group is None


def test_a_library_that_does_not_load_says_why(
    make_engine: Callable[..., SglangEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fails with its reason, and nothing of it stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = make_engine(sglang={"backend": "sglang", "lora": "missing"})
    with pytest.raises(ConfigError, match="sglang cannot load tiny-wan: no such adapter"):
        engine.load()
    assert engine.process_group is None
    assert list(tmp_path.iterdir()) == []


def test_what_no_request_asks_for_is_refused(engine: SglangEngine) -> None:
    """A picture for a model that takes none, a film, and a picture of another size."""
    with pytest.raises(EngineFailed, match="takes no first frame"):
        list(engine.generate(request_for(engine), Inputs(first_frame=IMAGE)))
    with pytest.raises(EngineFailed, match="takes no film"):
        list(engine.generate(request_for(engine), Inputs(film=FILM)))
    images = engine_before_standin("tiny-wan", sglang={"backend": "diffusers"})
    assert not images.capabilities.is_image_to_video


def test_two_videos_at_once_are_made_one_after_the_other(engine: SglangEngine, alone: UInt8Array) -> None:
    """The second begins at the end of the first, and both are whole."""
    first, second = begin(engine), begin(engine, seed=4)
    outputs = [next(first)]
    other = list(second)
    outputs += list(first)
    assert np.array_equal(frames_of(outputs), alone)
    assert np.array_equal(frames_of(other), frames_of(make_all(engine, seed=4)))
