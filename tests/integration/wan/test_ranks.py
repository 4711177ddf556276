"""One engine over two processes makes what one makes alone: the real tiny model, on the CPU, over gloo."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.bench.wan.parallel import time_modes
from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.ranks import processes
from kinema.engines.wan.ranks.leader import Leader, devices_of
from kinema.engines.wan.ranks.plan import Parallel, ParallelPlan
from kinema.engines.wan.ranks.processes import RankProcesses
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.embeddings import Modulation
from kinema.errors import ConfigError, OutOfMemory, WorkerLost
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.worker.active import Admit, Ended, EndReason
from kinema.worker.gpu import DeviceThread
from tests.forked import forked_rank
from tests.integration.wan.ranks import SOON_S, Request, load_short_of_memory, lose_a_rank, rank_of, take_turns

pytestmark = pytest.mark.usefixtures("one_thread")

# The sums of a part of the tokens may be rounded otherwise than those of all; latents are about 1.
_TOLERANCE = 1e-4


def started(parallel: Parallel, **options: Any) -> WanEngine:
    checkpoint = inspect("tiny-wan")
    engine = WanEngine(checkpoint, device="cpu", gpus=2, parallel=parallel, **options)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def single() -> WanEngine:
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    engine.load()
    return engine


@pytest.fixture(scope="module", params=["cfg", "ulysses", "shard"])
def double(request: pytest.FixtureRequest) -> Iterator[WanEngine]:
    """One starts its rank as a worker does, as a program; the others need not import torch for that."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "cfg":
            patch.setattr(processes, "start_process", forked_rank)
        engine = started(request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(single: WanEngine) -> list[Request]:
    """Guided ones of text, first frame and film, the first with an odd number of tokens, and one without guidance.
    Three have each a solver of their own.
    """

    def request(prompt: str, **values: object) -> GenerationRequest:
        options = GenerationOptions.model_validate({"prompt": prompt, "num_inference_steps": 3, **values})
        return resolve(options, single.capabilities).request

    image = np.full((64, 96, 3), (10, 200, 30), dtype=np.uint8)
    film = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    edit = request("a green star spinning", num_frames=5, seed=4, size="64x64").model_copy(update={"strength": 0.7})
    few = request("a blue square", num_frames=5, seed=2, size="64x64", guidance_scale=1.0)
    moving = request("it moves left", num_frames=5, seed=3, size="96x64")
    return [
        (request("a red circle moving right", num_frames=9, seed=1, size="80x80"), NO_INPUTS),
        (few.model_copy(update={"solver": "lcm"}), NO_INPUTS),
        (moving.model_copy(update={"solver": "euler"}), Inputs(first_frame=image)),
        (edit, Inputs(film=film)),
    ]


@pytest.fixture(scope="module")
def alone(single: WanEngine, requests: list[Request]) -> list[Tensor]:
    return [take_turns([single.sample(*request)])[0] for request in requests]


def parallel_of(engine: WanEngine) -> Parallel:
    assert engine.leader is not None
    return engine.leader.plan.parallel


def agree(engine: WanEngine, made: Tensor, expected: Tensor) -> bool:
    """Branches of guidance make the same bits."""
    if engine.facts.parallel == "cfg":
        return torch.equal(made, expected)
    return torch.allclose(made, expected, rtol=0, atol=_TOLERANCE)


def test_two_that_take_turns_make_what_one_makes(
    double: WanEngine, requests: list[Request], alone: list[Tensor]
) -> None:
    """Bit for bit over the branches of guidance, but for rounding over parts of the tokens; several at once, and
    one that is given up after its first step."""
    dropped = double.sample(*requests[0])
    next(dropped)
    together = [double.sample(*request) for request in requests]
    next(together[0])
    dropped.close()
    for made, expected in zip(take_turns(together), alone, strict=True):
        assert agree(double, made, expected)


def test_two_go_on_from_a_checkpoint(double: WanEngine, requests: list[Request]) -> None:
    """With the same bits as without a break, and a preview on the way."""
    for request in requests:
        steps = double.sample(*request)
        first = next(steps)
        assert first.checkpoint is not None
        assert first.preview is not None
        checkpoint = first.checkpoint()
        assert first.preview().shape[-1] == 3
        resumed = double.sample(*request, resume=checkpoint)
        step = next(resumed)
        assert step.index == 2
        made, expected = take_turns([resumed, steps])
        assert torch.equal(made, expected)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("parallel", ["cfg", "ulysses"])
def test_two_leave_out_the_steps_that_one_leaves_out(parallel: Parallel, requests: list[Request]) -> None:
    """Of several that take turns, one of them without guidance."""
    one = WanEngine(inspect("tiny-wan"), device="cpu", has_step_cache=True)
    one.load()
    longer = [(asked.model_copy(update={"num_inference_steps": 8}), *rest) for asked, *rest in requests[:2]]
    two = started(parallel, has_step_cache=True)
    try:
        made = take_turns([two.sample(*request) for request in longer])
        assert any(step.is_cached for step in two.sample(*longer[0]))
    finally:
        two.close()
    assert all(agree(two, *pair) for pair in zip(made, take_turns([one.sample(*r) for r in longer]), strict=True))


def test_what_two_make_says_so(single: WanEngine, double: WanEngine) -> None:
    """Their facts are other ones, and their costs are not counted as those of one."""
    assert single.facts.gpus is None
    assert double.facts.gpus == 2
    parallel = parallel_of(double)
    assert double.facts.parallel == ("auto" if parallel == "shard" else parallel)
    assert double.device == f"cpu, cpu ({parallel})"
    assert single.device == "cpu"


def test_a_step_is_timed_in_each_way(double: WanEngine, requests: list[Request]) -> None:
    """Beside that of a single process, and what it makes is compared."""
    assert double.leader is not None
    plan = double.leader.plan
    *single, cfg, ulysses = times = time_modes(double, requests[0][0], runs=1)
    # No rank with a part of each block can compute alone.
    assert [one.mode for one in single] == ([] if plan.is_sharded else ["single"])
    assert [cfg.mode, ulysses.mode] == ["cfg", "ulysses"]
    assert all(one.step_s > 0 for one in times)
    assert cfg.difference == 0
    assert ulysses.difference <= _TOLERANCE
    assert double.leader.plan == plan


@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_without_memory_costs_nobody_a_video(
    double: WanEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was at, and though rank 0 has enough: the video tries again, and the worker and all others go on."""
    engine = started(parallel_of(double), load_others=load_short_of_memory)
    made, ends, num_failed = [list[Output]() for _ in requests], queue.SimpleQueue[Ended](), 0
    collect_of = RankProcesses.collect

    def collect(its: RankProcesses) -> None:
        nonlocal num_failed
        try:
            collect_of(its)
        except OutOfMemory:
            num_failed += 1
            raise

    monkeypatch.setattr(RankProcesses, "collect", collect)
    device = DeviceThread(engine, on_loaded=lambda _: None, on_exit=lambda: None, policy="round-robin")
    for key, (request, inputs) in enumerate(requests):
        device.admit(Admit(key, request, made[key].append, ends.put, inputs))
    device.start()
    assert [ends.get(timeout=SOON_S) for _ in requests] == [Ended(EndReason.DONE)] * len(requests)
    assert num_failed >= 4
    assert not engine.is_lost
    device.stop()
    device.join()
    monkeypatch.undo()
    alone = [frames_of(list(double.generate(*request))) for request in requests]
    assert all(np.array_equal(frames_of(one), expected) for one, expected in zip(made, alone, strict=True))


def frames_of(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("parallel", ["cfg", "ulysses", "shard"])
def test_a_killed_rank_loses_the_engine_at_once(parallel: Parallel, requests: list[Request]) -> None:
    """In the middle of a step that waits for it. Other generations can still be asked for their checkpoints."""
    lose_a_rank(started(parallel), requests[0], requests[2])


@pytest.mark.usefixtures("forked_ranks")
def test_who_waits_for_loras_of_a_killed_rank_hears_of_its_end() -> None:
    engine = started("cfg")
    rank, leader = rank_of(engine), engine.leader
    assert leader is not None
    rank.send_signal(signal.SIGSTOP)  # so it does not answer
    loras = [LoraRef(Path("any.safetensors"), "0" * 64, 1.0)]
    with pytest.raises(WorkerLost), leader.reading(loras):
        rank.kill()
    with pytest.raises(WorkerLost), leader.reading(loras):
        pass
    engine.close()


def test_a_killed_worker_leaves_no_rank() -> None:
    """Whatever it was at: here it still reads its weights."""
    code = (
        "import time, torch\n"
        "from kinema.engines.wan.checkpoint import inspect\n"
        "from kinema.engines.wan.ranks.leader import Leader\n"
        "from kinema.engines.wan.ranks.plan import ParallelPlan\n"
        "from kinema.engines.wan.transformer.attention import AttentionChoice\n"
        "leader = Leader(ParallelPlan(2, 'cfg'), inspect('tiny-wan'), [torch.device('cpu')] * 2, torch.float32,\n"
        "                AttentionChoice('sdpa', 'sdpa'), has_graphs=False)\n"
        "print(leader._processes.ranks[0].process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        assert is_alive(pid)
        worker.kill()
        deadline = time.monotonic() + SOON_S
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """A process that has ended and that nobody has asked about does not count."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    """With the sentence of the process that met it."""
    shutil.copytree(inspect("tiny-wan").path, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    leader = Leader(
        ParallelPlan(2, "cfg"),
        inspect(str(tmp_path)),
        [torch.device("cpu")] * 2,
        torch.float32,
        AttentionChoice("sdpa", "sdpa"),
        has_graphs=False,
    )
    try:
        with pytest.raises(ConfigError, match=f"the model in {tmp_path} cannot be loaded"):
            leader.join([])
    finally:
        leader.close()


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the number that there is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of(torch.device("cuda", 1), 2) == [torch.device("cuda", 1), torch.device("cuda", 2)]
    with pytest.raises(ConfigError, match="there are 2 GPUs from cuda:1 on"):
        devices_of(torch.device("cuda", 1), 3)
    with pytest.raises(ConfigError, match="only cuda or cpu"):
        devices_of(torch.device("mps"), 2)


def test_a_part_beyond_the_given_frame_knows_nothing_of_it() -> None:
    """Tokens are told apart by their place alone, so where none is given there is one row, that of the step."""
    blocks, head = torch.arange(24.0).view(1, 6, 2, 2), torch.arange(8.0).view(2, 2, 2)
    whole = Modulation(blocks, head, num_clean=3)
    first, second = whole.shard(0, 5), whole.shard(5, 9)
    assert (first.num_clean, second.num_clean) == (3, 0)
    assert torch.equal(first.blocks, blocks)
    assert torch.equal(second.blocks, blocks[:, :, 1:])
    assert torch.equal(second.head, head[:, 1:])
