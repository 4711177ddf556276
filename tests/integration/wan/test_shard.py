"""Blocks that are split among two processes make what whole ones make, bit for bit: on the CPU, over gloo.

What a rank does that is killed, or has no memory, is in ``test_ranks.py``, with the other ways of sharing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import bytes_of
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.ranks.group import Group
from kinema.engines.wan.ranks.plan import Parallel
from kinema.engines.wan.ranks.shard import Shard, shard_of
from kinema.engines.wan.streaming import BlockStream, StreamedBlocks
from kinema.engines.wan.transformer.layers import Linear
from kinema.errors import WorkerLost
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_two_experts
from tests.integration.wan.ranks import take_turns

pytestmark = pytest.mark.usefixtures("one_thread", "all_ranks_forked")

CPU = torch.device("cpu")


def blocks(count: int) -> Iterator[Linear]:
    """Blocks of 512 bytes, which three ranks share evenly only when they are filled up."""
    return (Linear(torch.full((3, 5), float(index)), torch.full((3,), index / 2)) for index in range(count))


class Ranks:
    """Ranks in one process. Rank 0 passes over its blocks, and takes the others' parts where they lie."""

    def __init__(self, num_ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shards = [Shard(rank, num_ranks, CPU) for rank in range(num_ranks)]
        self.parts: list[list[Tensor]] = []
        for shard in self.shards:
            gathered: list[Tensor] = []
            monkeypatch.setattr(shard, "gather", lambda part, _whole, into=gathered: into.append(part))
            assert len(list(StreamedBlocks(blocks(count), count, shard.new_stream()))) == count
            self.parts.append(gathered)
        self.num_gathered = 0
        monkeypatch.setattr(self.shards[0], "gather", self._gather)
        self.stream = self.shards[0].new_stream()
        self.blocks = StreamedBlocks(blocks(count), count, self.stream)

    def _gather(self, part: Tensor, whole: Tensor) -> None:
        index = self.num_gathered % len(self.parts[0])
        assert torch.equal(part, self.parts[0][index])
        torch.cat([parts[index] for parts in self.parts], out=whole)
        self.num_gathered += 1


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_pass_gathers_every_block_once(num_ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, and nothing for a pass that has not begun, though the memory is kept for it."""
    ranks = Ranks(num_ranks, count, monkeypatch)
    for number in range(1, 4):
        seen = [(block.weight.mean().item(), block.bias.sum().item()) for block in ranks.blocks]
        assert seen == [(index, 1.5 * index) for index in range(count)]
        assert ranks.num_gathered == number * count
    assert ranks.stream.num_bytes > 0
    ranks.stream.drop()
    assert ranks.stream.num_bytes == 0
    ranks.blocks.reserve()
    assert ranks.stream.num_bytes > 0
    assert ranks.num_gathered == 3 * count


def test_each_rank_has_its_part_alone() -> None:
    """It keeps no whole block."""
    whole = bytes_of(next(blocks(1)))
    split = StreamedBlocks(blocks(6), 6, Shard(1, 2, CPU).new_stream())
    assert 6 * whole / 2 <= split.device_bytes < 6 * (whole + 512) / 2
    assert StreamedBlocks(blocks(6), 6, BlockStream(CPU, is_kept=True)).device_bytes == 0


def test_a_split_model_is_read_to_the_host() -> None:
    """A device need not have room for all of it at once."""
    device = torch.device("cuda")
    assert Placement(device, num_parts=2).of_transformers == CPU
    assert Placement(device).of_transformers == device
    assert shard_of(Placement(device), rank=1) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two experts."""
    return str(save_two_experts(tmp_path_factory.mktemp("model") / "experts"))


def loaded(model: str, gpus: int, parallel: Parallel) -> Iterator[WanEngine]:
    engine = WanEngine(inspect(model), device="cpu", gpus=gpus, parallel=parallel)
    engine.load()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def single(model: str) -> Iterator[WanEngine]:
    yield from loaded(model, 1, "auto")


@pytest.fixture(scope="module")
def whole(model: str) -> Iterator[WanEngine]:
    yield from loaded(model, 2, "auto")


@pytest.fixture(scope="module")
def split(model: str) -> Iterator[WanEngine]:
    yield from loaded(model, 2, "shard")


def raise_out_of_memory(*_arguments: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


def request_of(engine: WanEngine, prompt: str, **values: object) -> GenerationRequest:
    wanted = {"prompt": prompt, "size": "64x64", "num_frames": 5, "num_inference_steps": 4}
    return resolve(GenerationOptions.model_validate(wanted | values), engine.capabilities).request


def test_two_with_a_half_each_make_what_two_with_all_make(
    single: WanEngine, whole: WanEngine, split: WanEngine
) -> None:
    """Guided videos, which are those of one device, and unguided ones; they take turns, and one is given up."""
    requests = [
        request_of(single, "a red circle", seed=1),
        request_of(single, "sky", seed=2, guidance_scale=1.0),
        request_of(single, "a black circle", seed=3),
    ]
    dropped = split.sample(requests[2])
    next(dropped)
    runs = [split.sample(request) for request in requests]
    next(runs[0])
    dropped.close()
    made = take_turns(runs)
    expected = take_turns([whole.sample(request) for request in requests])
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert torch.equal(made[0], take_turns([single.sample(requests[0])])[0])


def test_one_goes_on_with_whole_weights_where_another_stopped(whole: WanEngine, split: WanEngine) -> None:
    """Their facts are equal, as their numbers are."""
    assert split.facts == whole.facts
    assert split.device == "cpu, cpu (shard)"
    request = request_of(split, "a red circle", seed=4)
    steps = split.sample(request)
    first = next(steps)
    assert first.checkpoint is not None
    resumed = whole.sample(request, resume=first.checkpoint())
    made, expected = take_turns([resumed, steps])
    assert torch.equal(made, expected)


def test_memory_that_left_comes_back(split: WanEngine) -> None:
    """On both ranks, between two steps."""
    request = request_of(split, "a red circle", seed=5)
    expected = take_turns([split.sample(request)])[0]
    steps = split.sample(request)
    next(steps)
    split.make_room()
    assert torch.equal(take_turns([steps])[0], expected)


def test_no_memory_for_blocks_that_pass_costs_a_step_alone(split: WanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken before any rank begins."""
    request = request_of(split, "a red circle", seed=7)
    monkeypatch.setattr(split._stream, "reserve", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        next(split.sample(request))
    monkeypatch.undo()
    assert not split.is_lost
    next(split.sample(request))


def test_half_of_the_blocks_lie_on_rank_0(single: WanEngine, split: WanEngine) -> None:
    """Without the readers of prompts, which lie in the host's memory."""
    for own, other in zip(split._own, single._own, strict=True):
        rest = other.weight_bytes - bytes_of(other.network.blocks, other.network.readers)
        half = bytes_of(other.network.blocks) / 2
        assert half <= own.weight_bytes - rest < 1.1 * half


def test_a_rank_that_fails_in_the_middle_of_a_pass_costs_all(split: WanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since the others wait for its part; the error is that of the rank. To be the last one with this engine."""
    gather, num_left = Group.gather, 3

    def fail(group: Group, part: Tensor, whole: Tensor) -> Tensor:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise_out_of_memory()
        return gather(group, part, whole)

    monkeypatch.setattr(Group, "gather", fail)
    request = request_of(split, "a red circle", seed=6)
    with pytest.raises(torch.OutOfMemoryError):
        next(split.sample(request))
    assert split.is_lost
    with pytest.raises(WorkerLost):
        next(split.sample(request))
