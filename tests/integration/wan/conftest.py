"""What tests of the wan engine have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kinema.engines.wan.ranks import processes
from tests.forked import forked_rank


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For each process: two with a thread for each core wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that need not import torch first, for tests of what ranks do rather than of how they start."""
    monkeypatch.setattr(processes, "start_process", forked_rank)


@pytest.fixture(scope="module")
def all_ranks_forked() -> Iterator[None]:
    """The same for all engines of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start_process", forked_rank)
        yield
