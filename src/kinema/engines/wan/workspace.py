"""What the turns of a generation take of a device beside what stays there, measured by its allocator.

A step frees all that it took but latents and the residents that it left, so its workspace is the peak above what is
there after it. A film has buffers of its own until it is decoded, so what it takes is the peak above what was there
before its first turn. Steps that are replayed take nothing new: their memory was measured when they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from kinema.engines.wan.device_memory import DeviceMemory

_Output = TypeVar("_Output")
_Result = TypeVar("_Result")


def watch_steps(
    memory: DeviceMemory, steps: Generator[_Output, None, _Result], note: Callable[[int], None], *, skips_first: bool
) -> Generator[_Output, None, _Result]:
    """Pass the steps on, and ``note`` the bytes of each. With ``skips_first`` the first turn does other work too."""
    try:
        while True:
            memory.begin_peak()
            try:
                output = next(steps)
            except StopIteration as end:
                result: _Result = end.value
                return result
            if not skips_first:
                note(memory.peak_bytes() - memory.allocated_bytes())
            skips_first = False
            yield output
    finally:
        steps.close()


def watch_decode(
    memory: DeviceMemory, chunks: Generator[_Output, None, None], note: Callable[[int], None]
) -> Iterator[_Output]:
    """Pass the chunks of a film on, and ``note`` the bytes of its memory so far after each of them."""
    held = 0
    try:
        while True:
            memory.begin_peak()
            before = memory.allocated_bytes()
            try:
                output = next(chunks)
            except StopIteration:
                return
            note(held + memory.peak_bytes() - before)
            held += memory.allocated_bytes() - before
            yield output
    finally:
        chunks.close()
