"""An engine that is made on the thread that loads it, because making it imports libraries for seconds.

What it can make is known from the start, so a server answers for its model, and takes jobs, while torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from kinema.engines.base import NO_INPUTS, Engine, Inputs, Output, StageReport, report_nothing
from kinema.manifest import EngineFacts
from kinema.request.capabilities import Capabilities
from kinema.request.memory import Memory
from kinema.request.request import GenerationRequest


class DeferredEngine:
    """Stands for the engine that ``make`` gives. ``load`` calls it, and then loads that engine.

    ``capabilities`` gives those of that engine, under the name that the settings give it; ``device`` is what they call
    its device, until it is made.
    """

    def __init__(self, capabilities: Callable[[], Capabilities], device: str, make: Callable[[], Engine]) -> None:
        self._capabilities = capabilities
        self._device = device
        self._make = make
        self._made: Engine | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities()

    @property
    def device(self) -> str:
        return self._device if self._made is None else self._made.device

    @property
    def facts(self) -> EngineFacts:
        return self.made.facts

    @property
    def is_lost(self) -> bool:
        return self._made is not None and self._made.is_lost

    @property
    def memory(self) -> Memory | None:
        return None if self._made is None else self._made.memory

    @property
    def loras_in_memory(self) -> Sequence[str]:
        return () if self._made is None else self._made.loras_in_memory

    @property
    def made(self) -> Engine:
        """The engine itself; ``load`` comes first."""
        assert self._made is not None, "load() was not called"
        return self._made

    def load(self, report: StageReport = report_nothing) -> None:
        """Import and make the engine, and load it. Raises ConfigError when its devices or its model cannot be used."""
        if self._made is None:
            report("importing the engine", None)
            self._made = self._make()
        self._made.load(report)

    def read_loras(self, request: GenerationRequest) -> object:
        """See ``engines/base.py``."""
        return self.made.read_loras(request)

    def generate(
        self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None
    ) -> Generator[Output, None, None]:
        """See ``engines/base.py``."""
        return self.made.generate(request, inputs, resume)

    def make_room(self) -> None:
        self.made.make_room()

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
