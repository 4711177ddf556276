"""How many threads the engine computes with on a CPU, and how they wait for one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kinema.engines.wan.loading import leave_cores

CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
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


@pytest.mark.parametrize("name", CHOICES)
def test_what_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And what a GPU's host does is another matter."""
    assert threads_of(monkeypatch, 16, 16, device="cuda") == 16
    monkeypatch.setenv(name, "16")
    assert threads_of(monkeypatch, 16, 16) == 16


def test_fewer_are_not_made_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two threads a core torch begins with half as many; one that leaves enough stays."""
    assert threads_of(monkeypatch, 16, 8) == 8
    assert threads_of(monkeypatch, 16, 14) == 12


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_do_not_wait_for_long_in_a_loop(chosen: dict[str, str], expected: str) -> None:
    """Torch's OpenMP is told before torch is there to load it, unless somebody chose how they wait."""
    code = "import os, sys, kinema.engines.registry; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [expected, "False"]
