"""What the turns of a generation take of a device beside what stays there, measured by its allocator.

A step frees all that it took but latents and the residents that it left, so its workspace is the peak above what is
there after it. A film has buffers of its own until it is decoded, so what it takes is the peak above what was there
before its first turn. Steps that are replayed take nothing new: their memory was measured when they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from kinema.engines.wan.device_memory import DeviceMemory
from kinema.engines.wan.needs import MeasuredNeed
from kinema.engines.wan.residents import Residents
from kinema.request.geometry import Geometry
from kinema.request.memory import GuidanceMemory, Memory
from kinema.request.request import GenerationRequest

_Output = TypeVar("_Output")
_Result = TypeVar("_Result")


class Workspaces:
    """Learns what the videos of one device take of its ``memory`` beside its ``residents``, and says both.

    ``passing`` are the bytes of residents that every step needs now, and that leave between two steps if they must.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        residents: Residents,
        guidance: GuidanceMemory,
        geometry: Geometry,
        passing: Callable[[], int],
    ) -> None:
        self._memory = memory
        self._residents = residents
        self._guidance = guidance
        self._geometry = geometry
        self._passing = passing
        self._most_passing = 0
        self._step, self._decode = MeasuredNeed(), MeasuredNeed()
        self.note()

    @property
    def known(self) -> Memory:
        """What lies on the device, and what a video takes, as it was last noted. May be asked on any thread."""
        return self._known

    def note(self) -> None:
        """Look what lies on the device now."""
        limit_bytes, fixed_bytes = self._memory.limit_bytes, self._residents.fixed_bytes()
        self._known = Memory(
            limit_bytes=limit_bytes,
            residents=self._residents.sizes(),
            room_bytes=limit_bytes - fixed_bytes - self._most_passing,
            step=self._step.line(),
            decode=self._decode.line(),
            guidance=self._guidance,
            geometry=self._geometry,
        )

    def watch_steps(
        self, request: GenerationRequest, steps: Generator[_Output, None, _Result], *, skips_first: bool
    ) -> Generator[_Output, None, _Result]:
        """Pass the steps of a video on, and learn from them. With ``skips_first`` the first turn does other work
        too."""

        def learn(num_bytes: int) -> None:
            self._most_passing = max(self._most_passing, self._passing())
            if self._step.observe(self._known.step_units(request), num_bytes):
                self.note()

        return _watch_steps(self._memory, steps, learn, skips_first=skips_first)

    def watch_decode(self, request: GenerationRequest, chunks: Generator[_Output, None, None]) -> Iterator[_Output]:
        """Make room for a film, as far as it is known what it takes; pass its chunks on, and learn from them."""
        pixels = request.size.pixels
        if (need := self._decode.line()) is not None:
            self._residents.make_room(int(need.bytes_for(pixels)))

        def learn(num_bytes: int) -> None:
            if self._decode.observe(pixels, num_bytes):
                self.note()

        return _watch_decode(self._memory, chunks, learn)


def _watch_steps(
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


def _watch_decode(
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
