"""What is timed of a video."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from kinema.bench.wan.stages import time_step
from kinema.engines.base import Output, Step
from kinema.engines.fake import FakeEngine
from kinema.request.request import GenerationRequest
from tests.unit.worker.tasks import make_request

TEXT_S, STEP_S = 5.0, 2.0


class Caching(FakeEngine):
    """An engine whose seconds pass at once, and which does not compute two of ten steps."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def generate(self, request: GenerationRequest, *args: object) -> Generator[Output, None, None]:
        self.seconds += TEXT_S
        for index in range(1, request.num_denoising_steps + 1):
            is_cached = index in (5, 7)
            self.seconds += 0.0 if is_cached else STEP_S
            yield Step(index, request.num_denoising_steps, is_cached=is_cached)


def test_a_step_is_the_mean_of_those_that_are_computed_and_those_that_are_not() -> None:
    """Together they are the whole denoising; the text is no part of it."""
    engine = Caching()
    step_s = time_step(engine, make_request(num_inference_steps=10), engine)
    assert 10 * step_s == pytest.approx(engine.seconds - TEXT_S) == pytest.approx(8 * STEP_S)
