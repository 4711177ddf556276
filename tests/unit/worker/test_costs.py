"""What a generation costs of the device."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.request.geometry import Geometry
from kinema.request.request import GenerationRequest
from kinema.worker.costs import CostModel, Done
from tests.unit.worker.tasks import make_request

SHORT = {"size": "832x480", "num_frames": 17, "num_inference_steps": 50}
LONG = {"size": "832x480", "num_frames": 81, "num_inference_steps": 50}
# Seconds of Wan 2.1 1.3B on an H200, guided: encode two prompts, a step, the first chunk and another.
H200 = {17: (0.058, 0.130, 0.02, 0.0825), 81: (0.058, 1.068, 0.02, 0.0804)}


def run(costs: CostModel, request: GenerationRequest, *, slower: float = 1.0) -> float:
    """Feed a whole generation with the measured seconds; returns their sum."""
    encode_s, step_s, first_s, chunk_s = (seconds * slower for seconds in H200[request.num_frames])
    done, spent_s = Done(), 0.0
    for index in range(1, request.num_denoising_steps + 1):
        seconds = step_s + (0.0 if done.is_begun else encode_s)
        after = Done(is_begun=True, steps=index)
        costs.observe(request, done, after, seconds)
        done, spent_s = after, spent_s + seconds
    for index in range(1, (request.num_frames - 1) // 4 + 2):
        seconds = first_s if index == 1 else chunk_s
        after = Done(is_begun=True, steps=done.steps, chunks=index)
        costs.observe(request, done, after, seconds)
        done, spent_s = after, spent_s + seconds
    return spent_s


def test_what_was_seen_is_predicted() -> None:
    """To the end, from every place on the way."""
    costs, request = CostModel(), make_request(**SHORT)
    spent_s = run(costs, request)
    assert costs.remaining_s(request) == pytest.approx(spent_s)
    assert costs.remaining_s(request, Done(is_begun=True, steps=50)) == pytest.approx(0.02 + 4 * 0.0825)
    assert costs.remaining_s(request, Done(is_begun=True, steps=50, chunks=5)) == 0
    assert costs.next_turn_s(request) == pytest.approx(0.188)
    assert costs.next_turn_s(request, Done(is_begun=True, steps=3)) == pytest.approx(0.130)
    assert costs.next_turn_s(request, Done(is_begun=True, steps=50, chunks=1)) == pytest.approx(0.0825)


def test_steps_without_the_model_are_left_out_of_what_is_to_come() -> None:
    """Once a video of as many steps had them; and they teach nothing of those with it."""
    costs, request = CostModel(), make_request(**SHORT | {"num_inference_steps": 10})
    spent_s = run(costs, request)
    before, after = Done(is_begun=True, steps=4), Done(is_begun=True, steps=5)
    costs.observe(request, before, after, 0.001, is_cached=True)
    assert costs.remaining_s(request) == pytest.approx(spent_s - 0.130)
    assert costs.next_turn_s(request, before) == 0
    assert costs.next_turn_s(request, after) == pytest.approx(0.130)
    assert costs.remaining_s(request, before) == costs.remaining_s(request, after)
    assert costs.remaining_s(make_request(**SHORT | {"num_inference_steps": 11})) == pytest.approx(spent_s + 0.130)


def test_another_number_of_steps_is_predicted_from_the_same() -> None:
    """Steps of one shape cost the same."""
    costs = CostModel()
    run(costs, make_request(**SHORT))
    ten = costs.remaining_s(make_request(**SHORT | {"num_inference_steps": 10}))
    assert ten == pytest.approx(0.058 + 10 * 0.130 + 0.02 + 4 * 0.0825)


def test_a_shape_that_was_never_seen_is_read_off_the_curve() -> None:
    """A long video from a short one alone: its attention grows with the square. Within a tenth of what it takes."""
    costs = CostModel()
    run(costs, make_request(**SHORT))
    assert costs.remaining_s(make_request(**LONG)) == pytest.approx(run(CostModel(), make_request(**LONG)), rel=0.1)


def test_a_shape_between_two_is_read_off_both() -> None:
    """Of 49 frames: the model's arithmetic at the two measured speeds says 0.47 to 0.5 s a step."""
    costs = CostModel()
    run(costs, make_request(**SHORT))
    run(costs, make_request(**LONG))
    step_s = costs.next_turn_s(make_request(**SHORT | {"num_frames": 49}), Done(is_begun=True, steps=1))
    assert step_s == pytest.approx(0.49, rel=0.05)


