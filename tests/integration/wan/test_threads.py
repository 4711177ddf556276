"""How many threads the engine computes with on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kinema.engines.wan.weights import leave_cores


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def threads_of(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, device: str = "cpu") -> int:
    """Those that are left where there were so many."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    torch.set_num_threads(threads)
    leave_cores(torch.device(device))
    return torch.get_num_threads()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 6), (16, 12)])
def test_one_core_in_four_is_left(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    """Where there are enough, and once: a second engine in the process takes no more of them away."""
    assert threads_of(monkeypatch, cores, cores) == threads
    leave_cores(torch.device("cpu"))
    assert torch.get_num_threads() == threads


def test_what_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process or before it; and what a GPU's host does is another matter."""
    assert threads_of(monkeypatch, 16, 5) == 5
    assert threads_of(monkeypatch, 16, 16, device="cuda") == 16
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert threads_of(monkeypatch, 16, 16) == 16
