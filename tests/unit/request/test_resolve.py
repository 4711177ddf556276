"""Options become complete requests: what is filled, what is adjusted, what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.errors import InvalidRequest, RequestError, UnsupportedRequest
from kinema.request.capabilities import Capabilities, Limits, Preset
from kinema.request.options import GenerationOptions
from kinema.request.resolve import MAX_SEED, Resolved, resolve
from kinema.request.shapes import FilmShape, Size

PRESET = Preset(
    size=Size(width=832, height=480),
    num_frames=81,
    fps=16,
    num_inference_steps=50,
    guidance_scale=5.0,
    flow_shift=3.0,
    negative_prompt="blurry",
)
LIMITS = Limits(max_pixels=1280 * 720, max_frames=161, max_volume=1280 * 720 * 121)
MULTIPLE = "must be a multiple of 4 plus 1"
CAN = Capabilities(
    model="wan", engine="wan", is_image_to_video=True, is_video_to_video=True, preset=PRESET, limits=LIMITS
)


def options(**values: object) -> GenerationOptions:
    return GenerationOptions.model_validate({"prompt": "a cat", **values})


def test_everything_unsaid_comes_from_the_preset() -> None:
    """A bare prompt gives the checkpoint's own defaults and no warnings."""
    resolved = resolve(options(), CAN)
    request = resolved.request
    assert resolved.warnings == ()
    assert (request.width, request.height, request.num_frames, request.fps) == (832, 480, 81, 16)
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (50, 5.0, 3.0)
    assert request.negative_prompt == "blurry"
    assert request.seconds == 81 / 16


@pytest.mark.parametrize(
    ("step", "offset", "rule"),
    [
        (4, 1, "a multiple of 4 plus 1"),
        (16, 0, "a multiple of 16"),
        (16, 24, "a multiple of 16 plus 8, at least 24"),
        (4, 5, "a multiple of 4 plus 1, at least 5"),
        (1, 1, "a whole number"),
        (1, 2, "a whole number, at least 2"),
    ],
)
def test_the_rule_of_frames_is_told_in_words(step: int, offset: int, rule: str) -> None:
    """And the least is made of less."""
    limits = LIMITS.model_copy(update={"frame_step": step, "frame_offset": offset})
    assert limits.frame_rule == rule
    assert limits.frames_near(0.5) == limits.min_frames


def test_a_model_without_a_flow_shift_has_none() -> None:
    """A request that names one is refused; 1 is none, as videos of earlier versions have it."""
    can = CAN.model_copy(update={"preset": PRESET.model_copy(update={"flow_shift": None})})
    assert resolve(options(), can).request.flow_shift is None
    assert resolve(options(flow_shift=1.0), can).request.flow_shift == 1.0
    with pytest.raises(UnsupportedRequest, match="wan has no flow_shift; leave it out") as refused:
        resolve(options(flow_shift=3.0), can)
    assert refused.value.param == "flow_shift"


def test_seeds_are_drawn_once_and_kept() -> None:
    """Without a seed two requests differ; with one it is taken as it is."""
    drawn = {resolve(options(), CAN).request.seed for _ in range(8)}
    assert len(drawn) > 1
    assert resolve(options(seed=MAX_SEED), CAN).request.seed == MAX_SEED


def test_an_empty_negative_prompt_is_an_answer() -> None:
    """It turns the preset's negative prompt off."""
    assert resolve(options(negative_prompt=""), CAN).request.negative_prompt == ""


@pytest.mark.parametrize(
    ("asked", "frames"), [(1, 1), (8, 9), (80, 81), (81, 81), (82, 81), (83, 85), (160, 161), (161, 161)]
)
def test_frames_are_brought_to_4k_plus_1_and_it_is_said(asked: int, frames: int) -> None:
    """The nearest number that is made, upwards in the middle, never above the limit; said exactly when it differs."""
    resolved = resolve(options(num_frames=asked), CAN)
    assert resolved.request.num_frames == frames
    expected = () if asked == frames else (f"num_frames {asked} -> {frames}: must be a multiple of 4 plus 1",)
    assert resolved.warnings == expected


def test_num_frames_overrides_seconds_and_says_so() -> None:
    """num_frames is the stronger of the two."""
    resolved = resolve(options(num_frames=17, seconds=5), CAN)
    assert resolved.request.num_frames == 17
    assert resolved.warnings == ("seconds was ignored: num_frames 17 overrides it",)


