"""How GPUs share a video, and what cannot be shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.ranks.plan import Mode, Parallel, ParallelPlan, plan_of
from kinema.errors import ConfigError

# Of eight heads.
TINY = inspect("tiny-wan")


@pytest.mark.parametrize(
    ("num_gpus", "parallel", "guided", "unguided"),
    [
        (2, "auto", "cfg", "ulysses"),
        (2, "cfg", "cfg", None),
        (2, "ulysses", "ulysses", "ulysses"),
        (4, "auto", "ulysses", "ulysses"),
        (2, "shard", "cfg", "ulysses"),
        (4, "shard", "ulysses", "ulysses"),
    ],
)
def test_the_mode_follows_from_the_guidance(
    num_gpus: int, parallel: Parallel, guided: Mode | None, unguided: Mode | None
) -> None:
    """Two branches for two GPUs; whatever cannot be shared like that is shared by tokens, or not at all."""
    plan = ParallelPlan(num_gpus, parallel)
    assert plan.mode_of(is_guided=True) == guided
    assert plan.mode_of(is_guided=False) == unguided


def test_one_gpu_has_no_plan() -> None:
    """And nothing to share."""
    assert plan_of(1, "auto", TINY) is None
    assert plan_of(2, "auto", TINY) == ParallelPlan(2, "auto")
    assert plan_of(8, "ulysses", TINY) == ParallelPlan(8, "ulysses")


@pytest.mark.parametrize(
    ("num_gpus", "parallel", "sentence"),
    [
        (1, "cfg", "engine.wan.parallel = 'cfg' with engine.wan.gpus = 1: guidance has two branches"),
        (4, "cfg", "engine.wan.parallel = 'cfg' with engine.wan.gpus = 4: guidance has two branches"),
        (
            1,
            "ulysses",
            "engine.wan.parallel = 'ulysses' with engine.wan.gpus = 1: there is nothing to split; give 2 or more",
        ),
        (
            1,
            "shard",
            "engine.wan.parallel = 'shard' with engine.wan.gpus = 1: there is nothing to split; give 2 or more",
        ),
        (3, "shard", "the 8 attention heads of tiny-wan are split evenly; give one of 1, 2, 4, 8"),
        (3, "ulysses", "the 8 attention heads of tiny-wan are split evenly; give one of 1, 2, 4, 8"),
        (3, "auto", "the 8 attention heads of tiny-wan are split evenly"),
    ],
)
def test_what_cannot_be_shared_is_refused(num_gpus: int, parallel: Parallel, sentence: str) -> None:
    """With what could be."""
    with pytest.raises(ConfigError, match=sentence):
        plan_of(num_gpus, parallel, TINY)


def test_an_odd_number_of_heads_still_has_two_branches() -> None:
    """The sentence says so."""
    odd = replace(TINY, transformer=TINY.transformer.model_copy(update={"num_attention_heads": 5}))
    with pytest.raises(ConfigError, match=r"give one of 1, 5, or engine\.wan\.parallel = 'cfg'"):
        plan_of(2, "auto", odd)
    assert plan_of(2, "cfg", odd) == ParallelPlan(2, "cfg")


def test_a_split_block_is_not_in_the_host_too() -> None:
    """Whatever else is offloaded."""
    with pytest.raises(ConfigError, match=r"engine\.wan\.parallel = 'shard' with engine\.offload = 'blocks'"):
        plan_of(2, "shard", TINY, "blocks")
    assert plan_of(2, "shard", TINY, "text") == ParallelPlan(2, "shard")


def test_parts_change_no_number() -> None:
    """A video with whole weights has the same facts."""
    assert (ParallelPlan(2, "shard").numbers, ParallelPlan(2, "shard").num_parts) == ("auto", 2)
    assert (ParallelPlan(2, "cfg").numbers, ParallelPlan(2, "cfg").num_parts) == ("cfg", 1)
