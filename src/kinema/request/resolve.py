"""Make a client's options complete: check them against what the model makes, and fill every gap from its preset.

A value that has one obvious nearest value is adjusted, and ``warnings`` say so; any other value that the model does not
take is refused.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from pydantic import BaseModel, ConfigDict

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.capabilities import Capabilities, Limits
from kinema.request.formats import WITH_SOUND, OutputFormat
from kinema.request.json_text import check_text
from kinema.request.loras import resolve_loras
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest, Priority
from kinema.request.shapes import FilmShape, Size
from kinema.request.sizes import choose_size
from kinema.request.tiers import apply_tier

MAX_SEED = 2**63 - 1
# Drawn seeds stay below 2**32: short to type, and well within the numbers that JavaScript reads back exactly (2**53).
_DRAWN_SEEDS = 2**32
# Longer ones are typing errors; a week is more than any queue.
_MAX_DEADLINE_S = 7 * 86400.0
# How much of a film an edit may change when nobody says: diffusers' default for Wan.
_STRENGTH = 0.8
# It leaves the timesteps as they are. Earlier versions stated it for models that have none.
_NO_SHIFT = 1.0
# Browsers show a frame of less than two hundredths of a second for ten of them.
_MAX_GIF_FPS = 50


@dataclass(frozen=True, slots=True)
class Others:
    """What else comes with a request: see ``Given``."""

    control_videos: tuple[FilmShape, ...] = ()
    num_reference_images: int = 0
    conditioning_frames: tuple[int, ...] = ()
    has_audio: bool = False


NO_OTHERS = Others()


class Resolved(BaseModel):
    """A complete request, and one sentence for each value that differs from what was asked."""

    model_config = ConfigDict(frozen=True)

    request: GenerationRequest
    warnings: tuple[str, ...] = ()


def resolve(
    options: GenerationOptions,
    can: Capabilities,
    image_size: Size | None = None,
    *,
    edits: FilmShape | None = None,
    continues: FilmShape | None = None,
    has_last_frame: bool = False,
    others: Others = NO_OTHERS,
) -> Resolved:
    """Make the options complete for this model.

    ``image_size`` is the size of the input image, and None for text-to-video. ``edits`` is the film that an edit begins
    with: where the options name no size, rate or length, the film's are taken, as far as the model makes them.
    ``continues`` is the film that an extension goes on from: where the options name no size or rate, the film's are
    taken. At most one of the three is given. ``has_last_frame`` says whether a last frame comes with the image, and
    ``others`` what else does. A film of control counts as the film of an edit does: size, rate and length are its own.

    Raises InvalidRequest for a value that no model takes, UnsupportedRequest for one that this model does not take;
    both name the parameter and say what would be accepted.
    """
    preset, limits = can.preset, can.limits
    asked, options = options, apply_tier(options, can)
    negative_prompt = preset.negative_prompt if options.negative_prompt is None else options.negative_prompt
    warnings: list[str] = []
    control = min(others.control_videos, key=lambda shape: shape.seconds, default=None)
    film = edits or continues or control
    _check_mode(can, image_size, edits, continues)
    _check_others(can, others)
    if has_last_frame:
        _check_last_frame(can, image_size)
    fps = _whole("fps", options.fps, preset.fps if film is None else _rate_of(film, limits), 1, limits.max_fps)
    size = choose_size(options.size, preset, limits, image_size, film)
    use = "edited" if edits is not None else "followed"
    num_frames = _num_frames(options, fps, size, can, edits or control, warnings, use)
    _check_conditioning(others, num_frames, has_first=image_size is not None, has_last=has_last_frame)
    _check_volume(size, num_frames, limits)
    if has_last_frame and num_frames == 1:
        raise InvalidRequest("a single frame cannot be the first and the last one; ask for more", param="num_frames")
    _check_experts(options, can)
    _check_fixed(options, can)
    request = GenerationRequest(
        model=can.model,
        prompt=_text("prompt", options.prompt, limits, is_required=True),
        negative_prompt=_text("negative_prompt", negative_prompt, limits),
        width=size.width,
        height=size.height,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=_whole(
            "num_inference_steps",
            options.num_inference_steps,
            preset.num_inference_steps,
            limits.min_steps,
            limits.max_steps,
        ),
        guidance_scale=_real(
            "guidance_scale", options.guidance_scale, preset.guidance_scale, 0.0, limits.max_guidance_scale
        ),
        guidance_scale_2=_maybe_real(
            "guidance_scale_2", options.guidance_scale_2, preset.guidance_scale_2, 0.0, limits.max_guidance_scale
        ),
        boundary_ratio=_maybe_real("boundary_ratio", options.boundary_ratio, preset.boundary_ratio, 0.0, 1.0),
        flow_shift=_maybe_real("flow_shift", options.flow_shift, preset.flow_shift, 0.01, 100.0),
        tier=options.tier or options.kept_tier,
        solver=options.solver,
        timesteps=options.timesteps,
        seed=_whole("seed", options.seed, secrets.randbelow(_DRAWN_SEEDS), 0, MAX_SEED),
        loras=resolve_loras(options.loras or (), can, warnings),
        output_format=_output_format(options.output_format, can),
        preview_every=_maybe_whole("preview_every", options.preview_every, 1, limits.max_steps),
        priority=_priority(options.priority),
        deadline_s=_deadline(options.deadline_s),
        geometry=can.geometry,
    )
    if edits is not None:
        strength = _whole_strength(options, can) or _strength(options.strength, request.num_inference_steps)
        request = request.model_copy(update={"strength": strength})
    if others.conditioning_frames:
        request = request.model_copy(update={"conditioning_frames": others.conditioning_frames})
    warnings += _unused(asked, request, can) + _unread(asked, request, limits) + _left_out(request, can)
    return Resolved(request=request, warnings=tuple(warnings))


def resolve_alone(options: GenerationOptions, can: Capabilities) -> Resolved:
    """Make the options complete with what the model needs besides, a picture or films of the preset's own shape.

    Raises as ``resolve``.
    """
    preset = can.preset
    film = FilmShape(preset.size, preset.num_frames, Fraction(preset.fps), Fraction(preset.num_frames, preset.fps))
    if not (can.is_text_to_video or can.is_image_to_video):
        return resolve(options, can, edits=film)
    others = Others(control_videos=(film,) * len(can.control_videos)) if can.needs_control_video else NO_OTHERS
    return resolve(options, can, None if can.is_text_to_video else preset.size, others=others)


def _check_mode(
    can: Capabilities, image_size: Size | None, edits: FilmShape | None, continues: FilmShape | None
) -> None:
    if edits is not None:
        if not can.is_video_to_video:
            raise UnsupportedRequest(f"{can.model} does not edit videos; leave video out", param="video")
        return
    if continues is not None:
        if not can.is_image_to_video:
            raise UnsupportedRequest(f"{can.model} makes videos from text alone; it continues none", param="video")
        if can.needs_control_video:
            raise UnsupportedRequest(f"{can.model} needs films of control; it continues no video", param="video")
        return
    if image_size is not None and not can.is_image_to_video:
        raise UnsupportedRequest(
            f"{can.model} makes videos from text alone; leave input_reference out", param="input_reference"
        )
    if image_size is None and not can.is_text_to_video:
        if not can.is_image_to_video:
            raise UnsupportedRequest(f"{can.model} edits videos and makes none without one; send it to edits")
        raise UnsupportedRequest(f"{can.model} needs a first frame in input_reference", param="input_reference")


def _check_others(can: Capabilities, others: Others) -> None:
    """Raises UnsupportedRequest for an input that the model does not take, and for one that it needs."""
    wanted = " and ".join(can.control_videos)
    if others.control_videos and not can.control_videos:
        raise UnsupportedRequest(f"{can.model} takes no control_video; leave it out", param="control_video")
    if can.control_videos and len(others.control_videos) not in (0, len(can.control_videos)):
        raise UnsupportedRequest(
            f"control_video has {len(others.control_videos)} films; {can.model} takes {wanted}", param="control_video"
        )
    if can.needs_control_video and not others.control_videos:
        raise UnsupportedRequest(f"{can.model} needs {wanted} in control_video", param="control_video")
    if others.num_reference_images > can.max_reference_images:
        takes = f"at most {can.max_reference_images}" if can.max_reference_images else "no"
        raise UnsupportedRequest(f"{can.model} takes {takes} reference_images", param="reference_images")
    if others.conditioning_frames and not can.takes_conditioning:
        raise UnsupportedRequest(f"{can.model} takes no conditioning; leave it out", param="conditioning")
    if others.has_audio and not can.takes_audio:
        raise UnsupportedRequest(f"{can.model} makes no video that follows a sound; leave audio out", param="audio")


def _check_conditioning(others: Others, num_frames: int, *, has_first: bool, has_last: bool) -> None:
    """Raises InvalidRequest for a frame that the video does not have, and for one that has two pictures."""
    taken = {0: "input_reference"} if has_first else {}
    if has_last:
        taken[num_frames - 1] = "last_frame"
    for frame in others.conditioning_frames:
        if frame in taken:
            raise InvalidRequest(
                f"conditioning has a picture of frame {frame}, and so has {taken[frame]}; send one of them",
                param="conditioning",
            )
        if frame >= num_frames:
            raise InvalidRequest(
                f"conditioning has a picture of frame {frame}; the video has the frames 0 to {num_frames - 1}",
                param="conditioning",
            )


def _whole_strength(options: GenerationOptions, can: Capabilities) -> float | None:
    """Return 1 for a model that edits a film as a whole. Raises UnsupportedRequest for another strength."""
    if not can.edits_whole_films:
        return None
    if options.strength not in (None, 1.0):
        raise UnsupportedRequest(f"{can.model} edits a film as a whole; leave strength out", param="strength")
    return 1.0


def _check_last_frame(can: Capabilities, image_size: Size | None) -> None:
    if not can.is_first_last_frame_to_video:
        raise UnsupportedRequest(f"{can.model} takes no last frame; leave last_frame out", param="last_frame")
    if image_size is None:
        raise InvalidRequest("last_frame needs a first frame in input_reference; send both", param="last_frame")


def _check_experts(options: GenerationOptions, can: Capabilities) -> None:
    for name in ("guidance_scale_2", "boundary_ratio"):
        if getattr(options, name) is not None and not can.has_two_experts:
            raise UnsupportedRequest(f"{name} is for models with two experts; {can.model} has one", param=name)


def _check_fixed(options: GenerationOptions, can: Capabilities) -> None:
    if can.preset.flow_shift is None and options.flow_shift not in (None, _NO_SHIFT):
        raise UnsupportedRequest(f"{can.model} has no flow_shift; leave it out", param="flow_shift")
    for name in can.fixed_options:
        asked, has = getattr(options, name), getattr(can.preset, name)
        if asked is not None and asked != has:
            value = _told(has)
            raise UnsupportedRequest(f"{name} is {value} for {can.model} here; leave it out", param=name)


def _told(value: float | str | None) -> str:
    """A value of the preset, as a sentence has it."""
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return repr(value) if value else "not set"


def _unused(options: GenerationOptions, request: GenerationRequest, can: Capabilities) -> list[str]:
    """Return one sentence for each option that has no effect because of other options or of the engine."""
    unused = []
    if options.strength is not None and request.strength is None:
        unused.append("strength was ignored: there is no video to edit")
    if options.preview_every is not None and not can.has_previews:
        unused.append(
            f"preview_every was ignored: {can.model} is run by the engine {can.engine}, which has no previews"
        )
    return unused + _unused_guidance(options, request)


def _output_format(asked: str | None, can: Capabilities) -> OutputFormat:
    if asked is None:
        return "mp4"
    for known in can.output_formats:
        if asked == known:
            return known
    raise UnsupportedRequest(
        f"output_format {asked[:40]!r} is not made; accepted: {', '.join(can.output_formats)}", param="output_format"
    )


def _left_out(request: GenerationRequest, can: Capabilities) -> list[str]:
    """Return one sentence for each thing that this kind of file has no place for."""
    left_out = []
    if can.has_sound and request.output_format not in WITH_SOUND:
        left_out.append(f"the sound was left out: a file of output_format {request.output_format} has none")
    if request.output_format == "gif" and request.fps > _MAX_GIF_FPS:
        left_out.append(f"some frames were left out: a GIF shows at most {_MAX_GIF_FPS} a second, not {request.fps}")
    return left_out


def _unused_guidance(options: GenerationOptions, request: GenerationRequest) -> list[str]:
    second = "guidance_scale_2" if options.guidance_scale_2 is not None else None
    if request.guidance_scale <= 1:
        ignored = ["negative_prompt" if options.negative_prompt else None, second]
        reason = f"guidance_scale {request.guidance_scale:g} turns guidance off"
    elif not request.boundary_ratio:
        ignored, reason = [second], "no boundary_ratio gives the second expert a step"
    else:
        return []
    return [f"{name} was ignored: {reason}" for name in ignored if name]


def _unread(options: GenerationOptions, request: GenerationRequest, limits: Limits) -> list[str]:
    """Return one sentence for each text that may be longer than the model reads."""
    texts = {"prompt": request.prompt}
    if options.negative_prompt and request.guidance_scale > 1:
        texts["negative_prompt"] = request.negative_prompt
    most = limits.max_prompt_tokens
    return [
        f"{name} has {len(text)} characters: this model reads the first {most} tokens, so its end may not be read"
        for name, text in texts.items()
        if most is not None and _count_tokens(text) > most
    ]


def _count_tokens(text: str) -> int:
    """Return an upper estimate of the number of tokens: tokenizers live with the engines, and a needless warning is
    better than a missing one. UMT5 makes one token of about four characters of English, or one to two of Chinese.
    """
    num_ascii = sum(map(str.isascii, text))
    return num_ascii // 2 + len(text) - num_ascii


def _text(name: str, value: str, limits: Limits, *, is_required: bool = False) -> str:
    if len(value) > limits.max_prompt_chars:
        raise InvalidRequest(
            f"{name} has {len(value)} characters; at most {limits.max_prompt_chars} are accepted", param=name
        )
    if is_required and not value.strip():
        raise InvalidRequest(f"{name} must not be empty", param=name)
    return check_text(name, value)


def _whole(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def _maybe_whole(name: str, value: int | None, low: int, high: int) -> int | None:
    return None if value is None else _whole(name, value, low, low, high)


def _real(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def _maybe_real(name: str, value: float | None, default: float | None, low: float, high: float) -> float | None:
    return default if value is None else _real(name, value, 0.0, low, high)


def _priority(asked: str | None) -> Priority:
    if asked is None:
        return "normal"
    for known in get_args(Priority):
        if asked == known:
            return known  # type: ignore[no-any-return]  # get_args knows no types
    raise InvalidRequest(
        f"priority {str(asked)[:40]!r} is not known; accepted: {', '.join(get_args(Priority))}", param="priority"
    )


def _deadline(asked: float | None) -> float | None:
    if asked is not None and not 0 < asked <= _MAX_DEADLINE_S:
        raise InvalidRequest(
            f"deadline_s must be a number of seconds above 0, at most {_MAX_DEADLINE_S:.0f}", param="deadline_s"
        )
    return asked


def _rate_of(film: FilmShape, limits: Limits) -> int:
    return min(max(round(film.fps), 1), limits.max_fps)


def _strength(asked: float | None, num_steps: int) -> float:
    """Return the asked strength or the default. Raises InvalidRequest when it leaves no denoising step to take."""
    least = math.ceil(1000 / num_steps) / 1000
    if asked is None:
        return max(_STRENGTH, least)
    if not (math.isfinite(asked) and asked <= 1 and int(asked * num_steps) >= 1):
        raise InvalidRequest(
            f"strength must be a number from {least:g} to 1: at {num_steps} steps, less of it leaves no step to take",
            param="strength",
        )
    return float(asked)


def _num_frames(
    options: GenerationOptions,
    fps: int,
    size: Size,
    can: Capabilities,
    film: FilmShape | None,
    warnings: list[str],
    use: str,
) -> int:
    """Return num_frames if it is given, else seconds x fps, else the length of the film or of the preset.

    The result is the nearest number of frames that the model makes; see ``Limits``. ``use`` says what becomes of the
    film's frames.
    """
    limits, kept = can.limits, options.kept_num_frames
    if kept is not None and (film is None or kept <= film.num_frames_at(fps)):
        options = options.model_copy(update={"num_frames": kept})
    if film is not None:
        has = film.num_frames_at(fps)
        if options.num_frames is None and options.seconds is None:
            return _as_long_as(has, fps, size, limits, warnings, use)
        most = max(has, limits.min_frames)
        if most < limits.max_frames:
            _check_within(options, fps, has, most)
            limits = limits.model_copy(update={"max_frames": most})
    if options.num_frames is not None:
        asked: float = _whole("num_frames", options.num_frames, 1, 1, limits.max_frames)
        said = f"num_frames {asked}"
        if options.seconds is not None:
            if not (math.isfinite(options.seconds) and options.seconds > 0):
                raise InvalidRequest("seconds must be a number above 0", param="seconds")
            warnings.append(f"seconds was ignored: num_frames {asked} overrides it")
    elif options.seconds is not None:
        longest_s = limits.max_frames / fps
        if not (math.isfinite(options.seconds) and 1 / fps <= options.seconds <= longest_s):
            raise InvalidRequest(
                f"seconds must be a number from {1 / fps:g} to {longest_s:g} at {fps} fps, "
                f"which are at most {limits.max_frames} frames",
                param="seconds",
            )
        seconds = options.seconds
        asked = round(seconds * fps, 6)  # 0.7 s at 30 fps are 21 frames, not 20.999999999999996
        said = f"seconds {seconds:g} at {fps} fps = {asked:g} frames"
    else:
        return can.preset.num_frames
    frames = limits.frames_near(asked)
    if frames != asked:
        warnings.append(f"{said} -> {frames}: must be {limits.frame_rule}")
    if film is not None and frames < has:
        warnings.append(f"the video has {has} frames at {fps} fps, of which the first {frames} are {use}")
    return frames


def _check_within(options: GenerationOptions, fps: int, has: int, most: int) -> None:
    """Raises InvalidRequest for more frames than the film has, or than ``most`` where the shortest video has more."""
    seconds = math.floor(1000 * most / fps) / 1000
    name, longest = ("seconds", seconds) if options.num_frames is None else ("num_frames", float(most))
    if (getattr(options, name) or 0) > longest:
        raise InvalidRequest(f"{name} must be at most {longest:g}: the film has {has} frames at {fps} fps", param=name)


def _as_long_as(has: int, fps: int, size: Size, limits: Limits, warnings: list[str], use: str) -> int:
    """Return the largest number of frames that the model makes and the film has; the shortest video may have more."""
    most = min(limits.max_frames, limits.max_volume // size.pixels)
    frames = limits.frames_up_to(min(has, most))
    if frames > has:
        warnings.append(f"the video has {has} frames at {fps} fps; its last one is held: videos have at least {frames}")
    elif frames != has:
        too_long = f"this model makes at most {most} at {size}"
        reason = f"must be {limits.frame_rule}" if has <= most else too_long
        warnings.append(f"the video has {has} frames at {fps} fps, of which the first {frames} are {use}: {reason}")
    return frames


def _check_volume(size: Size, num_frames: int, limits: Limits) -> None:
    if size.pixels * num_frames > limits.max_volume:
        raise UnsupportedRequest(
            f"{num_frames} frames of {size} are more than this model makes; "
            f"at this size at most {limits.max_volume // size.pixels} frames",
            param="num_frames",
        )
