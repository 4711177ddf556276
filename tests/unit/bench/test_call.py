"""What ``kinema bench call`` reads off an answer and a manifest."""

from __future__ import annotations

from dataclasses import astuple

from kinema.bench.call import Call

ADMITTED_AT = 1_700_000_000.0
STORED = {"denoise_s": 4.5, "first_step_s": 1.5, "decode_s": 2.0, "delivery_s": 0.5, "total_s": 7.25}
MANIFEST = {"made_at": ADMITTED_AT + 7.25, "timings": STORED, "request": {"num_inference_steps": 4}}
VIDEO = {"id": "video_1", "timings": STORED | {"delivery_s": 0.75, "total_s": 7.5}}


def test_the_parts_of_a_call_are_the_whole() -> None:
    """A step takes 1 s, so half a second of the first one is not the step's own."""
    made = Call.of(ADMITTED_AT - 0.125, ADMITTED_AT + 7.75, VIDEO, MANIFEST)
    assert made == Call(
        request_s=0.125,
        begin_s=0.25,
        text_s=0.5,
        steps_s=4.0,
        decode_s=2.0,
        file_s=0.75,
        answer_s=0.25,
        whole_s=7.875,
    )
    *parts, whole = astuple(made)
    assert sum(parts) == whole


def test_a_first_step_that_was_short_leaves_nothing_for_the_text() -> None:
    """And not less than nothing."""
    short = STORED | {"first_step_s": 0.75}
    made = Call.of(ADMITTED_AT, ADMITTED_AT + 7.75, VIDEO | {"timings": short}, MANIFEST | {"timings": short})
    assert (made.text_s, made.steps_s) == (0.0, 4.5)


def test_each_part_has_its_own_median() -> None:
    """Else a call that was slow in one part alone would be left out as a whole."""
    calls = [Call(*(float(number),) * 7, whole_s=float(8 - number)) for number in (1, 2, 9)]
    assert Call.median_of(calls) == Call(*(2.0,) * 7, whole_s=6.0)
