"""A video made again from what it says about itself."""

from __future__ import annotations

import asyncio
import io
import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kinema.cli.generate import generate_file
from kinema.cli.replay import Verdict, compare, prepare_again, read_manifest
from kinema.engines.fake import FakeEngine
from kinema.errors import InvalidRequest, KinemaError, RequestError, UnsupportedRequest
from kinema.inputs import prepare
from kinema.manifest import Manifest, Recipe, read_tag
from kinema.media.mp4 import Mp4Writer
from kinema.request.capabilities import LoraInfo, Tier, TierLora
from kinema.request.options import NOTHING_GIVEN, GenerationOptions, Given, LoraAsk
from tests.serving import Serving, serving
from tests.unit.worker.tasks import make_request, manifest_of

SMALL = {"size": "64x64", "num_frames": 9, "num_inference_steps": 2, "seed": 7}
CAN = FakeEngine().capabilities


def options(prompt: str = "a red circle", **changes: object) -> GenerationOptions:
    return GenerationOptions.model_validate({"prompt": prompt, **SMALL, **changes})


def make(
    path: Path,
    *,
    image: bytes | None = None,
    last_frame: bytes | None = None,
    video: Path | None = None,
    **changes: object,
) -> Path:
    """A video as ``kinema generate`` makes it."""
    given = Given(image=image, last_frame=last_frame, edits=None if video is None else video.read_bytes())
    generate_file(FakeEngine(), prepare(given, options(**changes), CAN), path, lambda _output: None)
    return path


def replay(
    path: Path, image: bytes | None = None, last_frame: bytes | None = None, video: Path | None = None
) -> Verdict:
    again = path.with_name("again.mp4")
    given = Given(image=image, last_frame=last_frame, edits=None if video is None else video.read_bytes())
    prepared = prepare_again(path, read_manifest(path), CAN, given)
    generate_file(FakeEngine(), prepared, again, lambda _output: None)
    return compare(path, again)