def test_seconds_count_at_the_asked_rate() -> None:
    """fps x seconds, brought to a number that is made."""
    resolved = resolve(options(seconds=2, fps=24), CAN)
    assert (resolved.request.num_frames, resolved.request.fps) == (49, 24)
    assert resolved.warnings == ("seconds 2 at 24 fps = 48 frames -> 49: must be a multiple of 4 plus 1",)


@pytest.mark.parametrize(
    ("seconds", "fps", "said", "frames"),
    [
        (2.1, 8, "seconds 2.1 at 8 fps = 16.8 frames", 17),
        (0.1, 24, "seconds 0.1 at 24 fps = 2.4 frames", 1),
        (1.825, 8, "seconds 1.825 at 8 fps = 14.6 frames", 13),
        (2.125, 8, "", 17),
        (0.7, 30, "", 21),
    ],
)
def test_a_length_between_two_frames_is_said(seconds: float, fps: int, said: str, frames: int) -> None:
    """The video is as long as its frames are; a warning exactly when that is not what was asked."""
    resolved = resolve(options(seconds=seconds, fps=fps), CAN)
    assert resolved.request.num_frames == frames
    assert resolved.warnings == ((f"{said} -> {frames}: must be a multiple of 4 plus 1",) if said else ())


def test_a_text_that_may_be_longer_than_the_model_reads_is_said() -> None:
    """By a cautious count: two letters of English or one sign of Chinese a token."""
    can = CAN.model_copy(update={"limits": LIMITS.model_copy(update={"max_prompt_tokens": 512})})
    assert resolve(options(prompt="a" * 1025, negative_prompt="b" * 1025), can).warnings == ()
    assert resolve(options(prompt="a" * 5000), CAN).warnings == ()
    for text in ("a" * 1026, "猫" * 513):
        warnings = resolve(options(prompt=text, negative_prompt=text), can).warnings
        assert [warning.partition(" has ")[0] for warning in warnings] == ["prompt", "negative_prompt"]
        assert f"has {len(text)} characters: this model reads the first 512 tokens" in warnings[0]


TWO_EXPERTS = CAN.model_copy(
    update={"has_two_experts": True, "preset": PRESET.model_copy(update={"boundary_ratio": 0.875})}
)


@pytest.mark.parametrize(
    ("values", "ignored"),
    [
        ({"guidance_scale": 1, "negative_prompt": "rain"}, ["negative_prompt"]),
        (
            {"guidance_scale": 0.5, "negative_prompt": "rain", "guidance_scale_2": 3},
            ["negative_prompt", "guidance_scale_2"],
        ),
        ({"guidance_scale_2": 3, "boundary_ratio": 0}, ["guidance_scale_2"]),
        ({"guidance_scale": 1, "negative_prompt": ""}, []),
        ({"guidance_scale": 1}, []),
        ({"guidance_scale_2": 3, "negative_prompt": "rain"}, []),
    ],
)
def test_options_without_effect_are_said(values: dict[str, object], ignored: list[str]) -> None:
    """The negative prompt and the second scale need guidance; the second scale also needs steps of its expert."""
    warnings = resolve(options(**values), TWO_EXPERTS).warnings
    assert [warning.partition(" was ignored: ")[0] for warning in warnings] == ignored


def test_an_image_gives_its_shape_to_an_unsaid_size() -> None:
    """Image-to-video keeps the image's shape at the preset's area; a fixed preset keeps its size."""
    tall = resolve(options(), CAN, Size(width=480, height=832)).request
    assert (tall.width, tall.height) == (480, 832)
    fixed = CAN.model_copy(update={"preset": PRESET.model_copy(update={"image_size": "fixed"})})
    assert resolve(options(), fixed, Size(width=480, height=832)).request.size == PRESET.size


