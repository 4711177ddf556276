"""What a video says it was made from and by."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.errors import InvalidRequest
from kinema.manifest import InputFile, Manifest, Recipe, read_tag
from kinema.request.request import GenerationRequest
from tests.unit.worker.tasks import make_request, manifest_of

# What a request has beside the recipe: inputs, which have digests of their own.
NOT_IN_RECIPE = {
    "control_video_keys",
    "reference_image_keys",
    "conditioning_keys",
    "image_key",
    "last_frame_key",
    "continues_key",
    "continues_frames",
    "edits_key",
}
# When and how it is made, which nobody sees in it.
NOT_IN_RECIPE |= {"priority", "deadline_s", "preview_every"}
# How its work is counted, which is the model's.
NOT_IN_RECIPE |= {"geometry"}
MANIFEST = manifest_of(make_request("a red circle 赤い円", guidance_scale=5.5))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def changed(manifest: Manifest, **values: object) -> str:
    """Its JSON with other values; a name with two underscores is a path."""
    said = json.loads(manifest.tags["comment"])
    for path, value in values.items():
        *parents, name = path.split("__")
        place = said
        for parent in parents:
            place = place[parent]
        place[name] = value
    return json.dumps(said)


def outcome(comment: str) -> tuple[Manifest | None, str]:
    """What was read, or the sentence of the refusal; anything else that is raised fails the test."""
    try:
        return read_tag(comment), ""
    except InvalidRequest as exc:
        return None, exc.message


def test_a_recipe_has_all_that_decides_how_a_video_looks() -> None:
    """A new field of the request must be put into it, or be said to have no part in the picture."""
    assert set(Recipe.model_fields) == set(GenerationRequest.model_fields) - NOT_IN_RECIPE


def test_a_tag_is_read_back() -> None:
    """Every value as it was, floats bit for bit."""
    assert read_tag(MANIFEST.tags["comment"]) == MANIFEST


def test_gpus_that_share_a_video_are_named() -> None:
    """One alone is not."""
    made_by = MANIFEST.made_by.model_copy(update={"gpus": 2, "parallel": "ulysses"})
    shared = MANIFEST.model_copy(update={"made_by": made_by})
    assert read_tag(shared.tags["comment"]) == shared
    assert shared.differences(MANIFEST) == ["gpus 2 (here absent)", "parallel ulysses (here absent)"]
    assert "gpus" not in MANIFEST.tags["comment"]


def test_it_names_no_key_of_storage() -> None:
    """Inputs are known by their digests alone."""
    request = make_request().model_copy(update={"image_key": "videos/secret/input.png", "continues_key": "videos/x/y"})
    assert "videos/" not in manifest_of(request).tags["comment"]


def test_a_first_frame_is_its_pixels() -> None:
    """However they lie in memory."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert InputFile.of("first_frame", pixels) == InputFile.of("first_frame", pixels.tobytes())
    assert InputFile.of("first_frame", pixels[:, ::-1]) != InputFile.of("first_frame", pixels)


@pytest.mark.parametrize(
    ("comment", "sentence"),
    [
        (None, "has no manifest"),
        ("made on holiday", "has no manifest"),
        ('{"kinema_manifest":1', "broken manifest"),
        ("[" * 100_000 + '"kinema_manifest"', "has no manifest"),
        ('{"kinema_manifest":' + "[" * 100_000, "broken manifest"),
        (changed(MANIFEST, kinema_manifest=2), "newer version"),
        (changed(MANIFEST, more=1), "'more'"),
        (changed(MANIFEST, request__seed="7"), "request.seed"),
        (changed(MANIFEST, request__seed=None), "request.seed"),
        (changed(MANIFEST, request__flow_shift=float("inf")), "broken manifest"),
        (changed(MANIFEST, request__image_key="/etc/passwd"), "request.image_key"),
        (changed(MANIFEST, request__model="\x1b[2J"), "request.model"),
        (changed(MANIFEST, made_by__device="x" * 1000), "made_by.device"),
        (changed(MANIFEST, inputs=[{"role": "first_frame", "sha256": "../..", "size_bytes": 1}]), "inputs.0.sha256"),
        (changed(MANIFEST, encoder=dict.fromkeys(map(str, range(100)), "1")), "encoder"),
        (changed(MANIFEST, request__prompt="x" * 1024 * 1024), "more characters"),
    ],
)
def test_what_is_not_as_ours_are_is_refused(comment: str | None, sentence: str) -> None:
    """In one sentence, which says where it is wrong and can be shown in a terminal."""
    with pytest.raises(InvalidRequest) as caught:
        read_tag(comment)
    assert sentence in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


@given(name=st.sampled_from([*Recipe.model_fields, "x"]), part=st.sampled_from(["request", "made_by"]), value=JSON)
def test_any_value_is_read_or_refused(name: str, part: str, value: object) -> None:
    """Never anything but InvalidRequest; what is read says what was written."""
    manifest, sentence = outcome(changed(MANIFEST, **{f"{part}__{name}": value}))
    assert sentence.isprintable()
    assert manifest is None or manifest.model_dump(mode="json")[part][name] == value


@given(st.data())
def test_damaged_text_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever is cut out or put in."""
    text = MANIFEST.tags["comment"]
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    damaged = text[:start] + data.draw(st.text(max_size=20)) + text[stop:]
    assert outcome(damaged)[1].isprintable()


def test_differences_name_what_differs() -> None:
    """With both values; nothing of what is equal, and nothing of the request but the model."""
    other = read_tag(
        changed(MANIFEST, kinema="9.9", made_by__device="Other", made_by__versions={"torch": "9"}, request__seed=1)
    )
    assert MANIFEST.differences(MANIFEST) == []
    assert other.differences(MANIFEST) == [
        f"kinema 9.9 (here {MANIFEST.kinema})",
        f"device Other (here {MANIFEST.made_by.device})",
        "torch 9 (here absent)",
        f"numpy absent (here {np.__version__})",
    ]
