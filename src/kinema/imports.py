"""Imports of large libraries without the garbage collector.

An import makes some hundred thousand objects that live as long as the process. The collector would walk them again and
again while more of them are made, which takes a third of the time that torch is imported in (1.5 -> 1.1 s of CPU).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Nothing is collected within this. What exists after an import is never looked at by the collector again."""
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
