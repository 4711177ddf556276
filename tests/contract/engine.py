"""What every engine promises, as tests: see ``engines/base.py``.

A subclass says which engine; the same tests then run on it. What an engine does not offer, by its own word, is not
asked for: the test says so and is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from kinema.engines.base import Engine, Frames, Inputs, Note, Output, Step, UInt8Array
from kinema.errors import GenerationError, InvalidRequest, RequestError, UnsupportedRequest
from kinema.media.planes import to_rgb
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import Others, resolve, resolve_alone
from kinema.request.shapes import FilmShape, Size

NUM_STEPS, NUM_FRAMES, SIZE = 4, 9, Size(width=96, height=64)
IMAGE = np.random.default_rng(5).integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
FILM = np.random.default_rng(6).integers(0, 256, (NUM_FRAMES, SIZE.height, SIZE.width, 3), dtype=np.uint8)

# The stages of a load and the part of each, in the order in which they were reported.
Stages = list[tuple[str, float | None]]


class EngineContract:
    """Subclasses make their engine; it is loaded once for all tests of the class.

    ``reads_prompts`` and ``has_guidance`` are False for an engine whose frames do not depend on these.
    """

    reads_prompts = True
    has_guidance = True

    def shape_made(self, engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
        """That of the frames (f, h, w, 3) which the engine makes for it."""
        return shape_of(request)

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
        assert can.is_text_to_video or can.is_image_to_video or can.is_video_to_video
        request = resolve_alone(GenerationOptions(prompt="a cat"), can).request
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
        request, outputs = request_for(engine), make_all(engine)
        num_steps = request.num_denoising_steps
        assert [(o.index, o.total) for o in outputs[:num_steps] if isinstance(o, Step)] == counted(num_steps)
        chunks = [output for output in outputs[num_steps:] if isinstance(output, Frames)]
        notes = [output for output in outputs if isinstance(output, Note)]
        assert len(chunks) == len(outputs) - num_steps - len(notes)
        assert [(chunk.index, chunk.total) for chunk in chunks] == counted(len(chunks))
        frames = frames_of(outputs)
        assert frames.shape == self.shape_made(engine, request)
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
        limits = engine.capabilities.limits
        asked = made_size(engine.capabilities, Size.parse(size))
        if limits.sizes and asked not in limits.sizes:
            pytest.skip(f"{engine.capabilities.model} makes other sizes, and says so")
        options = {"num_frames": min(num_frames, limits.max_frames), "size": str(asked)}
        request = request_for(engine, **options)
        assert (request.num_frames, request.size) == (limits.frames_near(num_frames), asked)
        assert frames_of(make_all(engine, **options)).shape == self.shape_made(engine, request)

    @pytest.mark.parametrize("num_steps", [1, 120])
    def test_every_number_of_steps_is_taken_as_asked(self, engine: Engine, num_steps: int) -> None:
        """The least, and more than there are percents."""
        options: dict[str, object] = {"num_frames": 1, "guidance_scale": 1}
        asked = max(num_steps, engine.capabilities.limits.min_steps)
        options["size"] = str(made_size(engine.capabilities, Size.parse("64x64")))
        steps = [one for one in make_all(engine, num_inference_steps=asked, **options) if isinstance(one, Step)]
        assert [(step.index, step.total) for step in steps] == counted(asked)

    def test_the_same_request_makes_the_same_frames(self, engine: Engine, alone: UInt8Array) -> None:
        """Bit for bit; another seed and another prompt make others."""
        assert np.array_equal(frames_of(make_all(engine)), alone)
        assert not np.array_equal(frames_of(make_all(engine, seed=4)), alone)
        other = frames_of(make_all(engine, prompt="a blue square moving up"))
        assert np.array_equal(other, alone) == (not self.reads_prompts)

    def test_guidance_and_the_negative_prompt_count(self, engine: Engine, alone: UInt8Array) -> None:
        """Both change the frames; a model that takes none of them says so."""
        fixed = engine.capabilities.fixed_options
        if "negative_prompt" not in fixed:
            assert not np.array_equal(frames_of(make_all(engine, negative_prompt="blurry bad sky")), alone)
        if self.has_guidance and "guidance_scale" not in fixed:
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
        num_steps = request_for(engine).num_denoising_steps
        assert again[0] == Step(1, num_steps)
        assert np.array_equal(frames_of(again), alone)
        checkpoints = [step.checkpoint() for step in begin(engine) if isinstance(step, Step) and step.checkpoint]
        assert len(checkpoints) == num_steps * engine.capabilities.has_checkpoints
        if not checkpoints:
            pytest.skip(f"the {engine.capabilities.engine} engine makes no checkpoints, and says so")
        for num_done, checkpoint in enumerate(checkpoints, start=1):
            outputs = list(begin(engine, resume=checkpoint))
            assert [step.index for step in outputs if isinstance(step, Step)] == [*range(num_done + 1, num_steps + 1)]
            assert np.array_equal(frames_of(outputs), alone)

    def test_previews_are_small_pictures(self, engine: Engine) -> None:
        """Where steps have them."""
        pictures = [step.preview() for step in begin(engine) if isinstance(step, Step) and step.preview]
        assert len(pictures) == request_for(engine).num_denoising_steps * engine.capabilities.has_previews
        if not pictures:
            pytest.skip(f"the {engine.capabilities.engine} engine has no previews, and says so")
        assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)

    def test_a_first_frame_counts(self, engine: Engine) -> None:
        """Another image makes another video, the same one the same."""
        if not engine.capabilities.is_image_to_video:
            pytest.skip(f"{engine.capabilities.model} makes no videos from images with this engine, and says so")
        first = frames_of(make_all(engine, image=IMAGE))
        assert first.shape == self.shape_made(engine, request_for(engine))
        assert np.array_equal(frames_of(make_all(engine, image=IMAGE)), first)
        assert not np.array_equal(frames_of(make_all(engine, image=255 - IMAGE)), first)

    def test_a_last_frame_counts_or_is_refused(self, engine: Engine) -> None:
        """Another one makes another video; an engine that takes none fails with an error of ours, and goes on."""
        request = request_for(engine)
        given = inputs_for(engine, request, IMAGE)
        both = replace(given, last_frame=255 - np.resize(IMAGE, shape_of(request)[1:]))
        if not engine.capabilities.is_first_last_frame_to_video:
            with pytest.raises(GenerationError):
                list(engine.generate(request, both))
            assert frames_of(make_all(engine)).shape == self.shape_made(engine, request)
            return
        made = frames_of(list(engine.generate(request, both)))
        assert made.shape == self.shape_made(engine, request)
        assert np.array_equal(frames_of(list(engine.generate(request, both))), made)
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
                resolve(GenerationOptions(prompt="a cat"), can, SIZE, has_last_frame=True, others=needed(can))
        for name in can.fixed_options:
            wrong = "a dog" if name == "negative_prompt" else 0.123
            with pytest.raises((InvalidRequest, UnsupportedRequest)):
                resolve(GenerationOptions.model_validate({"prompt": "a cat", name: wrong}), can)

    def test_a_film_is_edited_or_refused(self, engine: Engine) -> None:
        """An engine that edits none fails with an error of ours, and makes the next video."""
        can, request = engine.capabilities, request_for(engine)
        film = np.resize(FILM, shape_of(request))
        if can.is_video_to_video:
            strength = 1.0 if can.edits_whole_films else 0.5
            outputs = list(engine.generate(request.model_copy(update={"strength": strength}), Inputs(film=film)))
            assert frames_of(outputs).shape == film.shape
            return
        with pytest.raises(GenerationError):
            list(engine.generate(request.model_copy(update={"strength": 0.5}), Inputs(film=film)))
        assert frames_of(make_all(engine)).shape == self.shape_made(engine, request)


def needed(can: Capabilities) -> Others:
    """The films of control that the model makes no video without, as long as any video."""
    fps = can.preset.fps
    film = FilmShape(SIZE, can.limits.max_frames, Fraction(fps), Fraction(can.limits.max_frames, fps))
    return Others(control_videos=(film,) * len(can.control_videos) if can.needs_control_video else ())


def made_size(can: Capabilities, size: Size) -> Size:
    """The smallest size that the model makes and that is not smaller."""
    step = can.limits.size_multiple
    return Size(width=-(-size.width // step) * step, height=-(-size.height // step) * step)


def request_for(engine: Engine, **options: object) -> GenerationRequest:
    """The usual request with these options, as the model makes it: the length is the nearest."""
    can = engine.capabilities
    usual = {"num_frames": NUM_FRAMES, "num_inference_steps": NUM_STEPS, "size": str(made_size(can, SIZE))}
    asked = {"prompt": "a red circle moving right", "guidance_scale": 5.0, "seed": 3, **usual, **options}
    made = GenerationOptions.model_validate(asked)
    if not (can.is_text_to_video or can.is_image_to_video):
        film = FilmShape(SIZE, can.limits.max_frames, Fraction(can.preset.fps), Fraction(1000))
        return resolve(made, can, edits=film).request
    return resolve(made, can, None if can.is_text_to_video else SIZE, others=needed(can)).request


def inputs_for(engine: Engine, request: GenerationRequest, image: UInt8Array | None = None) -> Inputs:
    """What the model makes no video without, and a first frame where one is given."""
    can, film = engine.capabilities, np.resize(FILM, shape_of(request))
    if image is None and can.is_image_to_video and not can.is_text_to_video:
        image = IMAGE
    control = tuple(film // number for number, _ in enumerate(can.control_videos, start=1))
    return Inputs(
        first_frame=None if image is None else np.resize(image, film.shape[1:]),
        film=None if can.is_text_to_video or can.is_image_to_video else film,
        control_video=control if can.needs_control_video else (),
    )


def begin(
    engine: Engine, image: UInt8Array | None = None, resume: bytes | None = None, **options: object
) -> Generator[Output, None, None]:
    """A generation of the usual request, from text where the engine makes videos from text."""
    request = request_for(engine, **options)
    return engine.generate(request, inputs_for(engine, request, image), resume)


def shape_of(request: GenerationRequest) -> tuple[int, int, int, int]:
    """That of its frames."""
    return (request.num_frames, request.height, request.width, 3)


def make_all(engine: Engine, **options: object) -> list[Output]:
    return list(begin(engine, **options))  # type: ignore[arg-type]


def frames_of(outputs: list[Output]) -> UInt8Array:
    """The whole video (f, h, w, 3) uint8 RGB, whichever way the engine gives its frames."""
    return np.concatenate([_rgb(output.data) for output in outputs if isinstance(output, Frames)])


def _rgb(frames: UInt8Array) -> UInt8Array:
    return frames if frames.ndim == 4 else np.stack([to_rgb(planes) for planes in frames])


def counted(total: int) -> list[tuple[int, int]]:
    return [(number, total) for number in range(1, total + 1)]
