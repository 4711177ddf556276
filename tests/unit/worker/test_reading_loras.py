"""LoRAs are read beside the device: others go on, and each video that needs one waits for its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kinema.engines.base import NO_INPUTS, Inputs
from kinema.engines.fake import FakeEngine
from kinema.errors import Drained, InvalidRequest, WorkerLost
from kinema.events import Cancelled, Completed, Failed
from kinema.job import Task
from kinema.request.capabilities import LoraInfo
from kinema.request.request import GenerationRequest, LoraUse
from kinema.storage import Storage
from tests.serving import until
from tests.unit.worker.tasks import PATIENCE_S, collect, film_of, make_task
from tests.unit.worker.test_worker import running

PAPER, CLAY = (LoraInfo(name=name, digest=letter * 64) for name, letter in (("paper", "a"), ("clay", "b")))


class Disk:
    """Holds the reading of each LoRA until it is told how that ends."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._gates = {lora.name: threading.Event() for lora in (PAPER, CLAY)}
        self._error: Exception | None = None

    def __call__(self, request: GenerationRequest) -> None:
        name = request.loras[0].name
        self.asked.append(name)
        assert self._gates[name].wait(PATIENCE_S), "the test never gave the LoRA"
        if self._error is not None:
            raise self._error

    def give(self, lora: LoraInfo) -> None:
        self._gates[lora.name].set()

    def fail(self, lora: LoraInfo, error: Exception) -> None:
        self._error = error
        self.give(lora)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def engine(disk: Disk) -> FakeEngine:
    return FakeEngine(loras=[PAPER, CLAY], on_read=disk)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}")


def task_with(lora: LoraInfo) -> Task:
    task = make_task(f"with {lora.name}")
    use = LoraUse(name=lora.name, digest=lora.digest, scale=1.0)
    return task.model_copy(update={"request": task.request.model_copy(update={"loras": (use,)})})


def film_in(storage: Storage, completed: object) -> bytes:
    assert isinstance(completed, Completed)
    return b"".join(storage.read(completed.artifact.key))


async def test_others_go_on_while_a_lora_is_read(engine: FakeEngine, disk: Disk, storage: Storage) -> None:
    """Whichever comes first from the disk is made first; every film is right."""
    paper, clay, plain = task_with(PAPER), task_with(CLAY), make_task("without")
    async with running(engine, storage) as worker:
        first = asyncio.create_task(collect(worker.run(paper)))
        second = asyncio.create_task(collect(worker.run(clay)))
        await until(lambda: len(disk.asked) == 2)
        made = [film_in(storage, (await collect(worker.run(plain)))[-1])]
        disk.give(CLAY)
        made.append(film_in(storage, (await second)[-1]))
        assert not first.done()
        disk.give(PAPER)
        made.append(film_in(storage, (await first)[-1]))
    assert made == [
        film_of(plain.request),
        film_of(clay.request, loras=[CLAY]),
        film_of(paper.request, loras=[PAPER]),
    ]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InvalidRequest("the LoRA paper is damaged"), InvalidRequest.code, "the LoRA paper is damaged"),
        (MemoryError(), "engine_failed", "The engine failed while it made the video (MemoryError)."),
    ],
)
async def test_a_lora_that_cannot_be_read_fails_its_videos_only(
    engine: FakeEngine, disk: Disk, storage: Storage, error: Exception, code: str, sentence: str
) -> None:
    async with running(engine, storage) as worker:
        streams = [asyncio.create_task(collect(worker.run(task_with(PAPER)))) for _ in range(2)]
        await until(lambda: len(disk.asked) == 2)
        disk.fail(PAPER, error)
        assert [await stream for stream in streams] == [[Failed(code=code, message=sentence)]] * 2
        assert isinstance((await collect(worker.run(make_task())))[-1], Completed)
        assert worker.free_slots == 3


async def test_a_cancel_does_not_wait_for_the_disk(engine: FakeEngine, disk: Disk, storage: Storage) -> None:
    """What is read then is nobody's, and the next video with the same LoRA is made."""
    task = task_with(PAPER)
    async with running(engine, storage) as worker:
        events = asyncio.create_task(collect(worker.run(task)))
        await until(lambda: disk.asked)
        await worker.cancel(task.job_id, task.attempt)
        assert await events == [Cancelled()]
        assert worker.free_slots == 3
        disk.give(PAPER)
        assert isinstance((await collect(worker.run(task_with(PAPER))))[-1], Completed)


async def test_a_worker_that_stops_does_not_wait_for_the_disk(engine: FakeEngine, disk: Disk, storage: Storage) -> None:
    async with running(engine, storage) as worker:
        events = asyncio.create_task(collect(worker.run(task_with(PAPER))))
        await until(lambda: disk.asked)
        await worker.stop()
        with pytest.raises(WorkerLost):
            await events
    disk.give(PAPER)


async def test_a_video_is_given_back_while_its_lora_is_read(engine: FakeEngine, disk: Disk, storage: Storage) -> None:
    async with running(engine, storage) as worker:
        events = asyncio.create_task(collect(worker.run(task_with(PAPER))))
        await until(lambda: disk.asked)
        worker.give_back(Drained())
        with pytest.raises(Drained):
            await events
        await until(lambda: worker.free_slots == 3)
    disk.give(PAPER)


async def test_the_engine_gets_what_it_read(storage: Storage) -> None:
    """Each generation its own, and one without LoRAs none."""
    seen: dict[str, object] = {}

    class Reading(FakeEngine):
        def read_loras(self, request: GenerationRequest) -> object:
            super().read_loras(request)
            return f"numbers of {request.loras[0].name}"

        def generate(self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None):  # type: ignore[no-untyped-def]
            seen[request.prompt] = inputs.loras
            return super().generate(request, inputs, resume)

    async with running(Reading(loras=[PAPER, CLAY]), storage) as worker:
        tasks = [task_with(PAPER), task_with(CLAY), make_task("without")]
        await asyncio.gather(*(collect(worker.run(task)) for task in tasks))
    assert seen == {"with paper": "numbers of paper", "with clay": "numbers of clay", "without": None}