def picture(size: tuple[int, int] = (64, 64), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def film_that_says(path: Path, comment: str) -> Path:
    """A film of one black frame."""
    writer = Mp4Writer(path, width=64, height=64, fps=8, metadata={"comment": comment})
    writer.add(np.zeros((1, 64, 64, 3), np.uint8))
    writer.close()
    return path


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """A copy with other bytes of the same length."""
    content = path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    copy = path.with_name("changed.mp4")
    copy.write_bytes(content.replace(old, new))
    return copy


def test_a_video_is_made_again_with_its_loras(tmp_path: Path) -> None:
    """The same files in the same strengths; one that has changed or is gone is named in a sentence."""
    paper, clay = LoraInfo(name="paper", digest="a" * 64, scale=0.7), LoraInfo(name="clay", digest="b" * 64)
    engine, path, again = FakeEngine(loras=[paper, clay]), tmp_path / "film.mp4", tmp_path / "again.mp4"
    asked = (LoraAsk(name="clay", scale=-0.5), LoraAsk(name="paper"))
    prepared = prepare(NOTHING_GIVEN, options(loras=asked), engine.capabilities)
    generate_file(engine, prepared, path, lambda _output: None)
    # Its own strength is another one by now.
    later = FakeEngine(loras=[clay, paper.model_copy(update={"scale": 0.1})])
    generate_file(later, prepare_again(path, read_manifest(path), later.capabilities), again, lambda _output: None)
    assert compare(path, again) == Verdict(True, "the same bytes")
    changed = FakeEngine(loras=[paper, clay.model_copy(update={"digest": "c" * 64})]).capabilities
    with pytest.raises(UnsupportedRequest, match="the LoRA clay is not the file that is asked for"):
        prepare_again(path, read_manifest(path), changed)
    with pytest.raises(UnsupportedRequest, match="fake has no LoRA 'clay'; there are paper"):
        prepare_again(path, read_manifest(path), FakeEngine(loras=[paper]).capabilities)
    with pytest.raises(UnsupportedRequest, match="fake has no LoRAs here"):
        prepare_again(path, read_manifest(path), CAN)


def test_a_video_of_a_tier_is_made_again_by_its_values(tmp_path: Path) -> None:
    """Also when the model's tier of that name has other ones, or is gone."""
    fast = LoraInfo(name="fast", digest="a" * 64)
    tier = Tier(name="draft", timesteps=(1000, 750.5), guidance_scale=1.0, solver="lcm", loras=(TierLora(name="fast"),))
    engine, path, again = FakeEngine(loras=[fast], tiers=[tier]), tmp_path / "film.mp4", tmp_path / "again.mp4"
    generate_file(
        engine, prepare(NOTHING_GIVEN, options(tier="draft"), engine.capabilities), path, lambda _output: None
    )
    recipe = read_manifest(path).request
    assert (recipe.tier, recipe.solver, recipe.timesteps) == ("draft", "lcm", (1000, 750.5))
    changed = tier.model_copy(update={"timesteps": (900.0,), "solver": None, "loras": ()})
    for tiers in ([tier], [changed], []):
        later = FakeEngine(loras=[fast], tiers=tiers)
        generate_file(later, prepare_again(path, read_manifest(path), later.capabilities), again, lambda _output: None)
        assert compare(path, again) == Verdict(True, "the same bytes")


def test_a_video_is_made_again(tmp_path: Path) -> None:
    """The same bytes, and nothing was drawn or filled in anew."""
    path = make(tmp_path / "film.mp4", guidance_scale=3.3, negative_prompt="赤", fps=11)
    assert replay(path) == Verdict(True, "the same bytes")


def test_a_video_of_a_model_that_has_no_flow_shift_any_more_is_made_again(tmp_path: Path) -> None:
    """Earlier versions wrote a shift of 1 for each of them, which leaves the timesteps as they are."""
    path = make(tmp_path / "film.mp4", flow_shift=1.0)
    can = CAN.model_copy(update={"preset": CAN.preset.model_copy(update={"flow_shift": None})})
    assert prepare_again(path, read_manifest(path), can).request.flow_shift == 1.0


def test_a_first_frame_is_given_again(tmp_path: Path) -> None:
    """The file that it was, or another one of the same pixels; another picture is refused, and so is none."""
    image = picture((100, 80))
    path = make(tmp_path / "film.mp4", image=image)
    assert replay(path, image).is_same
    fitted = prepare(Given(image=image), options(), CAN).first_frame
    assert fitted is not None
    buffer = io.BytesIO()
    Image.fromarray(fitted).save(buffer, "WEBP", lossless=True, exact=True)
    assert replay(path, buffer.getvalue()).is_same
    with pytest.raises(InvalidRequest, match="--image is not the first frame that it was made from"):
        replay(path, picture((100, 80), seed=1))
    with pytest.raises(InvalidRequest, match="give that image with --image"):
        replay(path)


def test_a_last_frame_is_given_again(tmp_path: Path) -> None:
    """Beside the first one; each is asked for and compared by itself."""
    first, last = picture((100, 80)), picture((100, 80), seed=1)
    path = make(tmp_path / "film.mp4", image=first, last_frame=last)
    assert replay(path, first, last).is_same
    with pytest.raises(InvalidRequest, match="--last-frame is not the last frame that it was made from"):
        replay(path, first, first)
    with pytest.raises(InvalidRequest, match="give that image with --last-frame"):
        replay(path, first)
    with pytest.raises(InvalidRequest, match="give that image with --image"):
        replay(path, last_frame=last)
    with pytest.raises(InvalidRequest, match="without a last frame of its own; leave --last-frame out"):
        replay(make(tmp_path / "other.mp4", image=first), first, last)


def test_an_edit_is_made_again(tmp_path: Path) -> None:
    """From the film that it was made from."""
    source = make(tmp_path / "source.mp4")
    path = make(tmp_path / "film.mp4", prompt="a dog", video=source, strength=0.5)
    assert replay(path, video=source).is_same
    with pytest.raises(InvalidRequest, match="--video is not the film that it was made from"):
        replay(path, video=path)
    with pytest.raises(InvalidRequest, match="give that film with --video"):
        replay(path, picture())


def test_inputs_that_it_did_not_have_are_refused(tmp_path: Path) -> None:
    """Nobody is left to believe that they had a part in it."""
    path = make(tmp_path / "film.mp4")
    with pytest.raises(InvalidRequest, match="leave --image out"):
        replay(path, picture())
    with pytest.raises(InvalidRequest, match="leave --video out"):
        replay(path, video=path)


async def served(it: Serving, path: Path, given: Given | None = None, **changes: object) -> Path:
    """A video as the service makes it."""
    job = await it.service.submit(options(**changes), given=given or Given())
    film = await it.service.open_artifact((await it.service.wait(job.id)).id)
    await asyncio.to_thread(lambda: path.write_bytes(b"".join(film.read())))
    return path


async def test_what_the_service_made_is_made_again(tmp_path: Path) -> None:
    """From text, a picture, a film that is edited and a film that is continued."""
    image = picture((100, 80))
    async with serving() as it:
        first = await served(it, tmp_path / "first.mp4")
        moved = await served(it, tmp_path / "moved.mp4", Given(image=image))
        edited = await served(it, tmp_path / "edited.mp4", Given(edits=first.read_bytes()), strength=0.5)
        longer = await served(it, tmp_path / "longer.mp4", Given(continues=first.read_bytes()))
    assert replay(first).is_same
    assert replay(moved, image).is_same
    assert replay(edited, video=first).is_same
    assert replay(longer, video=first).is_same
    with pytest.raises(InvalidRequest, match="--video is not the film that it continues"):
        replay(longer, video=moved)


def test_a_changed_seed_is_another_video(tmp_path: Path) -> None:
    """It says so, and that nothing on this machine explains it."""
    path = changed(make(tmp_path / "film.mp4"), b'"seed":7', b'"seed":8')
    verdict = replay(path)
    assert not verdict.is_same
    assert verdict.sentence.startswith("different pictures; what differs: nothing that the manifests name")


def test_another_machine_is_named(tmp_path: Path) -> None:
    """Also when the pictures came out the same: then it is the manifest alone that differs."""
    version = np.__version__
    other = "9" * len(version)
    path = changed(make(tmp_path / "film.mp4"), f'"numpy":"{version}"'.encode(), f'"numpy":"{other}"'.encode())
    assert replay(path) == Verdict(
        False, f"the same pictures in a different file; what differs: numpy {other} (here {version})"
    )


def test_a_film_without_a_manifest_is_refused(tmp_path: Path) -> None:
    """And so is what is no film; both name the file."""
    path = film_that_says(tmp_path / "film.mp4", "holidays")
    with pytest.raises(InvalidRequest, match=r"film\.mp4 has no manifest"):
        read_manifest(path)
    path.write_bytes(b"text")
    with pytest.raises(InvalidRequest, match=r"film\.mp4: .*not a film of a known kind"):
        read_manifest(path)


def test_a_gif_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    """It has no place for a manifest."""
    with pytest.raises(
        InvalidRequest, match=r"wave\.GIF: a GIF does not say how it was made; give an MP4 or WebM file"
    ):
        read_manifest(make(tmp_path / "wave.GIF", output_format="gif"))


def test_another_engine_or_model_is_refused(tmp_path: Path) -> None:
    """A manifest chooses neither: it may say what it likes. A model that the caller names is taken at its word."""
    path = make(tmp_path / "film.mp4")
    manifest = read_manifest(path)
    wan = CAN.model_copy(update={"engine": "wan"})
    with pytest.raises(InvalidRequest, match="made by the engine 'fake'; give it with --engine"):
        prepare_again(path, manifest, wan)
    other = CAN.model_copy(update={"model": "other"})
    with pytest.raises(InvalidRequest, match="made by the model 'fake', not 'other'; give it with --model"):
        prepare_again(path, manifest, other)
    renamed = CAN.named("other", ["fake"])
    assert prepare_again(path, manifest, renamed).request.model == "other"
    prepared = prepare_again(path, manifest, other, is_model_given=True)
    assert prepared.request.model == "other"


def test_a_request_that_would_be_adjusted_is_refused(tmp_path: Path) -> None:
    """It would not be that video."""
    said = manifest_of(make_request())
    recipe = said.request.model_copy(update={"num_frames": 8})
    with pytest.raises(UnsupportedRequest, match="cannot be made again by this model: num_frames would differ"):
        prepare_again(tmp_path, said.model_copy(update={"request": recipe}), CAN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 10**30),
        ("width", -64),
        ("num_frames", 10**30),
        ("num_inference_steps", 10**9),
        ("fps", 0),
        ("seed", -1),
        ("seed", 2**70),
        ("prompt", ""),
        ("prompt", "a\0b"),
        ("prompt", "x" * 100_000),
        ("guidance_scale", 1e300),
        ("guidance_scale_2", 3.0),
        ("strength", 0.5),
    ],
)
def test_a_request_beyond_the_models_bounds_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """As a client's would be."""
    said = json.loads(manifest_of(make_request()).tags["comment"])
    said["request"][name] = value
    path = film_that_says(tmp_path / "film.mp4", json.dumps(said))
    with pytest.raises(RequestError):
        prepare_again(path, read_manifest(path), CAN)


