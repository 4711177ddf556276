"""Costs outlive the worker that learned them."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kinema.engines.fake import FakeEngine
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.costs import CostModel, Done
from kinema.worker.costs_file import costs_path, read_costs, write_costs
from kinema.worker.worker import Worker
from tests.unit.worker.tasks import make_request


async def test_the_next_worker_knows_what_the_last_one_learned(tmp_path: Path) -> None:
    """A file for the model and the device, written at the end and read at the start."""
    storage = Storage(f"file://{tmp_path / 'files'}")
    for _ in range(2):
        worker = Worker(FakeEngine(), storage, WorkerSettings(), data_dir=tmp_path)
        await worker.start()
        await worker.probe()
        await worker.stop()
    (path,) = (tmp_path / "costs").iterdir()
    assert path == costs_path(tmp_path, "fake", "cpu")
    # Two probes of three steps, the first of which begins.
    assert [len(seen) for _, seen in read_costs(path).to_json()["step"]] == [4]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"begin": [[[1], [2]]], "step": [], "chunk": []}'])
def test_a_broken_file_is_as_none(text: str, tmp_path: Path) -> None:
    """With a line in the log; the device is measured anew."""
    path = tmp_path / "costs.json"
    path.write_text(text)
    with capture_logs() as logs:
        assert read_costs(path).to_json() == CostModel().to_json()
    assert logs[0]["event"] == "the costs of an earlier run were not read"


def test_names_of_models_are_no_paths(tmp_path: Path) -> None:
    """A folder or a hub name has slashes."""
    assert costs_path(tmp_path, "../Wan-AI/Wan2.1", "cuda:0").parent == tmp_path / "costs"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """A worker without a disk of its own learns anew at each start."""
    (tmp_path / "costs").write_text("in the way")
    costs, request = CostModel(), make_request()
    costs.observe(request, Done(), Done(is_begun=True, steps=1), 1.0)
    with capture_logs() as logs:
        write_costs(costs_path(tmp_path, "fake", "cpu"), costs)
    assert logs[0]["event"] == "the costs were not kept"
