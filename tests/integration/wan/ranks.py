"""What tests of an engine over several processes share, on any device."""

from __future__ import annotations

import itertools
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.engines.base import Inputs, Step
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.loading import load_transformers
from kinema.engines.wan.ranks.ulysses import ShardedTransformer
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.engines.wan.transformer.network import TransformerWeights
from kinema.errors import WorkerLost
from kinema.request.request import GenerationRequest

Request = tuple[GenerationRequest, Inputs]
# Far more than anything takes here, and far less than a wait for nothing.
SOON_S = 60.0
# Of a rank that runs out of memory: whoever met it tries again, alone, and has done a step by then.
_CALLS_BETWEEN_FAILURES = 2


def load_short_of_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[TransformerWeights]:
    """The ``LoadTransformers`` of a rank that now and then has no memory: to begin a request, or for a step of it."""

    since_failure = itertools.count()

    def fail_at_times(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def fail(*arguments: object, **options: object) -> object:
            nonlocal since_failure
            if next(since_failure) == _CALLS_BETWEEN_FAILURES:
                since_failure = itertools.count()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
            return plain(*arguments, **options)

        setattr(owner, name, fail)

    fail_at_times(WanTransformer, "prepare")
    fail_at_times(WanTransformer, "velocities")
    fail_at_times(ShardedTransformer, "reserve")
    return load_transformers(checkpoint, device, dtype)


def take_turns(generators: list[Generator[Step, None, Tensor]]) -> list[Tensor]:
    """The latents of each."""
    latents: dict[int, Tensor] = {}
    while len(latents) < len(generators):
        for index, generator in enumerate(generators):
            if index not in latents:
                try:
                    next(generator)
                except StopIteration as end:
                    latents[index] = end.value
    return [latents[index] for index in range(len(generators))]


def assert_same_in_turns_and_resumed(engine: WanEngine, requests: Sequence[GenerationRequest]) -> None:
    """Each video is what it is alone, bit for bit: when they take turns, and when the first one goes on from a step."""
    alone = [take_turns([engine.sample(request)])[0] for request in requests]
    together = take_turns([engine.sample(request) for request in requests])
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    step = next(engine.sample(requests[0]))
    assert step.checkpoint is not None
    [resumed] = take_turns([engine.sample(requests[0], resume=step.checkpoint())])
    assert torch.equal(resumed, alone[0])


def rank_of(engine: WanEngine) -> subprocess.Popen[bytes]:
    """The process of rank 1."""
    leader: Any = engine._leader
    process: subprocess.Popen[bytes] = leader._processes.ranks[0].process
    return process


def lose_a_rank(engine: WanEngine, first: Request, second: Request) -> None:
    """Kill rank 1 in the middle of a step of one generation, while another one stands at a step; closes the engine."""
    rank = rank_of(engine)
    stepping, standing = engine.sample(*first), engine.sample(*second)
    next(stepping)
    step = next(standing)
    # It does nothing more, so the step needs its end to end.
    rank.send_signal(signal.SIGSTOP)
    threading.Timer(0.5, rank.kill).start()
    began = time.monotonic()
    with pytest.raises(WorkerLost):
        next(stepping)
    assert engine.is_lost
    assert step.checkpoint is not None
    assert step.checkpoint()
    with pytest.raises(WorkerLost):
        next(standing)
    engine.close()
    assert time.monotonic() - began < SOON_S
    assert rank.returncode == -signal.SIGKILL
