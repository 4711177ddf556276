"""Steps without the transformer: their velocity is read off the last two that were computed.

A prediction changes little and evenly from one noise level to the next, so in the middle of a video every second one is
enough. Near both ends it changes more, and a transformer that takes over knows nothing of what the other computed:
there each step is computed. What is read off is not what would have been computed, so the video is another one. The
idea is that of TeaCache (arXiv 2411.19108) and TaylorSeer (2503.06923), for the guided velocity instead of what is
inside of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Parts of a video's steps, and a number of them at least. On the bundled model, whose error they have from
# docs/performance.md, more first ones gain less than they cost, and more last ones gain nothing.
_FIRST, _LEAST_FIRST = 0.2, 4
_LAST, _LEAST_LAST = 0.1, 2
# A velocity alone is too old, and a line through two of them goes too far.
_SLOPE = 0.5


@dataclass(frozen=True)
class Computed:
    """The guided velocity (1, c, f, h, w) of the step ``index``, which counts from 0."""

    index: int
    velocity: Tensor


class StepCache:
    """Of one generation with noise levels ``sigmas``; ``skipped`` are the steps that are read off ``computed``, the
    last ones that were computed, the newest last: two at most."""

    def __init__(self, sigmas: Sequence[float], skipped: frozenset[int]) -> None:
        self.skipped = skipped
        self.computed: list[Computed] = []
        self._sigmas = sigmas

    def add(self, index: int, velocity: Tensor) -> None:
        """Take what was computed, where a later step needs it."""
        if self.skipped:
            self.computed = [*self.computed, Computed(index, velocity)][-2:]

    def velocity(self, index: int) -> Tensor:
        """Of a step that is skipped, (1, c, f, h, w) float32."""
        before, newest = self.computed
        distance = self._sigmas[index] - self._sigmas[newest.index]
        weight = _SLOPE * distance / (self._sigmas[newest.index] - self._sigmas[before.index])
        latest = newest.velocity.float()
        return latest + weight * (latest - before.velocity.float())


def choose_skipped(num_steps: int, takes_over: int | None = None) -> frozenset[int]:
    """The steps, counted from 0, that need not be computed; ``takes_over`` is the first one of another transformer."""
    first = max(math.ceil(_FIRST * num_steps), _LEAST_FIRST)
    end = num_steps - max(math.ceil(_LAST * num_steps), _LEAST_LAST)
    skipped: set[int] = set()
    for index in range(first, end):
        has_two = takes_over is None or not takes_over <= index < takes_over + 2
        if has_two and index - 1 not in skipped:
            skipped.add(index)
    return frozenset(skipped)
