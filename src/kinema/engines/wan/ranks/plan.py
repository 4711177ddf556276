"""How the ranks share a generation. Imports no torch and starts no process, so bad settings stop the start at once.

``cfg``: guidance has two branches, with the prompt and with the negative prompt; each of two ranks computes one.
``ulysses``: each rank holds a part of the video's tokens, and for self-attention a part of the heads instead (arXiv
2309.14509); any request gets faster, at the price of an exchange in every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError

Parallel = Literal["auto", "cfg", "ulysses"]
Mode = Literal["cfg", "ulysses"]


@dataclass(frozen=True)
class ParallelPlan:
    """The setting ``parallel``, over ``num_ranks`` ranks: two or more."""

    num_ranks: int
    parallel: Parallel

    def mode_of(self, *, is_guided: bool) -> Mode | None:
        """How a generation is shared; None when rank 0 computes it alone, since it has one branch and only branches may
        be shared.
        """
        if self.parallel == "ulysses":
            return "ulysses"
        if self.num_ranks == 2 and is_guided:
            return "cfg"
        return "ulysses" if self.parallel == "auto" else None


def plan_of(num_gpus: int, parallel: Parallel, checkpoint: Checkpoint) -> ParallelPlan | None:
    """The plan, or None for a single GPU. Raises ConfigError when the model cannot be split like this."""
    if parallel == "cfg" and num_gpus != 2:
        raise ConfigError(
            f"engine.parallel = 'cfg' with engine.gpus = {num_gpus}: guidance has two branches, one for each of two "
            "GPUs; give engine.gpus = 2, or engine.parallel = 'ulysses' for more"
        )
    if parallel == "ulysses" and num_gpus == 1:
        raise ConfigError("engine.parallel = 'ulysses' with engine.gpus = 1: there is nothing to split; give 2 or more")
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
    instead = ", or engine.parallel = 'cfg'" if num_gpus == 2 else ""
    raise ConfigError(
        f"engine.gpus = {num_gpus}: the {num_heads} attention heads of {checkpoint.name} are split evenly; "
        f"give one of {fitting}{instead}"
    )