NUMBERS = st.integers() | st.floats() | st.none() | st.text(max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(sorted(set(Recipe.model_fields) - {"model"})), NUMBERS, max_size=3))
def test_any_manifest_is_made_as_it_says_or_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """Nothing is filled in, and nothing but a sentence comes of what cannot be made."""
    said = json.loads(manifest_of(make_request()).tags["comment"])
    said["request"] |= changes
    with suppress(KinemaError):
        manifest: Manifest = read_tag(json.dumps(said))
        prepared = prepare_again(tmp_path, manifest, CAN)
        assert Recipe.of(prepared.request) == manifest.request


def test_a_video_is_made_again_with_all_its_inputs_and_as_the_same_kind_of_file(tmp_path: Path) -> None:
    """Films of control, reference images, pictures of single frames; each that is missing or another is named."""
    control = make(tmp_path / "control.mp4").read_bytes()
    all_of_them = Given(control_video=(control,), reference_images=(picture((16, 16)),), conditioning=((3, picture()),))
    path, again = tmp_path / "film.webm", tmp_path / "again.webm"
    prepared = prepare(all_of_them, options(output_format="webm"), CAN)
    generate_file(FakeEngine(), prepared, path, lambda _output: None)
    generate_file(FakeEngine(), prepare_again(path, read_manifest(path), CAN, all_of_them), again, lambda _output: None)
    assert compare(path, again) == Verdict(True, "the same bytes")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"control_video": ()}, "by films of control; give each with --control-video"),
        ({"reference_images": (picture((16, 16), seed=1),)}, "--reference-image is not the picture"),
        ({"conditioning": ((3, picture(seed=1)),)}, "--conditioning is not the picture"),
        ({"conditioning": ((4, picture()),)}, "conditioning_frames would differ"),
    )
    for changes, said in wrong:
        with pytest.raises((InvalidRequest, UnsupportedRequest), match=re.escape(said)):
            prepare_again(path, read_manifest(path), CAN, replace(all_of_them, **changes))
    with pytest.raises(InvalidRequest, match="without a control video of its own; leave --control-video out"):
        prepare_again(path, read_manifest(tmp_path / "control.mp4"), CAN, Given(control_video=(control,)))