def test_without_guidance_a_step_runs_the_model_once() -> None:
    """Half the seconds, from guided steps alone."""
    costs = CostModel()
    run(costs, make_request(**LONG))
    request = make_request(**LONG, guidance_scale=1.0)
    assert costs.next_turn_s(request, Done(is_begun=True, steps=1)) == pytest.approx(1.068 / 2, rel=0.05)


def test_a_single_slow_turn_changes_nothing_and_a_slower_device_does() -> None:
    """An outlier is not the median; five turns are."""
    costs, request = CostModel(), make_request(**SHORT)
    run(costs, request)
    costs.observe(request, Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), 30.0)
    assert costs.next_turn_s(request, Done(is_begun=True, steps=2)) == pytest.approx(0.130)
    run(costs, request, slower=2.0)
    assert costs.next_turn_s(request, Done(is_begun=True, steps=2)) == pytest.approx(0.260)


def test_before_anything_was_measured_more_work_is_more() -> None:
    """So that the first videos are in the right order."""
    costs = CostModel()
    assert 0 < costs.remaining_s(make_request(**SHORT)) < costs.remaining_s(make_request(**LONG))


def test_a_generation_that_goes_on_from_a_checkpoint_teaches_the_same() -> None:
    """Its first turn is not the first step."""
    costs, request = CostModel(), make_request(**SHORT)
    costs.observe(request, Done(), Done(is_begun=True, steps=31), 0.188)
    costs.observe(request, Done(is_begun=True, steps=31), Done(is_begun=True, steps=32), 0.130)
    assert costs.next_turn_s(request) == pytest.approx(0.188)


def test_it_is_kept_as_json() -> None:
    """All of it, and it goes on learning."""
    costs, request = CostModel(), make_request(**SHORT)
    spent_s = run(costs, request)
    read = CostModel.from_json(json.loads(json.dumps(costs.to_json())))
    assert read.remaining_s(request) == pytest.approx(spent_s)
    assert read.to_json() == costs.to_json()


@pytest.mark.parametrize("told", [{}, {"begin": [], "step": [[[1.0], [2.0]]], "chunk": []}, {"begin": 1}])
def test_what_is_no_cost_model_is_refused(told: dict[str, object]) -> None:
    """A file that was written by something else."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        CostModel.from_json(told)


@given(
    seen=st.lists(
        st.tuples(st.sampled_from([1, 5, 17, 49, 81]), st.sampled_from(["64x64", "832x480"]), st.floats(0, 1e4)),
        max_size=20,
    ),
    num_frames=st.sampled_from([1, 9, 33, 121]),
)
def test_predictions_are_never_negative(seen: list[tuple[int, str, float]], num_frames: int) -> None:
    """Nor infinite, whatever was measured."""
    costs = CostModel()
    for frames, size, seconds in seen:
        request = make_request(size=size, num_frames=frames)
        costs.observe(request, Done(), Done(is_begun=True, steps=1), seconds)
        costs.observe(request, Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), seconds / 2)
        costs.observe(request, Done(is_begun=True, steps=3), Done(is_begun=True, steps=3, chunks=1), seconds / 3)
    assert 0 <= costs.remaining_s(make_request(num_frames=num_frames)) < 1e12


@pytest.mark.parametrize(("encodes_whole_film", "seconds"), [(False, 2.0), (True, 9.15)])
def test_given_frames_cost_what_is_encoded_of_them(encodes_whole_film: bool, seconds: float) -> None:
    """By the model: the frames themselves, or a film of the video's length, which a longer video has longer."""
    costs = CostModel(encodes_whole_film=encodes_whole_film)
    plain, first, longer = (
        make_request(**SHORT | {"num_frames": frames}).model_copy(update={"image_key": key})
        for frames, key in ((17, None), (17, "a"), (81, "a"))
    )
    for request, begin_s in ((plain, 0.1), (first, 2.0)):
        for before, after, took_s in (
            (Done(), Done(is_begun=True, steps=1), begin_s + 1.0),
            (Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), 1.0),
        ):
            costs.observe(request, before, after, took_s)
    begin_s = costs.remaining_s(longer) - costs.remaining_s(longer, Done(is_begun=True))
    assert begin_s == pytest.approx(seconds, rel=0.15)
    read = CostModel.from_json(costs.to_json(), encodes_whole_film=encodes_whole_film)
    assert read.remaining_s(longer) == pytest.approx(costs.remaining_s(longer))


