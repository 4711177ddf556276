"""What every engine promises, as tests: see ``engines/base.py``.

A subclass says which engine; the same tests then run on it. What an engine does not offer, by its own word, is not
asked for: the test says so and is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from kinema.engines.base import Engine, Frames, Inputs, Output, Step, UInt8Array
from kinema.errors import GenerationError, InvalidRequest, RequestError, UnsupportedRequest
from kinema.media.planes import to_rgb
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.request.shapes import Size

NUM_STEPS, NUM_FRAMES, SIZE = 4, 9, Size(width=96, height=64)
IMAGE = np.random.default_rng(5).integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
FILM = np.random.default_rng(6).integers(0, 256, (NUM_FRAMES, SIZE.height, SIZE.width, 3), dtype=np.uint8)

# The stages of a load and the part of each, in the order in which they were reported.
Stages = list[tuple[str, float | None]]


class EngineContract:
    """Subclasses make their engine; it is loaded once for all tests of the class."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        """Not loaded. ``folder`` is for whatever it needs to be made."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def unloaded(cls, tmp_path_factory: pytest.TempPathFactory) -> Engine:
        return cls.make(tmp_path_factory.mktemp("engine"))

    @pytest.fixture(scope="class")
    @classmethod
    def stages(cls) -> Stages:
        """What the load reported."""
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, unloaded: Engine, stages: Stages) -> Iterator[Engine]:
        unloaded.load(lambda stage, part: stages.append((stage, part)))
        yield unloaded
        unloaded.close()

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, engine: Engine) -> UInt8Array:
        """The frames of the usual request, made by itself."""
        return frames_of(make_all(engine))

    def test_capabilities_are_known_before_the_model_is_loaded(self, unloaded: Engine) -> None:
        """And they accept the preset's own request."""
        can = unloaded.capabilities
        assert can.is_text_to_video or can.is_image_to_video
        image_size = None if can.is_text_to_video else can.preset.size
        request = resolve(GenerationOptions(prompt="a cat"), can, image_size).request
        assert (request.num_frames, request.fps) == (can.preset.num_frames, can.preset.fps)

    def test_facts_are_known_once_it_is_loaded(self, engine: Engine) -> None:
        """They go into a manifest, and name the engine as its capabilities do."""
        assert engine.facts.engine == engine.capabilities.engine
        assert engine.facts.versions

    def test_a_load_reports_its_stages(self, engine: Engine, stages: Stages) -> None:
        """In words, each once, with the part of it that is done where that is known."""
        assert engine.facts.versions  # it is loaded
        names = [stage for stage, _ in stages]
        assert names
        assert all(re.fullmatch(r"[a-z][a-zA-Z ]+", name) for name in names)
        assert [name for name, _ in groupby(names)] == list(dict.fromkeys(names))
        for name in set(names):
            parts = [part for stage, part in stages if stage == name and part is not None]
            assert parts == sorted(parts)
            assert all(0 <= part <= 1 for part in parts)

    def test_steps_come_first_and_then_the_frames(self, engine: Engine) -> None:
        """Each counted from 1 to its total; frames as uint8 in the request's size and number."""
        outputs = make_all(engine)
        assert [(o.index, o.total) for o in outputs[:NUM_STEPS] if isinstance(o, Step)] == counted(NUM_STEPS)
        chunks = [output for output in outputs[NUM_STEPS:] if isinstance(output, Frames)]
        assert len(chunks) == len(outputs) - NUM_STEPS
        assert [(chunk.index, chunk.total) for chunk in chunks] == counted(len(chunks))
        frames = frames_of(outputs)
        assert frames.shape == (NUM_FRAMES, SIZE.height, SIZE.width, 3)
        assert frames.dtype == np.uint8

    def test_sound_comes_with_the_frames_as_the_capabilities_say(self, engine: Engine) -> None:
        """As long as they are shown, and the same for the same request."""
        first, again = ([one for one in make_all(engine) if isinstance(one, Frames)] for _ in range(2))
        if not engine.capabilities.has_sound:
            assert all(chunk.sound is None for chunk in first)
            return
        samples, others = (
            np.concatenate([chunk.sound.samples for chunk in made if chunk.sound]) for made in (first, again)
        )
        assert np.array_equal(samples, others)
        assert len(samples) > 0

    @pytest.mark.parametrize(("num_frames", "size"), [(1, "64x64"), (5, "64x96"), (17, "128x64")])
    def test_every_shape_is_made_as_asked(self, engine: Engine, num_frames: int, size: str) -> None:
        """A single frame, tall and wide; of the number of frames nearest to it that the model makes."""
        asked = Size.parse(size)
        made = engine.capabilities.limits.frames_near(num_frames)
        frames = frames_of(make_all(engine, num_frames=num_frames, size=size))
        assert frames.shape == (made, asked.height, asked.width, 3)

    @pytest.mark.parametrize("num_steps", [1, 120])
    def test_every_number_of_steps_is_taken_as_asked(self, engine: Engine, num_steps: int) -> None:
        """One, and more than there are percents."""
        outputs = make_all(engine, num_inference_steps=num_steps, num_frames=1, size="64x64", guidance_scale=1)
        steps = [output for output in outputs if isinstance(output, Step)]
        assert [(step.index, step.total) for step in steps] == counted(num_steps)

    def test_the_same_request_makes_the_same_frames(self, engine: Engine, alone: UInt8Array) -> None:
        """Bit for bit; another seed and another prompt make others."""
        assert np.array_equal(frames_of(make_all(engine)), alone)
        assert not np.array_equal(frames_of(make_all(engine, seed=4)), alone)
        assert not np.array_equal(frames_of(make_all(engine, prompt="a blue square moving up")), alone)

    def test_guidance_and_the_negative_prompt_count(self, engine: Engine, alone: UInt8Array) -> None:
        """Both change the frames."""
        assert not np.array_equal(frames_of(make_all(engine, negative_prompt="blurry bad sky")), alone)
        if engine.capabilities.engine != "fake":  # whose pictures know no guidance
            assert not np.array_equal(frames_of(make_all(engine, guidance_scale=1.0)), alone)

    @pytest.mark.parametrize("num_taken", [0, 1, 2, NUM_STEPS, NUM_STEPS + 1])
    def test_closing_in_the_middle_frees_the_engine(self, engine: Engine, alone: UInt8Array, num_taken: int) -> None:
        """Before the first step, between steps, before the frames and among them; the next video is as ever."""
        outputs = begin(engine)
        for _ in range(num_taken):
            next(outputs)
        outputs.close()
        assert np.array_equal(frames_of(make_all(engine)), alone)

    def test_generations_that_take_turns_make_what_each_makes_alone(self, engine: Engine, alone: UInt8Array) -> None:
        """Where the engine lets them."""
        if not engine.capabilities.is_interleaved:
            pytest.skip(f"the {engine.capabilities.engine} engine makes one video after the other, and says so")
        other = frames_of(make_all(engine, seed=4))
        first, second = begin(engine), begin(engine, seed=4)
        outputs: tuple[list[Output], list[Output]] = ([], [])
        for one, two in zip(first, second, strict=True):
            outputs[0].append(one)
            outputs[1].append(two)
        assert np.array_equal(frames_of(outputs[0]), alone)
        assert np.array_equal(frames_of(outputs[1]), other)

    def test_making_room_changes_no_frame(self, engine: Engine, alone: UInt8Array) -> None:
        """Before it begins, and after each of its outputs."""
        engine.make_room()
        outputs = []
        for output in begin(engine):
            outputs.append(output)
            engine.make_room()
        assert np.array_equal(frames_of(outputs), alone)

    def test_resumed_equals_uninterrupted(self, engine: Engine, alone: UInt8Array) -> None:
        """From each step, where there are checkpoints; what is no checkpoint begins again, everywhere."""
        again = list(begin(engine, resume=b"no checkpoint"))
        assert again[0] == Step(1, NUM_STEPS)
        assert np.array_equal(frames_of(again), alone)
        checkpoints = [step.checkpoint() for step in begin(engine) if isinstance(step, Step) and step.checkpoint]
        assert len(checkpoints) == NUM_STEPS * engine.capabilities.has_checkpoints
        if not checkpoints:
            pytest.skip(f"the {engine.capabilities.engine} engine makes no checkpoints, and says so")
        for num_done, checkpoint in enumerate(checkpoints, start=1):
            outputs = list(begin(engine, resume=checkpoint))
            assert [step.index for step in outputs if isinstance(step, Step)] == [*range(num_done + 1, NUM_STEPS + 1)]
            assert np.array_equal(frames_of(outputs), alone)

    def test_previews_are_small_pictures(self, engine: Engine) -> None:
        """Where steps have them."""
        pictures = [step.preview() for step in begin(engine) if isinstance(step, Step) and step.preview]
        assert len(pictures) == NUM_STEPS * engine.capabilities.has_previews
        if not pictures:
            pytest.skip(f"the {engine.capabilities.engine} engine has no previews, and says so")
        assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)

    def test_a_first_frame_counts(self, engine: Engine) -> None:
        """Another image makes another video, the same one the same."""
        if not engine.capabilities.is_image_to_video:
            pytest.skip(f"{engine.capabilities.model} makes no videos from images with this engine, and says so")
        first = frames_of(make_all(engine, image=IMAGE))
        assert first.shape == (NUM_FRAMES, SIZE.height, SIZE.width, 3)
        assert np.array_equal(frames_of(make_all(engine, image=IMAGE)), first)
        assert not np.array_equal(frames_of(make_all(engine, image=255 - IMAGE)), first)

    def test_a_last_frame_counts_or_is_refused(self, engine: Engine) -> None:
        """Another one makes another video; an engine that takes none fails with an error of ours, and goes on."""
        both = Inputs(first_frame=IMAGE, last_frame=255 - IMAGE)
        if not engine.capabilities.is_first_last_frame_to_video:
            with pytest.raises(GenerationError):
                list(engine.generate(request_for(engine), both))
            assert frames_of(make_all(engine)).shape[0] == NUM_FRAMES
            return
        made = frames_of(list(engine.generate(request_for(engine), both)))
        assert made.shape == (NUM_FRAMES, SIZE.height, SIZE.width, 3)
        assert np.array_equal(frames_of(list(engine.generate(request_for(engine), both))), made)
        assert not np.array_equal(frames_of(make_all(engine, image=IMAGE)), made)

    def test_what_cannot_be_made_is_refused_before_it_gets_here(self, engine: Engine) -> None:
        """By the capabilities alone, with errors that a client may read."""
        can = engine.capabilities
        refused = [{"size": "65x64"}, {"num_frames": can.limits.max_frames + 1}, {"num_inference_steps": 0}]
        for options in refused:
            with pytest.raises(RequestError):
                resolve(GenerationOptions.model_validate({"prompt": "a cat", **options}), can)
        if not can.is_image_to_video:
            with pytest.raises(UnsupportedRequest):
                resolve(GenerationOptions(prompt="a cat"), can, SIZE)
        if can.is_image_to_video and not can.is_first_last_frame_to_video:
            with pytest.raises(UnsupportedRequest, match="takes no last frame"):
                resolve(GenerationOptions(prompt="a cat"), can, SIZE, has_last_frame=True)
        for name in can.fixed_options:
            with pytest.raises((InvalidRequest, UnsupportedRequest)):
                resolve(GenerationOptions.model_validate({"prompt": "a cat", name: 0.123}), can)

    def test_a_film_is_edited_or_refused(self, engine: Engine) -> None:
        """An engine that edits none fails with an error of ours, and makes the next video."""
        request = request_for(engine).model_copy(update={"strength": 0.5})
        if engine.capabilities.is_video_to_video:
            outputs = list(engine.generate(request, Inputs(film=FILM)))
            assert frames_of(outputs).shape == FILM.shape
            return
        with pytest.raises(GenerationError):
            list(engine.generate(request, Inputs(film=FILM)))
        assert frames_of(make_all(engine)).shape[0] == NUM_FRAMES


