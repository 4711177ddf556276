"""Imports without the garbage collector leave it as it was."""

from __future__ import annotations

import gc

import pytest

from kinema.imports import without_collector


def test_the_collector_is_off_within_and_on_after_even_when_the_import_fails() -> None:
    """What exists at the end is out of its sight."""
    frozen_before = gc.get_freeze_count()
    was_on: list[bool] = []

    def fail() -> None:
        with without_collector():
            was_on.append(gc.isenabled())
            __import__("no_such_module")

    with pytest.raises(ModuleNotFoundError):
        fail()
    assert was_on == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen_before
    gc.unfreeze()


def test_a_collector_that_was_off_stays_off() -> None:
    """A program that collects by itself keeps its way."""
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
