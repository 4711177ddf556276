"""The engine without a model keeps the manners of a real one."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from kinema.engines.base import NO_INPUTS, Engine, Frames, Inputs, Output, Step
from kinema.engines.fake import FakeEngine
from kinema.engines.sealing import seal
from kinema.errors import EngineFailed
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve


def make(prompt: str = "a cat", **options: object) -> GenerationRequest:
    asked = GenerationOptions.model_validate({"prompt": prompt, "seed": 1, **options})
    return resolve(asked, FakeEngine().capabilities).request


def frames_of(request: GenerationRequest, inputs: Inputs = NO_INPUTS) -> np.ndarray:
    outputs = FakeEngine().generate(request, inputs)
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


@pytest.mark.parametrize(("num_frames", "chunks"), [(1, [1]), (5, [1, 4]), (17, [1, 4, 4, 4, 4])])
def test_steps_then_chunks_as_the_wan_decoder_gives_them(num_frames: int, chunks: list[int]) -> None:
    """Indices count from 1 to total, and the frames are those that were asked for."""
    engine: Engine = FakeEngine()
    outputs = list(engine.generate(make(num_frames=num_frames, num_inference_steps=2, size="96x64")))
    assert outputs[:2] == [Step(1, 2), Step(2, 2)]
    decoded = [output for output in outputs[2:] if isinstance(output, Frames)]
    assert [output.data.shape for output in decoded] == [(count, 64, 96, 3) for count in chunks]
    assert [(output.index, output.total) for output in decoded] == [(n + 1, len(chunks)) for n in range(len(chunks))]
    assert all(output.data.dtype == np.uint8 for output in decoded)


def test_prompt_and_seed_decide_the_picture() -> None:
    """The same request makes the same frames, another one others; and it moves."""
    frames = frames_of(make())
    assert np.array_equal(frames, frames_of(make()))
    assert not np.array_equal(frames, frames_of(make(prompt="a dog")))
    assert not np.array_equal(frames, frames_of(make(seed=2)))
    assert not np.array_equal(frames, frames_of(make(negative_prompt="rain")))
    assert all(not np.array_equal(frames[n], frames[n + 1]) for n in range(16))


def test_the_first_frame_of_image_to_video_is_the_image() -> None:
    """And the picture moves from there."""
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    frames = frames_of(make(), Inputs(first_frame=image))
    assert np.array_equal(frames[0], image)
    assert not np.array_equal(frames[1], image)
    assert len(frames) == 17


def test_a_prompt_can_ask_for_a_failure() -> None:
    """After the last step, with a sentence that a client may read."""
    engine = FakeEngine()
    outputs = engine.generate(make("a cat [fail]", num_inference_steps=2))
    assert [next(outputs), next(outputs)] == [Step(1, 2), Step(2, 2)]
    with pytest.raises(EngineFailed, match="asks for a failure"):
        next(outputs)
    assert engine.num_running == 0


def test_a_prompt_can_ask_for_slow_steps() -> None:
    """A fifth of a second in every step; other prompts are instant."""
    waited: list[float] = []
    engine = FakeEngine(wait=waited.append)
    list(engine.generate(make("[slow] waves", num_inference_steps=2)))
    list(engine.generate(make("waves", num_inference_steps=1)))
    assert waited == [0.2, 0.2, 0.0]


def test_an_edit_is_as_far_from_its_film_as_its_strength_says() -> None:
    """Only the steps that are left are taken, and the frames come in the usual chunks."""
    film = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    distances = []
    for strength, num_steps in ((0.3, 3), (0.8, 8), (1.0, 10)):
        request = make(num_frames=9, size="64x64", num_inference_steps=10).model_copy(update={"strength": strength})
        outputs = list(FakeEngine().generate(request, Inputs(film=film)))
        assert [output for output in outputs if isinstance(output, Step)] == [
            Step(number, num_steps) for number in range(1, num_steps + 1)
        ]
        frames = np.concatenate([output.data for output in outputs if isinstance(output, Frames)])
        assert frames.shape == film.shape
        distances.append(np.abs(frames.astype(int) - film).mean())
    assert distances == sorted(distances)
    assert distances[0] < distances[2] / 2


def test_the_last_frame_of_the_video_is_the_one_that_is_given() -> None:
    """All before it are as without one."""
    first, last = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    frames = frames_of(make(), Inputs(first, last))
    assert np.array_equal(frames[-1], last)
    assert np.array_equal(frames[:-1], frames_of(make(), Inputs(first))[:-1])


def test_the_health_probe_is_accepted() -> None:
    """Prompt "test", 8 frames, 256x256, 1 step."""
    assert len(frames_of(make("test", num_frames=8, size="256x256", num_inference_steps=1))) == 9


def test_the_largest_video_is_within_its_limits() -> None:
    """1920x1088, 257 frames."""
    assert make(size="1920x1088", num_frames=257).num_frames == 257


def test_the_hook_sees_each_output_before_it_is_yielded() -> None:
    """It may fail the generation; what was held is let go."""
    seen: list[Output] = []

    def on_output(_request: GenerationRequest, output: Output) -> None:
        seen.append(output)
        if output == Step(2, 4):
            raise RuntimeError("boom")

    engine = FakeEngine(on_output=on_output)
    outputs = engine.generate(make())
    assert next(outputs) == Step(1, 4)
    assert engine.num_running == 1
    with pytest.raises(RuntimeError, match="boom"):
        next(outputs)
    assert seen == [Step(1, 4), Step(2, 4)]
    assert engine.num_running == 0


def test_a_wait_per_step() -> None:
    """One for each denoising step, and none for the frames."""
    waits: list[float] = []
    engine = FakeEngine(step_s=0.25, wait=waits.append)
    list(engine.generate(make(num_inference_steps=3)))
    assert waits == [0.25] * 3


def test_closing_frees() -> None:
    """As cancelling does."""
    engine = FakeEngine()
    outputs = engine.generate(make())
    next(outputs)
    outputs.close()
    assert engine.num_running == 0


def test_load_and_close() -> None:
    """Nothing to do, and it is remembered."""
    engine = FakeEngine("pattern")
    assert engine.capabilities.model == "pattern"
    engine.load()
    assert engine.is_loaded
    engine.close()
    assert not engine.is_loaded


def test_resumed_equals_uninterrupted() -> None:
    """From each step only the steps after it, and the same frames."""
    request = make(num_inference_steps=3)
    for num_done, checkpoint in enumerate(checkpoints_of(request), start=1):
        outputs = list(FakeEngine().generate(request, resume=checkpoint))
        assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3][num_done:]
        frames = np.concatenate([output.data for output in outputs if isinstance(output, Frames)])
        assert np.array_equal(frames, frames_of(request))


def test_what_does_not_fit_begins_again() -> None:
    """A damaged checkpoint, and that of another request."""
    request = make(num_inference_steps=3)
    good = checkpoints_of(request)[1]
    bad = [b"", good[:-9], good[:70] + b"#" + good[71:], checkpoints_of(make("a dog", num_inference_steps=3))[1]]
    for data in bad:
        assert next(FakeEngine().generate(request, resume=data)) == Step(1, 3)
    assert next(FakeEngine().generate(request, resume=good)) == Step(3, 3)


def checkpoints_of(request: GenerationRequest) -> list[bytes]:
    outputs = FakeEngine().generate(request)
    return [output.checkpoint() for output in outputs if isinstance(output, Step) and output.checkpoint]


@pytest.mark.parametrize("num_done", [0, -1, 4, 10**9, 10**30, True, 1.0, "2", None, [2], {}])
def test_a_checkpoint_of_no_step_of_the_request_begins_again(num_done: object) -> None:
    """Whoever can write to storage can write a whole one that says anything."""
    request = make(num_inference_steps=3)
    data = seal(FakeEngine().facts, request, {"num_done": num_done})
    assert next(FakeEngine().generate(request, resume=data)) == Step(1, 3)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b"{}", b"[]", b"null", b'{"format": ' + b"9" * 50_000 + b"}", b"\xff\xfe", b"", b" " * 10**6],
    ids=["deep", "empty", "a list", "null", "a long number", "no text", "nothing", "long"],
)
def test_a_checkpoint_with_a_strange_header_begins_again(header: bytes) -> None:
    """Its digest is right."""
    request = make(num_inference_steps=3)
    for rest in (header, header + b"\n", header + b"\n" + bytes(1000)):
        data = sha256(rest).hexdigest().encode() + b"\n" + rest
        assert next(FakeEngine().generate(request, resume=data)) == Step(1, 3)
