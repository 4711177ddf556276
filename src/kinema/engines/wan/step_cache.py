"""Steps without the transformer: their velocity is extrapolated from the last two that were computed.

A velocity changes little and evenly from one noise level to the next, so in the middle of a video every second one is
computed. Near both ends it changes more, and so it does where the second expert begins: there each step is computed. An
extrapolated velocity is not the computed one, so the video is another one. TeaCache (arXiv 2411.19108) and TaylorSeer
(2503.06923) have the same idea for values inside of the transformer; here it is used for the guided velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# The parts of a video's steps that are computed at its start and at its end, and the least numbers of them. On the
# bundled model (docs/performance.md has the errors) more first steps gain less than they cost, and more last ones gain
# nothing.
_FIRST, _LEAST_FIRST = 0.2, 4
_LAST, _LEAST_LAST = 0.1, 2
# How much of the slope is used: the last velocity alone is too old, and a line through two of them goes too far.
_SLOPE = 0.5


@dataclass(frozen=True)
class Computed:
    """The guided velocity (1, c, f, h, w) of the step ``index``, which counts from 0."""

    index: int
    velocity: Tensor


class StepCache:
    """The step cache of one generation with noise levels ``sigmas``.

    ``skipped`` are the steps, counted from 0, that are extrapolated from ``computed``: the last two velocities that
    were computed, the newest last.
    """

    def __init__(self, sigmas: Sequence[float], skipped: frozenset[int]) -> None:
        self.skipped = skipped
        self.computed: list[Computed] = []
        self._sigmas = sigmas

    def add(self, index: int, velocity: Tensor) -> None:
        """Keep a velocity that was computed, if steps are skipped at all."""
        if self.skipped:
            self.computed = [*self.computed, Computed(index, velocity)][-2:]

    def computed_before(self, index: int) -> list[int]:
        """The steps whose velocities it keeps when the step ``index`` begins."""
        return [done for done in range(index) if done not in self.skipped][-2:] if self.skipped else []

    def velocity(self, index: int) -> Tensor:
        """The velocity (1, c, f, h, w) float32 of a step that is skipped."""
        before, newest = self.computed
        distance = self._sigmas[index] - self._sigmas[newest.index]
        weight = _SLOPE * distance / (self._sigmas[newest.index] - self._sigmas[before.index])
        latest = newest.velocity.float()
        return latest + weight * (latest - before.velocity.float())


def choose_skipped(num_steps: int, switch: int | None = None) -> frozenset[int]:
    """The steps, counted from 0, that need not be computed; ``switch`` is the first step of the second expert."""
    first = max(math.ceil(_FIRST * num_steps), _LEAST_FIRST)
    end = num_steps - max(math.ceil(_LAST * num_steps), _LEAST_LAST)
    skipped: set[int] = set()
    for index in range(first, end):
        has_two = switch is None or not switch <= index < switch + 2
        if has_two and index - 1 not in skipped:
            skipped.add(index)
    return frozenset(skipped)
