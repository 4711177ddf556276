"""The state machine of a job."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.events import Artifact, Cancelled, Completed, Event, Failed, Progress, Queued, Started
from kinema.ids import new_job_id
from kinema.job import IllegalTransition, Job, JobStatus, advance, share_done, share_of
from kinema.request.request import GenerationRequest

REQUEST = GenerationRequest(
    model="m",
    prompt="p",
    negative_prompt="",
    width=64,
    height=64,
    num_frames=5,
    fps=8,
    num_inference_steps=4,
    guidance_scale=1.0,
    flow_shift=3.0,
    seed=1,
)
ARTIFACT = Artifact(key="videos/x/video.mp4", media_type="video/mp4", size_bytes=3, etag="abc")
EVENTS: dict[str, Event] = {
    "queued": Queued(),
    "started": Started(worker_id="w", attempt=1),
    "progress": Progress(stage="denoise", step=1, total=4),
    "completed": Completed(artifact=ARTIFACT),
    "failed": Failed(code="engine_failed", message="no"),
    "cancelled": Cancelled(),
}
LEGAL = {
    JobStatus.QUEUED: {"queued", "started", "failed", "cancelled"},
    JobStatus.IN_PROGRESS: {"started", "progress", "completed", "failed", "cancelled"},
    JobStatus.COMPLETED: set(),
    JobStatus.FAILED: set(),
    JobStatus.CANCELLED: set(),
}


def make_job(status: JobStatus) -> Job:
    return Job(id=new_job_id(), request=REQUEST, created_at=1.0, status=status)


@pytest.mark.parametrize(("status", "name"), [*itertools.product(JobStatus, EVENTS)])
def test_only_the_legal_transitions_are_taken(status: JobStatus, name: str) -> None:
    """Every pair of status and event is either in the table or refused."""
    if name in LEGAL[status]:
        advance(make_job(status), EVENTS[name], now=2.0)
    else:
        with pytest.raises(IllegalTransition, match=name):
            advance(make_job(status), EVENTS[name], now=2.0)


def test_a_job_lived_through() -> None:
    """Started, denoised, decoded, completed: the percentage grows and the times are kept."""
    job = make_job(JobStatus.QUEUED)
    events: list[Event] = [
        EVENTS["started"],
        Progress(stage="denoise", step=2, total=4),
        Progress(stage="denoise", step=4, total=4),
        Progress(stage="decode", step=1, total=2),
        EVENTS["completed"],
    ]
    percents = []
    for event in events:
        job = advance(job, event, now=5.0)
        percents.append(job.progress)
    assert percents == [0, 22, 44, 71, 100]
    assert (job.status, job.artifact, job.started_at, job.finished_at) == (JobStatus.COMPLETED, ARTIFACT, 5.0, 5.0)


def test_the_percentage_goes_by_the_work() -> None:
    """Of a long denoising the decoding is the end, of a short one half; a film that is made is not yet stored."""
    decoded, denoised = Progress(stage="decode", step=3, total=3), Progress(stage="denoise", step=200, total=200)
    for num_steps, expected in ((1, 16), (4, 44), (200, 96)):
        request = REQUEST.model_copy(update={"num_inference_steps": num_steps})
        job = make_job(JobStatus.IN_PROGRESS).model_copy(update={"request": request})
        assert advance(job, denoised).progress == expected
        assert advance(job, decoded).progress == 99


@given(num_steps=st.integers(1, 200), data=st.data())
def test_the_percentage_tells_the_share_within_a_point(num_steps: int, data: st.DataObject) -> None:
    request = REQUEST.model_copy(update={"num_inference_steps": num_steps})
    job = make_job(JobStatus.IN_PROGRESS).model_copy(update={"request": request})
    step = Progress(stage="denoise", step=data.draw(st.integers(1, num_steps)), total=num_steps)
    told, points = advance(job, step).progress, 99 * share_done(step, request)
    assert told <= points < told + 1
    assert abs(99 * share_of(told) - points) <= (0.5 + 1e-9 if told else 1)


def test_what_an_engine_warns_of_stands_behind_what_was_adjusted() -> None:
    """Both are for the client."""
    job = make_job(JobStatus.IN_PROGRESS).model_copy(update={"warnings": ("adjusted",)})
    done = advance(job, Completed(artifact=ARTIFACT, warnings=("smaller",)), now=5.0)
    assert done.warnings == ("adjusted", "smaller")


def test_a_second_attempt_starts_over_but_keeps_its_first_start() -> None:
    """Progress goes back to zero with a new attempt; the client's clock does not."""
    job = advance(make_job(JobStatus.QUEUED), Started(worker_id="a", attempt=1), now=5.0)
    job = advance(job, EVENTS["progress"], now=6.0)
    job = advance(job, Started(worker_id="b", attempt=2), now=9.0)
    assert (job.progress, job.attempt, job.started_at) == (0, 2, 5.0)


def test_ids_are_not_guessable() -> None:
    """128 random bits each."""
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(job_id) == len("video_") + 32 for job_id in ids)


def test_a_job_of_an_older_version_is_read() -> None:
    """Its request says nothing of what came later, a last frame for instance."""
    job = make_job(JobStatus.QUEUED)
    row = job.model_dump(mode="json")
    del row["request"]["last_frame_key"]
    assert Job.model_validate(row) == job
