"""Whose step runs next on the device. Pure decisions over plain data: no torch, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generation that could take a step.

    ``last_turn`` is the number of the turn in which it was served last, counted from 1 over all generations of the
    device; 0 before its first.
    """

    key: int
    last_turn: int


class StepScheduler:
    """Round-robin: whoever waits longest since its last step goes next.

    A generation that has had no turn goes before all that had one, so a newcomer waits one round at most.
    """

    def choose(self, candidates: Sequence[Candidate]) -> int | None:
        """The key of the generation to serve, the earlier admitted one among equals; None when there is none.

        ``candidates`` stand in the order of their admission.
        """
        if not candidates:
            return None
        return min(candidates, key=lambda candidate: candidate.last_turn).key
