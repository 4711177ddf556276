"""How the ranks share a generation. Imports no torch and starts no process, so bad settings stop the start at once.

``cfg``: guidance has two branches, with the prompt and with the negative prompt; each of two ranks computes one.
``ulysses``: each rank holds a part of the video's tokens, and for self-attention a part of the heads instead (arXiv
2309.14509); any request gets faster, at the price of an exchange in every block.

The setting ``shard`` shares the weights too: each rank holds a part of every block (``shard.py``). The work is shared
in these same modes, so the numbers are those of ``auto``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError

if TYPE_CHECKING:
    from kinema.engines.wan.placement import OffloadSetting

Parallel = Literal["auto", "cfg", "ulysses", "shard"]
Mode = Literal["cfg", "ulysses"]


@dataclass(frozen=True)
class ParallelPlan:
    """The setting ``parallel``, over ``num_ranks`` ranks: two or more."""

    num_ranks: int
    parallel: Parallel

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of every block, so that none can compute alone."""
        return self.parallel == "shard"

    @property
    def num_parts(self) -> int:
        """In how many parts the blocks are split."""
        return self.num_ranks if self.is_sharded else 1

    @property
    def numbers(self) -> str:
        """The setting that makes the same numbers with whole weights."""
        return "auto" if self.is_sharded else self.parallel

    def mode_of(self, *, is_guided: bool) -> Mode | None:
        """How a generation is shared; None when rank 0 computes it alone, since it has one branch and only branches may
        be shared.
        """
        if self.parallel == "ulysses":
            return "ulysses"
        if self.num_ranks == 2 and is_guided:
            return "cfg"
        return None if self.parallel == "cfg" else "ulysses"


def plan_of(
    num_gpus: int, parallel: Parallel, checkpoint: Checkpoint, offload: OffloadSetting = "auto"
) -> ParallelPlan | None:
    """The plan, or None for a single GPU. Raises ConfigError when the model cannot be split like this."""
    if parallel == "cfg" and num_gpus != 2:
        raise ConfigError(
            f"engine.wan.parallel = 'cfg' with engine.wan.gpus = {num_gpus}: guidance has two branches, one for each "
            "of two GPUs; give engine.wan.gpus = 2, or engine.wan.parallel = 'ulysses' for more"
        )
    if parallel in ("ulysses", "shard") and num_gpus == 1:
        raise ConfigError(
            f"engine.wan.parallel = {parallel!r} with engine.wan.gpus = 1: there is nothing to split; give 2 or more"
        )
    if parallel == "shard" and offload == "blocks":
        raise ConfigError(
            "engine.wan.parallel = 'shard' with engine.offload = 'blocks': a block is either split among the GPUs or "
            "in the host's memory; give engine.offload = 'auto', 'none' or 'text', or another engine.wan.parallel"
        )
    if num_gpus == 1:
        return None
    if parallel != "cfg":
        _check_heads(num_gpus, checkpoint)
    return ParallelPlan(num_gpus, parallel)


def _check_heads(num_gpus: int, checkpoint: Checkpoint) -> None:
    num_heads = checkpoint.transformer.num_attention_heads
    if num_heads % num_gpus == 0:
        return
    fitting = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
    instead = ", or engine.wan.parallel = 'cfg'" if num_gpus == 2 else ""
    raise ConfigError(
        f"engine.wan.gpus = {num_gpus}: the {num_heads} attention heads of {checkpoint.name} are split evenly; "
        f"give one of {fitting}{instead}"
    )
