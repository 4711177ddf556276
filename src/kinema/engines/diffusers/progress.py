"""A pipeline of one video, whose progress bar says when a step is done.

A pipeline keeps what it is doing in itself and in its scheduler, so each video has a copy of both over the same
weights. All pipelines of diffusers draw a bar for each of their loops; here it ends a turn instead.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from torch import nn

# Called with the length of the loop, after each of its steps.
Pause = Callable[[int], None]


class StepBar:
    """Takes the place of tqdm in a pipeline's loop of ``total`` steps, or of those of ``iterable``."""

    def __init__(self, pause: Pause, iterable: Iterable[Any] | None = None, total: int | None = None) -> None:
        self._pause = pause
        self._items = iterable if iterable is None else list(iterable)
        self._total = total if total is not None else len(self._items or ())

    def __enter__(self) -> StepBar:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self._pause(self._total)

    def update(self, _steps: int = 1) -> None:
        self._pause(self._total)

    def close(self) -> None:
        pass

    def set_postfix(self, *_args: object, **_words: object) -> None:
        pass


def pipeline_of_one_video(pipeline: Any, pause: Pause, guidance_scale: float) -> Any:  # noqa: ANN401 - of diffusers
    """A copy of the pipeline with the same weights, and with state of its own.

    A guider, where the pipeline has one, gets the guidance of the video.
    """
    own = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if hasattr(component, "guidance_scale") and hasattr(component, "new"):
            setattr(own, name, component.new(guidance_scale=guidance_scale))
        elif hasattr(component, "step") and not isinstance(component, nn.Module):
            setattr(own, name, copy.deepcopy(component))
    own.progress_bar = lambda iterable=None, total=None: StepBar(pause, iterable, total)
    return own


def converted(pipeline: Any, other: type) -> Any:  # noqa: ANN401 - of diffusers
    """The pipeline of another class over the same components, with the same config where it has it."""
    if type(pipeline) is other:
        return pipeline
    has = {**dict(pipeline.config), **pipeline.components}
    wanted = inspect.signature(other).parameters.values()
    given = {one.name: has.get(one.name) for one in wanted if one.name in has or one.default is one.empty}
    return other(**given)