REFUSED = {
    "empty prompt": ({"prompt": ""}, "prompt", "must not be empty"),
    "blank prompt": ({"prompt": " \n"}, "prompt", "must not be empty"),
    "long prompt": ({"prompt": "x" * 32_001}, "prompt", "at most 32000"),
    "long negative prompt": ({"negative_prompt": "x" * 32_001}, "negative_prompt", "at most 32000"),
    "NUL": ({"prompt": "a\0b"}, "prompt", "NUL"),
    "NUL in the negative prompt": ({"negative_prompt": "\0"}, "negative_prompt", "NUL"),
    "lone surrogate": ({"prompt": "a\udcff"}, "prompt", "lone surrogate"),
    "half a size": ({"size": "832"}, "size", "WIDTHxHEIGHT"),
    "no pixels": ({"size": "0x0"}, "size", "from 1 to 4096"),
    "absurd size": ({"size": "99999x99999"}, "size", "from 1 to 4096"),
    "endless size": ({"size": "9" * 5000 + "x1"}, "size", "WIDTHxHEIGHT"),
    "odd size": ({"size": "833x479"}, "size", "nearest is 832x480"),
    "odd size whose nearest is too large": ({"size": "1288x715"}, "size", "nearest is 1280x704"),
    "too small": ({"size": "16x16"}, "size", "at least 64"),
    "odd and too small": ({"size": "1x1"}, "size", "at least 64"),
    "odd and too large": ({"size": "4095x4095"}, "size", "at most 921600"),
    "too large": ({"size": "1920x1088"}, "size", "at most 921600"),
    "no frames": ({"num_frames": 0}, "num_frames", "from 1 to 161"),
    "negative frames": ({"num_frames": -1}, "num_frames", "from 1 to 161"),
    "a billion frames": ({"num_frames": 10**9}, "num_frames", "from 1 to 161"),
    "too much in all": ({"size": "1280x720", "num_frames": 161}, "num_frames", "at most 121 frames"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 200"),
    "nan guidance": ({"guidance_scale": math.nan}, "guidance_scale", "from 0 to 30"),
    "infinite guidance": ({"guidance_scale": math.inf}, "guidance_scale", "from 0 to 30"),
    "a size of words": ({"size": "large"}, "size", "is not WIDTHxHEIGHT, for instance '832x480'"),
    "no seconds": ({"seconds": 0}, "seconds", "number from"),
    "endless seconds": ({"seconds": math.inf}, "seconds", "number from"),
    "no fps": ({"fps": 0}, "fps", "from 1 to 60"),
    "negative seed": ({"seed": -1}, "seed", "from 0 to"),
    "second guidance": ({"guidance_scale_2": 3.0}, "guidance_scale_2", "two experts"),
    "boundary": ({"boundary_ratio": 0.9}, "boundary_ratio", "two experts"),
    "no shift": ({"flow_shift": 0}, "flow_shift", "number from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_refused_with_what_would_be_accepted(case: str) -> None:
    """Each bad value names its parameter and says what is accepted."""
    values, param, sentence = REFUSED[case]
    with pytest.raises(RequestError) as refused:
        resolve(options(**values), CAN)
    assert refused.value.param == param
    assert sentence in refused.value.message


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_size_that_is_called_the_nearest_is_accepted(width: int, height: int) -> None:
    """Whoever follows the advice is not refused again."""
    try:
        resolve(options(size=f"{width}x{height}", num_frames=1), CAN)
    except RequestError as refused:
        _, is_advised, nearest = refused.message.partition("the nearest is ")
        if is_advised:
            resolve(options(size=nearest, num_frames=1), CAN)


def test_an_image_is_refused_by_a_text_model_and_asked_for_by_an_image_model() -> None:
    """The mode of the model decides."""
    text_only = CAN.model_copy(update={"is_image_to_video": False})
    image_only = CAN.model_copy(update={"is_text_to_video": False})
    with pytest.raises(UnsupportedRequest, match="leave input_reference out"):
        resolve(options(), text_only, Size(width=64, height=64))
    with pytest.raises(UnsupportedRequest, match="needs a first frame"):
        resolve(options(), image_only)


def test_a_last_frame_is_for_models_that_take_it_beside_a_first_one() -> None:
    """Each refusal is one plain sentence."""
    both = CAN.model_copy(update={"is_first_last_frame_to_video": True})
    size = Size(width=64, height=64)
    assert resolve(options(seed=1), both, size, has_last_frame=True) == resolve(options(seed=1), both, size)
    with pytest.raises(UnsupportedRequest, match=r"^wan takes no last frame; leave last_frame out$"):
        resolve(options(), CAN, size, has_last_frame=True)
    with pytest.raises(InvalidRequest, match="needs a first frame in input_reference"):
        resolve(options(), both, has_last_frame=True)
    with pytest.raises(InvalidRequest, match="needs a first frame in input_reference"):
        resolve(options(), both, edits=FILM, has_last_frame=True)
    with pytest.raises(InvalidRequest, match="a single frame cannot be"):
        resolve(options(num_frames=1), both, size, has_last_frame=True)


FILM = FilmShape(Size(width=320, height=192), 33, Fraction(12), Fraction(33, 12))


def edit(film: FilmShape = FILM, **values: object) -> Resolved:
    return resolve(options(**values), CAN, edits=film)


def test_an_edit_is_like_its_film() -> None:
    """Unsaid size, rate and length are those of the film; the strength has a default of its own."""
    resolved = edit()
    request = resolved.request
    assert (str(request.size), request.fps, request.num_frames, request.strength) == ("320x192", 12, 33, 0.8)
    assert resolved.warnings == ()
    assert resolve(options(), CAN).request.strength is None


def test_a_film_that_cannot_be_made_as_it_is_gives_its_shape() -> None:
    """As an image does."""
    film = FilmShape(Size(width=1080, height=1920), 33, Fraction(12), Fraction(33, 12))
    assert edit(film).request.size == resolve(options(), CAN, film.size).request.size


@pytest.mark.parametrize(
    ("film", "values", "frames", "said"),
    [
        (33, {}, 33, None),
        (33, {"num_frames": 33}, 33, None),
        (40, {}, 37, f"the video has 40 frames at 16 fps, of which the first 37 are edited: {MULTIPLE}"),
        (3, {}, 1, f"the video has 3 frames at 16 fps, of which the first 1 are edited: {MULTIPLE}"),
        (
            400,
            {},
            161,
            "400 frames at 16 fps, of which the first 161 are edited: this model makes at most",
        ),
        (400, {"size": "1280x720"}, 121, "this model makes at most 121 at 1280x720"),
        (33, {"fps": 8}, 13, "the video has 16 frames at 8 fps, of which the first 13 are edited"),
        (33, {"num_frames": 9}, 9, "the video has 33 frames at 16 fps, of which the first 9 are edited"),
        (33, {"seconds": 1}, 17, "the video has 33 frames at 16 fps, of which the first 17 are edited"),
        (33, {"seconds": 1}, 17, "seconds 1 at 16 fps = 16 frames -> 17"),
        (40, {"num_frames": 40}, 37, "num_frames 40 -> 37: must be a multiple of 4 plus 1"),
    ],
)
def test_an_edit_is_as_long_as_its_film_can_be(
    film: int, values: dict[str, object], frames: int, said: str | None
) -> None:
    """Down to the next number of frames that the model makes, which is said; or shorter, if that was asked for."""
    resolved = edit(FilmShape(Size(width=320, height=192), film, Fraction(16), Fraction(film, 16)), **values)
    assert resolved.request.num_frames == frames
    assert not resolved.warnings if said is None else any(said in warning for warning in resolved.warnings)


def test_a_film_that_is_shorter_than_any_video_is_held() -> None:
    """Also where the length is named; one that is longer than both is refused."""
    can = CAN.model_copy(update={"limits": LIMITS.model_copy(update={"frame_offset": 5})})
    film = FilmShape(Size(width=320, height=192), 3, Fraction(16), Fraction(3, 16))
    held = resolve(options(seed=1), can, edits=film)
    assert held.warnings == ("the video has 3 frames at 16 fps; its last one is held: videos have at least 5",)
    assert resolve(options(seed=1, num_frames=5), can, edits=film).request == held.request
    with pytest.raises(InvalidRequest, match="num_frames must be at most 5: the film has 3 frames at 16 fps"):
        resolve(options(num_frames=6), can, edits=film)


@pytest.mark.parametrize(
    ("values", "param", "sentence"),
    [
        ({"num_frames": 37}, "num_frames", "at most 33: the film has 33 frames at 12 fps"),
        ({"num_frames": 0}, "num_frames", "from 1 to 33"),
        ({"num_frames": 10**40}, "num_frames", "at most 33"),
        ({"seconds": 10}, "seconds", "at most 2.75: the film has 33 frames at 12 fps"),
        ({"seconds": math.inf}, "seconds", "at most 2.75"),
        ({"seconds": math.nan}, "seconds", "number from"),
        ({"strength": 0.0}, "strength", "from 0.02 to 1"),
        ({"strength": -1.0}, "strength", "from 0.02 to 1"),
        ({"strength": 1.01}, "strength", "from 0.02 to 1"),
        ({"strength": math.nan}, "strength", "from 0.02 to 1"),
        ({"strength": 0.09, "num_inference_steps": 10}, "strength", "from 0.1 to 1: at 10 steps"),
    ],
)
def test_what_cannot_be_edited_is_refused(values: dict[str, object], param: str, sentence: str) -> None:
    """More frames than the film has, or a strength that is none."""
    with pytest.raises(InvalidRequest) as refused:
        edit(**values)
    assert refused.value.param == param
    assert sentence in refused.value.message


def test_the_work_of_a_video_goes_as_its_time_does() -> None:
    """Wan 2.1 1.3B on an H200, guided, 50 steps of 832x480: 6.9 s for 17 frames, 55 s for 81."""
    short, long = (resolve(options(num_frames=frames), CAN).request.work for frames in (17, 81))
    assert long / short == pytest.approx(55.2 / 6.9, rel=0.1)


@pytest.mark.parametrize("priority", ["low", "normal", "high", None])
def test_a_priority_is_kept(priority: str | None) -> None:
    """Normal when nothing is said."""
    assert resolve(options(priority=priority), CAN).request.priority == (priority or "normal")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"priority": "urgent"}, "priority 'urgent' is not known; accepted: low, normal, high"),
        ({"priority": ""}, "priority '' is not known; accepted: low, normal, high"),
        ({"deadline_s": 0.0}, "deadline_s must be a number of seconds above 0, at most 604800"),
        ({"deadline_s": math.nan}, "deadline_s must be a number of seconds above 0, at most 604800"),
        ({"deadline_s": 1e9}, "deadline_s must be a number of seconds above 0, at most 604800"),
    ],
)
def test_what_says_not_how_soon_is_refused(values: dict[str, object], sentence: str) -> None:
    """By its name, with what is accepted."""
    with pytest.raises(InvalidRequest) as refused:
        resolve(options(**values), CAN)
    assert (refused.value.message, refused.value.param) == (sentence, next(iter(values)))