def test_the_first_turns_of_a_shape_tell_nothing_of_other_shapes() -> None:
    """They compile and record. They are at most so long, which counts where all else says more."""
    costs, tiny = CostModel(), make_request(**SHORT | {"size": "320x192", "num_inference_steps": 2})
    run(costs, make_request(**SHORT))
    alone_s = costs.remaining_s(tiny)
    expected_s = costs.remaining_s(make_request(**LONG))
    costs.observe(tiny, Done(), Done(is_begun=True, steps=1), 20.0)
    costs.observe(tiny, Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), 6.0)
    costs.observe(tiny, Done(is_begun=True, steps=2), Done(is_begun=True, steps=2, chunks=1), 3.0)
    read = CostModel.from_json(json.loads(json.dumps(costs.told())))
    for one in (costs, read):
        assert one.remaining_s(tiny) == pytest.approx(alone_s, rel=0.01)
        assert one.remaining_s(make_request(**LONG)) == pytest.approx(expected_s, rel=0.01)
    costs.observe(tiny, Done(), Done(is_begun=True, steps=1), 0.2)
    costs.observe(tiny, Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), 0.1)
    assert costs.next_turn_s(tiny, Done(is_begun=True, steps=1)) == 0.1


def test_what_an_earlier_version_told_is_read() -> None:
    """It did not tell cold turns from others."""
    costs = CostModel()
    run(costs, make_request(**SHORT))
    told = {kind: points for kind, points in costs.to_json().items() if kind != "cold"}
    step_s = costs.next_turn_s(make_request(**SHORT), Done(is_begun=True, steps=1))
    assert CostModel.from_json(told).next_turn_s(make_request(**SHORT), Done(is_begun=True, steps=1)) == step_s


WHOLE = Geometry(token_pixels=1024, token_frames=8, part_frames=41, part_step=40, chunk_frames=None)


def test_an_engine_that_decodes_at_once_is_predicted_by_all_frames() -> None:
    """Frames that were handed out after that cost nothing; a video of two parts has steps of the length of one."""
    costs = CostModel(WHOLE)
    short, long = (
        make_request(**SHORT | {"num_frames": frames, "num_inference_steps": 3}).model_copy(
            update={"geometry": WHOLE, "num_frames": frames}
        )
        for frames in (41, 81)
    )
    for _ in range(3):
        costs.observe(short, Done(), Done(is_begun=True, steps=1), 1.5)
        costs.observe(short, Done(is_begun=True, steps=1), Done(is_begun=True, steps=2), 1.0)
        costs.observe(short, Done(is_begun=True, steps=3), Done(is_begun=True, steps=3, chunks=1), 2.0)
        costs.observe(short, Done(is_begun=True, steps=3, chunks=1), Done(is_begun=True, steps=3, chunks=2), 0.001)
    assert costs.remaining_s(short) == pytest.approx(0.5 + 3 * 1.0 + 2.0)
    assert costs.remaining_s(short, Done(is_begun=True, steps=3, chunks=1)) == 0
    assert costs.next_turn_s(short, Done(is_begun=True, steps=3, chunks=1)) == 0
    assert costs.remaining_s(long) == pytest.approx(0.5 + 6 * 1.0 + 2.0 * 81 / 41)
    read = CostModel.from_json(json.loads(json.dumps(costs.told())), WHOLE)
    assert read.remaining_s(long) == pytest.approx(costs.remaining_s(long))


def test_costs_that_were_counted_otherwise_are_refused() -> None:
    """Those of an earlier version are of the default geometry, whatever the model has."""
    costs = CostModel(WHOLE)
    told = costs.to_json()
    assert CostModel.from_json(told, WHOLE).to_json() == told
    for other, geometry in ((told, Geometry()), ({**told, "geometry": 3}, WHOLE)):
        with pytest.raises(ValueError, match=r"tokens|Geometry"):
            CostModel.from_json(other, geometry)
    del told["geometry"]
    assert CostModel.from_json(told).to_json() == CostModel().to_json()
    with pytest.raises(ValueError, match="they were counted in other tokens"):
        CostModel.from_json(told, WHOLE)
