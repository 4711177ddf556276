"""How far the start of a worker is: its present stage, for everybody who asks, and a line in the log for each stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loading:
    """A start in progress.

    ``part`` of the ``stage`` is done, from 0 to 1, or None where it is not known; ``seconds`` have passed since the
    start began.
    """

    stage: str
    part: float | None
    seconds: float

    def __str__(self) -> str:
        part = "" if self.part is None else f", {self.part:.0%} done"
        return f"{self.stage}{part}, {self.seconds:.1f} s after the start began"


class Startup:
    """Takes the reports of a start and answers how far it is. Every method may be called on any thread."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._began = clock()
        # Replaced as a whole, so that a reader on another thread sees a stage with its own part.
        self._current: tuple[str, float | None] | None = None
        # A load that nobody could interrupt reports on, after its start was given up.
        self._is_over = False
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """The time since the start began."""
        return round(self._clock() - self._began, 2)

    @property
    def loading(self) -> Loading | None:
        """The present stage; None before the first stage and after ``end``."""
        current = self._current
        return None if current is None else Loading(*current, seconds=self.seconds)

    def report(self, stage: str, part: float | None = None) -> None:
        """Report a stage and its done part; after ``end`` nothing is reported. See ``StageReport``."""
        with self._lock:
            current = self._current
            if self._is_over:
                return
            self._current = stage, part
        if current is None or current[0] != stage:
            log.info("starting", model=self._model, stage=stage, after_s=self.seconds)

    def end(self) -> None:
        """Report that no stage is left."""
        with self._lock:
            self._is_over = True
            self._current = None
