"""Workers that are killed, frozen or told to end, while their videos are in every phase."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.faults.deployment import Deployment, worker_id_of
from tests.faults.ledger import History, started_by
from tests.faults.processes import Process, until
from tests.faults.recovery import Recoveries
from tests.faults.scene import LONG_DECODING, LONG_DENOISING, SMALL, STORED, Scene, scene

pytestmark = pytest.mark.faults

KILL, FREEZE, ASK = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
SENT = {"denoising": LONG_DENOISING, "decoding": LONG_DECODING, "uploading": STORED}
EXIT_CODES = {KILL: -KILL, ASK: 0}


@pytest.mark.parametrize("number", [KILL, FREEZE, ASK], ids=["killed", "frozen", "asked"])
@pytest.mark.parametrize("phase", list(SENT))
def test_a_worker_goes_while_it_works(
    phase: str, number: signal.Signals, cluster: Deployment, recoveries: Recoveries
) -> None:
    """What it had is made elsewhere, or here when it was asked to end; a frozen one comes back and does no harm."""
    with scene(cluster, recoveries, f"worker, {phase}: {number.name}") as it:
        with caught(cluster, phase) as (video_id, worker_id):
            process = cluster.worker(worker_id)
            it.strike_worker(worker_id, process, number)
            if number is ASK:
                process.wait_until_said("ending; another signal gives back what runs")
            check_phase(cluster.ledger.history(video_id), phase)
        get_over(cluster, it, process, worker_id, number, video_id)
    if number is not ASK:
        assert cluster.ledger.attempts()[video_id] > 1, "the fault came too late to do harm"


@pytest.mark.parametrize("number", [KILL, FREEZE, ASK], ids=["killed", "frozen", "asked"])
def test_a_worker_goes_while_videos_are_queued(
    number: signal.Signals, cluster: Deployment, recoveries: Recoveries
) -> None:
    """More videos come at once than the others have room for, before anybody knows that this worker is gone."""
    with scene(cluster, recoveries, f"worker, queued: {number.name}") as it:
        process = cluster.workers["worker-0"]
        worker_id = worker_id_of(process)
        assert worker_id is not None
        process.send(number)
        queued = [cluster.clients.create(one) for one in [*SMALL, *SMALL, *SMALL]]
        it.strike(queued)
        get_over(cluster, it, process, worker_id, number, *queued)


def get_over(
    cluster: Deployment, it: Scene, process: Process, worker_id: str, number: signal.Signals, *video_ids: str
) -> None:
    """A supervisor starts a new one; a frozen one goes on when others have long made what it had."""
    if number is FREEZE:
        cluster.clients.wait(video_ids)
        process.send(signal.SIGCONT)
        it.returned()
        it.back_with(cluster.wait_until_worker_works(worker_id, SMALL[0]))
    else:
        assert process.wait() == EXIT_CODES[number], process.tail()
        cluster.start_worker(process.name)
        cluster.clients.wait(video_ids)


@contextmanager
def caught(cluster: Deployment, phase: str) -> Iterator[tuple[str, str]]:
    """A video that is in this phase now, and the worker that has it. An upload is held there until the end of this."""
    video_id = cluster.clients.create(SENT[phase])
    ledger = cluster.ledger
    if phase == "uploading":
        history = ledger.wait_for(video_id, lambda history: started_by(history) is not None, "begun")
        # The film is stored by then, and its thumbnail is not.
        with cluster.holding_uploads(f"{video_id}/{ledger.attempts()[video_id]}.webp") as held:
            until(held.exists, f"{video_id} is being stored")
            yield video_id, str(started_by(history))
        return
    history = ledger.wait_for(video_id, in_stage(phase), phase)
    yield video_id, str(started_by(history))


def in_stage(phase: str) -> Callable[[History], bool]:
    stage = {"denoising": "denoise", "decoding": "decode"}[phase]
    return lambda history: any(entry.stage == stage for entry in history)


def check_phase(history: History, phase: str) -> None:
    """The signal came in that phase and no other."""
    stages = [entry.stage for entry in history if entry.stage is not None]
    assert not any(entry.is_terminal for entry in history)
    assert stages[-1] == ("denoise" if phase == "denoising" else "decode")
