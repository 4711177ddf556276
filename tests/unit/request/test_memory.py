"""Which requests fit into the memory of a device: plain numbers."""

from __future__ import annotations

import math

import pytest

from kinema.engines.fake import FakeEngine
from kinema.errors import UnsupportedRequest
from kinema.request.geometry import Geometry
from kinema.request.memory import GuidanceMemory, Memory, Need, check_memory, most_frames
from kinema.request.request import GenerationRequest
from tests.unit.worker.tasks import make_request

MB = 10**6
CAN = FakeEngine().capabilities


def memory(room_mb: float, *, step: Need | None = None, decode: Need | None = None) -> Memory:
    """A step takes 1 MB and 10 kB a token, a decode 1 kB a pixel, unless other lines are given."""
    return Memory(
        limit_bytes=1000 * MB,
        residents={"transformer": 500 * MB},
        room_bytes=int(room_mb * MB),
        step=step or Need(base_bytes=MB, bytes_per_unit=10_000),
        decode=decode or Need(base_bytes=0, bytes_per_unit=1000),
        guidance=GuidanceMemory(tokens_together=3000),
    )


def request(num_frames: int, guidance_scale: float = 5.0) -> GenerationRequest:
    """128x128: 64 tokens for each latent frame and pass."""
    made = make_request(num_frames=num_frames)
    return made.model_copy(update={"width": 128, "height": 128, "guidance_scale": guidance_scale})


def test_a_line_and_back() -> None:
    """So many units for so many bytes; none where the bytes are not enough, any number of those that cost nothing."""
    need = Need(base_bytes=100, bytes_per_unit=10)
    assert (need.bytes_for(7), need.most_units(170), need.most_units(99)) == (170, 7, 0)
    assert Need(base_bytes=100, bytes_per_unit=0).most_units(101) == math.inf


@pytest.mark.parametrize(
    ("num_frames", "guidance_scale", "megabytes"),
    [(1, 1.0, 16.384), (1, 5.0, 16.384), (81, 1.0, 14.44), (81, 5.0, 27.88)],
)
def test_a_request_takes_what_its_largest_part_takes(num_frames: int, guidance_scale: float, megabytes: float) -> None:
    """A step by its tokens, twice with guidance, or a decode by its pixels."""
    expected = max(megabytes, 16.384)
    assert memory(1000).bytes_for(request(num_frames, guidance_scale)) == expected * MB


@pytest.mark.parametrize(
    ("num_frames", "room_mb", "sentence"),
    [
        (
            81,
            20,
            "81 frames of 128x128 take 27.9 GB of the device, and 20 GB are there for a video; "
            "at this size at most 53 frames",
        ),
        (
            9,
            16,
            "a frame of 128x128 takes 16.4 GB of the device, and 16 GB are there for a video; "
            "a size has at most 16000 pixels here",
        ),
    ],
)
def test_what_would_not_fit_alone_is_refused(num_frames: int, room_mb: float, sentence: str) -> None:
    """With the most frames of that size, or the largest size; and what it names would be accepted."""
    scaled = memory(
        room_mb * 1000,
        step=Need(base_bytes=1000 * MB, bytes_per_unit=10 * MB),
        decode=Need(base_bytes=0, bytes_per_unit=MB),
    )
    with pytest.raises(UnsupportedRequest) as refused:
        check_memory(request(num_frames), CAN.limits, [scaled])
    assert refused.value.message == sentence
    if num_frames == 81:
        check_memory(request(53), CAN.limits, [scaled])
        with pytest.raises(UnsupportedRequest):
            check_memory(request(57), CAN.limits, [scaled])


def test_one_worker_with_room_is_enough() -> None:
    """The sentence is of the one that makes the most."""
    check_memory(request(81), CAN.limits, [memory(20), memory(28)])
    with pytest.raises(UnsupportedRequest, match="at most 61 frames"):
        check_memory(request(81), CAN.limits, [memory(20), memory(22), memory(17)])


def test_nothing_is_refused_before_it_was_measured() -> None:
    """Nor where one worker says nothing of its memory, as an older one, or there is none yet."""
    unmeasured = Memory(limit_bytes=10, residents={}, room_bytes=0)
    for workers in ([], [None], [unmeasured], [memory(1), None], [memory(1), unmeasured]):
        check_memory(request(81), CAN.limits, workers)
        assert most_frames(CAN, workers) is None


def test_the_most_frames_of_the_presets_size() -> None:
    """Of the worker with the most room, and no more than the model makes; 0 where no frame fits."""
    assert most_frames(CAN, [memory(20), memory(22)]) == 61
    assert most_frames(CAN, [memory(900)]) == 257
    assert most_frames(CAN, [memory(16)]) == 0


def test_many_tokens_have_passes_that_take_turns() -> None:
    """So a little more of them takes less memory; the most frames that are named are the most that fit."""
    narrow = memory(30).model_copy(update={"guidance": GuidanceMemory(tokens_together=1000, passes_apart=1.25)})
    guided = [request(num_frames) for num_frames in (57, 61)]
    assert [narrow.step_units(one) for one in guided] == [2 * 960, 1.25 * 1024]
    assert narrow.step_units(request(57, 1.0)) == 960
    assert most_frames(CAN, [narrow]) == 141
    assert narrow.has_room_for(request(141))
    assert not narrow.has_room_for(request(145))


def test_a_worker_counts_tokens_by_the_geometry_that_it_measured_with() -> None:
    """Whatever the request was counted by: a worker of an older version said nothing of it."""
    large = memory(1000).model_copy(update={"geometry": Geometry(token_pixels=1024, token_frames=8)})
    assert large.step_units(request(81, 1.0)) == 16 * 11
    told = memory(1000).model_dump(mode="json", exclude={"geometry"})
    other = request(81, 1.0).model_copy(update={"geometry": large.geometry})
    assert Memory.model_validate(told).step_units(other) == 64 * 21
