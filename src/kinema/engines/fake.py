"""An engine without a model: instant, deterministic test patterns.

It serves load tests, demos, and the tests of everything that is not a model. The prompt, the seed and the LoRAs decide
the picture, so that a mix-up of two generations shows. It behaves like a real engine: it yields a Step after each step,
then a chunk of one frame and chunks of four, like the Wan decoder.

Three words in a prompt let a client try what a real model does rarely: ``[fail]`` fails the video after its last step,
``[slow]`` makes every step take 0.2 s, ``[narrow]`` makes the video 16 pixels narrower than requested, with a Note.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial

import numpy as np

from kinema.engines.base import (
    NO_INPUTS,
    Frames,
    Inputs,
    Note,
    Output,
    StageReport,
    Step,
    UInt8Array,
    report_nothing,
)
from kinema.engines.hardware import cpu_name
from kinema.engines.sealing import seal, unseal
from kinema.errors import EngineFailed, InvalidRequest
from kinema.manifest import EngineFacts
from kinema.media.sound import Sound, num_samples_at
from kinema.request.capabilities import Capabilities, Limits, LoraInfo, Preset, Tier
from kinema.request.memory import Memory
from kinema.request.request import GenerationRequest
from kinema.request.shapes import Size

_FRAMES_PER_CHUNK = 4
_FAIL, _SLOW, _NARROW = "[fail]", "[slow]", "[narrow]"
_SLOW_STEP_S = 0.2
_NARROWER = 16
_TONE_RATE = 24_000


class FakeEngine:
    """Makes moving waves of colour, of another kind with each of ``loras``, and with ``has_sound`` a tone.

    For tests: ``step_s`` seconds are spent in every denoising step by calling ``wait``, and ``on_output`` is called on
    the device thread just before each output is yielded; it may block, to hold the generation there, or raise, to
    fail it. ``on_load`` does the same for the load, and may report stages of it, and ``on_read`` for the reading of a
    request's LoRAs, which takes no time by itself.
    """

    def __init__(
        self,
        model: str = "fake",
        *,
        aliases: Sequence[str] = (),
        loras: Sequence[LoraInfo] = (),
        tiers: Sequence[Tier] = (),
        step_s: float = 0.0,
        on_output: Callable[[GenerationRequest, Output], None] | None = None,
        on_load: Callable[[StageReport], None] | None = None,
        on_read: Callable[[GenerationRequest], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
        has_sound: bool = False,
    ) -> None:
        self._model = model
        self._aliases = tuple(aliases)
        # Tests change them, as files come and go.
        self.loras = tuple(loras)
        self.tiers = tuple(tiers)
        self._step_s = step_s
        self._wait = wait
        self._has_sound = has_sound
        self._on_output = on_output or (lambda _request, _output: None)
        self._on_load = on_load or (lambda _report: None)
        self._on_read = on_read or (lambda _request: None)
        self.is_loaded = False
        # Tests set it; this engine is never lost by itself.
        self.is_lost = False
        # Tests set it; this engine takes no memory of a device.
        self.memory: Memory | None = None
        self.loras_in_memory: Sequence[str] = ()
        self.num_running = 0

    @property
    def capabilities(self) -> Capabilities:
        """Generous limits: all that a client may reasonably ask of a real model."""
        return Capabilities(
            model=self._model,
            aliases=self._aliases,
            engine="fake",
            is_image_to_video=True,
            is_first_last_frame_to_video=True,
            is_video_to_video=True,
            has_sound=self._has_sound,
            control_videos=("a film of edges",),
            max_reference_images=2,
            takes_conditioning=True,
            description="Test patterns, made at once and without a model.",
            preset=Preset(
                size=Size(width=128, height=128),
                num_frames=17,
                fps=8,
                num_inference_steps=4,
                guidance_scale=5.0,
                flow_shift=3.0,
            ),
            limits=Limits(max_pixels=1920 * 1088, max_frames=257, max_volume=1920 * 1088 * 257),
            loras=self.loras,
            tiers=self.tiers,
        )

    @property
    def device(self) -> str:
        """The CPU."""
        return "cpu"

    @property
    def facts(self) -> EngineFacts:
        """The facts of an engine without weights, which computes waves with numpy."""
        return EngineFacts(
            engine="fake",
            weights="",
            dtype="float32",
            device=cpu_name(),
            attention="none",
            versions={"numpy": np.__version__},
        )

    def load(self, report: StageReport = report_nothing) -> None:
        """There is nothing to read."""
        report("loading test patterns", 0.0)
        self._on_load(report)
        self.is_loaded = True

    def make_room(self) -> None:
        """There is nothing to free."""

    def close(self) -> None:
        """Free no memory."""
        self.is_loaded = False

    def read_loras(self, request: GenerationRequest) -> object:
        """There is nothing to read but the list of them."""
        self._on_read(request)
        self._check_loras(request)
        self.loras_in_memory = [use.digest for use in request.loras]
        return None

    def generate(
        self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None
    ) -> Generator[Output, None, None]:
        """See ``Engine.generate``.

        A first frame drifts sideways, and a last frame is the final one. Over a film the waves are blended, with the
        request's strength as their opacity, and over a film of control with one half. A reference image stands in the
        upper left, and pictures of conditioning are the frames that they are for.
        """
        self._check_loras(request)
        self.num_running += 1
        step_s = _SLOW_STEP_S if _SLOW in request.prompt else self._step_s
        try:
            num_steps = request.num_denoising_steps
            for index in range(self._num_done(request, resume) + 1, num_steps + 1):
                self._wait(step_s)
                checkpoint = partial(self._checkpoint, request, index)
                step = Step(index, num_steps, checkpoint, partial(_preview, request, index / num_steps))
                yield self._announce(request, step)
            if _FAIL in request.prompt:
                raise EngineFailed(f"the prompt asks for a failure: it has {_FAIL}")
            width = request.width
            if _NARROW in request.prompt:
                width -= _NARROWER
                yield self._announce(request, Note(f"the video is {width} pixels wide, not {request.width}"))
            total = 1 + math.ceil((request.num_frames - 1) / _FRAMES_PER_CHUNK)
            for index in range(1, total + 1):
                start, stop = _range(request, index)
                pixels = _chunk(request, inputs, start, stop)[:, :, :width]
                sound = _tone(request, start, stop) if self._has_sound else None
                yield self._announce(request, Frames(pixels, index, total, sound))
        finally:
            self.num_running -= 1

    def _check_loras(self, request: GenerationRequest) -> None:
        has = {(info.name, info.digest) for info in self.loras}
        for use in request.loras:
            if (use.name, use.digest) not in has:
                raise InvalidRequest(f"the LoRA {use.name} is gone, or another one than when the video was asked for")

    def _checkpoint(self, request: GenerationRequest, num_done: int) -> bytes:
        return seal(self.facts, request, {"num_done": num_done})

    def _num_done(self, request: GenerationRequest, resume: bytes | None) -> int:
        opened = unseal(resume, self.facts, request)
        return 0 if opened is None else opened.num_done

    def _announce(self, request: GenerationRequest, output: Output) -> Output:
        self._on_output(request, output)
        return output


def _range(request: GenerationRequest, index: int) -> tuple[int, int]:
    """The first frame of chunk ``index``, and the one after its last: frame 0 alone, then four at a time."""
    start = 0 if index == 1 else 1 + (index - 2) * _FRAMES_PER_CHUNK
    return start, min(1 + (index - 1) * _FRAMES_PER_CHUNK, request.num_frames)


def _tone(request: GenerationRequest, start: int, stop: int) -> Sound:
    """What is heard from frame ``start`` to frame ``stop``: a tone of its own for each request, on both sides."""
    angle, *_ = _traits(request)
    pitch = 300 + 100 * angle
    times = np.arange(*(num_samples_at(frames, request.fps, _TONE_RATE) for frames in (start, stop))) / _TONE_RATE
    wave = np.rint(8000 * np.sin(2 * math.pi * pitch * times)).astype(np.int16)
    return Sound(np.stack([wave, wave], axis=1), _TONE_RATE)


def _chunk(request: GenerationRequest, inputs: Inputs, start: int, stop: int) -> UInt8Array:
    """The frames (f, h, w, 3) uint8 from ``start`` to ``stop``."""
    frames = _moving(request, inputs, start, stop)
    for film in inputs.control_video:
        frames = np.rint(0.5 * film[start:stop] + 0.5 * frames).astype(np.uint8)
    for picture in inputs.reference_images:
        frames[:, : picture.shape[0], : picture.shape[1]] = picture
    for number, picture in inputs.conditioning:
        if start <= number < stop:
            frames[number - start] = picture
    return frames


def _moving(request: GenerationRequest, inputs: Inputs, start: int, stop: int) -> UInt8Array:
    """The same without what is laid over them."""
    if inputs.first_frame is not None:
        # Two pixels a frame: slow enough to follow, fast enough to see.
        drifting = np.stack([np.roll(inputs.first_frame, 2 * number, axis=1) for number in range(start, stop)])
        if inputs.last_frame is not None and stop == request.num_frames:
            drifting[-1] = inputs.last_frame
        return drifting
    waves = np.stack([_wave(request, number) for number in range(start, stop)])
    if inputs.film is None or request.strength is None:
        return waves
    kept = 1.0 - request.strength
    return np.rint(kept * inputs.film[start:stop] + request.strength * waves).astype(np.uint8)


def _wave(request: GenerationRequest, number: int) -> UInt8Array:
    """Frame ``number`` (h, w, 3) uint8: two crossing waves, coloured by a cosine palette.

    The palette is Inigo Quilez' a + b cos(2 pi (t + d)), iquilezles.org/articles/palettes.
    """
    angle, hue, zoom, spread = _traits(request)
    time_s = number / request.fps
    y = np.linspace(-1.0, 1.0, request.height, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, request.width, dtype=np.float32)[None, :]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    height = np.sin(zoom * along - 2.0 * time_s) + np.cos(zoom * across + 1.3 * time_s + 2.0 * along)
    frame = np.empty((request.height, request.width, 3), dtype=np.uint8)
    for channel in range(3):
        phase = 0.15 * height + (hue + channel * spread)
        frame[..., channel] = np.rint(127.5 + 110.0 * np.cos(2.0 * math.pi * phase))
    return frame


def _preview(request: GenerationRequest, share: float) -> UInt8Array:
    """The waves of the middle frame (h / 8, w / 8, 3) uint8, which get clearer with each step."""
    small = request.model_copy(update={"width": max(request.width // 8, 1), "height": max(request.height // 8, 1)})
    waves = _wave(small, request.num_frames // 2)
    picture: UInt8Array = np.rint(127.5 + share * (waves - 127.5)).astype(np.uint8)
    return picture


def _traits(request: GenerationRequest) -> tuple[float, float, float, float]:
    """Angle in radians, hue, zoom and colour spread, drawn from the prompt and the seed."""
    loras = "".join(f"\n{use.digest} {use.scale} {use.scale_2}" for use in request.loras)
    text = f"{request.seed}\n{request.negative_prompt}\n{request.prompt}{loras}"
    digest = hashlib.sha256(text.encode()).digest()
    shares = [int.from_bytes(digest[4 * i : 4 * i + 4], "big") / 2**32 for i in range(4)]
    return 2.0 * math.pi * shares[0], shares[1], 1.5 + 3.0 * shares[2], 0.08 + 0.25 * shares[3]