def request_for(engine: Engine, **options: object) -> GenerationRequest:
    can = engine.capabilities
    asked = {"num_frames": NUM_FRAMES, "num_inference_steps": NUM_STEPS, "seed": 3, "size": str(SIZE), **options}
    made = GenerationOptions.model_validate({"prompt": "a red circle moving right", "guidance_scale": 5.0, **asked})
    return resolve(made, can, None if can.is_text_to_video else SIZE).request


def begin(
    engine: Engine, image: UInt8Array | None = None, resume: bytes | None = None, **options: object
) -> Generator[Output, None, None]:
    """A generation of the usual request, from text where the engine makes videos from text."""
    request = request_for(engine, **options)
    if image is None and not engine.capabilities.is_text_to_video:
        image = np.resize(IMAGE, (request.height, request.width, 3))
    return engine.generate(request, Inputs(first_frame=image), resume)


def make_all(engine: Engine, **options: object) -> list[Output]:
    return list(begin(engine, **options))  # type: ignore[arg-type]


def frames_of(outputs: list[Output]) -> UInt8Array:
    """The whole video (f, h, w, 3) uint8 RGB, whichever way the engine gives its frames."""
    return np.concatenate([_rgb(output.data) for output in outputs if isinstance(output, Frames)])


def _rgb(frames: UInt8Array) -> UInt8Array:
    return frames if frames.ndim == 4 else np.stack([to_rgb(planes) for planes in frames])


def counted(total: int) -> list[tuple[int, int]]:
    return [(number, total) for number in range(1, total + 1)]
