"""The JSON shapes, against committed files: a change to one is a change to the API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.engines.fake import FakeEngine
from kinema.events import Artifact, Timings
from kinema.ids import JobId
from kinema.job import Job, JobError, JobStatus
from kinema.server.schemas import Model, Video
from tests.serving import REQUEST

GOLDEN = Path(__file__).parents[2] / "golden"
JOB = Job(
    id=JobId("video_00000000000000000000000000000001"),
    request=REQUEST,
    warnings=("num_frames 4 -> 5: must be a multiple of 4 plus 1",),
    status=JobStatus.COMPLETED,
    progress=100,
    attempt=1,
    created_at=1_700_000_000.9,
    started_at=1_700_000_001.0,
    finished_at=1_700_000_003.5,
    artifact=Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e"),
    timings=Timings(denoise_s=1.5, first_step_s=1.2, decode_s=0.8, delivery_s=0.1, total_s=2.4),
)
FAILED = JOB.model_copy(
    update={
        "request": REQUEST.model_copy(update={"guidance_scale_2": 3.0, "boundary_ratio": 0.875}),
        "warnings": (),
        "status": JobStatus.FAILED,
        "progress": 45,
        "artifact": None,
        "timings": None,
        "error": JobError(code="out_of_memory", message="The device ran out of memory."),
    }
)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("video_url", Video.from_job(JOB, url="http://host/v1/videos/video_1/content")),
        ("video_b64_json", Video.from_job(JOB, b64_json="AAAA")),
        ("video_failed_two_experts", Video.from_job(FAILED)),
        ("model", Model.from_capabilities(FakeEngine().capabilities, created=1_700_000_000)),
    ],
)
def test_bodies_are_as_committed(name: str, shape: Video | Model) -> None:
    """Names, order, types and values."""
    found = json.dumps(shape.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    assert found == (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
