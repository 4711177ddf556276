"""Compiling ahead never stands in the way of a start."""

from __future__ import annotations

import pytest
import torch

from kinema.engines.wan.kernels_ahead import KernelsAhead, compile_side_by_side


def test_all_passes_are_run_in_their_order() -> None:
    """Also where Triton is missing, or too old to compile side by side."""
    done: list[int] = []
    compile_side_by_side([lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2]


def test_an_error_is_logged_and_nobody_waits_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """The kernels are compiled by their first use then."""

    def fail() -> None:
        raise RuntimeError("no compiler")

    KernelsAhead(torch.device("cuda"), [fail]).wait()
    assert "not all kernels were compiled ahead" in caplog.text