@pytest.mark.parametrize(
    ("strength", "steps", "taken"), [(1.0, 20, 20), (0.8, 20, 16), (0.05, 20, 1), (0.19, 20, 3), (None, 1, 1)]
)
def test_strength_decides_how_many_steps_are_taken(strength: float | None, steps: int, taken: int) -> None:
    """And the work of a job is that of the steps that are taken."""
    request = edit(strength=strength, num_inference_steps=steps).request
    assert request.num_denoising_steps == taken
    whole = request.model_copy(update={"strength": None})
    decoding = request.decoding_work
    assert request.work - decoding == pytest.approx((whole.work - decoding) * taken / steps)


@given(st.integers(1, 200))
def test_the_smallest_strength_that_is_named_is_accepted(steps: int) -> None:
    """Whoever follows the advice is not refused again."""
    with pytest.raises(InvalidRequest) as refused:
        edit(strength=0.0, num_inference_steps=steps)
    least = refused.value.message.partition("from ")[2].partition(" ")[0]
    assert edit(strength=float(least), num_inference_steps=steps).request.num_denoising_steps >= 1


def test_strength_without_a_film_is_said() -> None:
    """Rather than dropped in silence."""
    resolved = resolve(options(strength=0.5), CAN)
    assert resolved.warnings == ("strength was ignored: there is no video to edit",)
    assert resolved.request.strength is None


