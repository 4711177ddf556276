"""Imports without the garbage collector leave it as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from kinema.imports import without_collector


def test_the_collector_is_off_within_and_on_after_even_when_an_import_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists after an import is out of its sight."""
    (tmp_path / "module_of_this_test.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    frozen_before = gc.get_freeze_count()
    was_on: list[bool] = []

    def fail() -> None:
        with without_collector():
            was_on.append(gc.isenabled())
            __import__("module_of_this_test")
            __import__("no_such_module")

    with pytest.raises(ModuleNotFoundError):
        fail()
    assert was_on == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen_before


def test_a_collector_that_was_off_stays_off_and_nothing_is_frozen_where_nothing_is_imported() -> None:
    """A program that collects by itself goes on so."""
    frozen_before = gc.get_freeze_count()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() <= frozen_before  # what others had frozen may be freed at any time
    finally:
        gc.enable()
