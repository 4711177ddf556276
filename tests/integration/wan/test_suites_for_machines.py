"""The suites that need a GPU or the SGLang library can be imported where neither is, so that no change breaks them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
MODULES = [f"tests.{suite}.{file.stem}" for suite in ("gpu", "sglang") for file in sorted((TESTS / suite).glob("*.py"))]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_imported(name: str) -> None:
    """Its imports exist, and so do the values of its parameters."""
    assert importlib.import_module(name).__doc__ or name.endswith("__init__")