def test_a_continued_film_gives_size_and_rate() -> None:
    """The length is that of the new part, as for any video."""
    request = resolve(options(), CAN, continues=FILM).request
    assert (str(request.size), request.fps, request.num_frames) == ("320x192", 12, PRESET.num_frames)
    fast = FilmShape(FILM.size, 33, Fraction(240), Fraction(33, 240))
    assert resolve(options(), CAN, continues=fast).request.fps == LIMITS.max_fps


def test_models_say_what_they_do_with_films() -> None:
    """A model that edits nothing, and one that needs text alone."""
    with pytest.raises(UnsupportedRequest, match="does not edit videos") as refused:
        resolve(options(), CAN.model_copy(update={"is_video_to_video": False}), edits=FILM)
    assert refused.value.param == "video"
    with pytest.raises(UnsupportedRequest, match="it continues none") as refused:
        resolve(options(), CAN.model_copy(update={"is_image_to_video": False}), continues=FILM)
    assert refused.value.param == "video"


@given(
    st.integers(1, 161),
    st.one_of(st.none(), st.floats(0.1, 10)),
    st.integers(1, 60),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_whatever_is_accepted_can_be_made(
    frames: int, seconds: float | None, fps: int, width: int, height: int
) -> None:
    """A resolved request always keeps every bound of the model."""
    try:
        request = resolve(
            options(num_frames=None if seconds else frames, seconds=seconds, fps=fps),
            CAN,
            Size(width=width, height=height) if max(width, height) <= 4096 else None,
        ).request
    except InvalidRequest:
        return
    assert request.num_frames % 4 == 1
    assert 1 <= request.num_frames <= LIMITS.max_frames
    assert request.width % 16 == request.height % 16 == 0
    assert request.width * request.height * request.num_frames <= LIMITS.max_volume
