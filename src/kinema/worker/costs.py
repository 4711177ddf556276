"""Predicts how many seconds of the device a generation takes: its beginning, each step, and each decoded chunk.

It learns only from the turns of the device. The prediction for a known shape is what the shape took lately; for another
shape it is read from a curve through the known ones. Plain arithmetic: no clock, no I/O, no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import numpy as np

from kinema.request.request import GenerationRequest

# A median of nine ignores up to four outliers, and follows a changed device after five turns. Of two turns it is the
# shorter one: the first of a shape may have compiled, recorded or read something, which is no cost of the shape.
_REMEMBERED_TURNS = 9
# More shapes than a service makes in a day. The time of the fit grows with their number.
_REMEMBERED_SHAPES = 64
# Weight of the expected curve against a measured point. It is small, so it decides only where nothing was measured.
_EXPECTATION = 0.03
# Seconds for one unit before anything was measured: small against real times, with the right proportions.
_UNMEASURED_S = 1e-3

Kind = Literal["begin", "step", "chunk"]
Point = tuple[float, ...]
# The seconds of each kind of turn are linear in some terms; these are the expected coefficients before any measurement.
# A step: a constant, tokens, and tokens squared for attention; see ``GenerationRequest.work``. A chunk: megapixels.
_EXPECTED: dict[Kind, Point] = {"begin": (1.0, 0.05), "step": (0.0, 1.0, 1 / 20), "chunk": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Done:
    """How far a generation is: steps taken, chunks decoded. Until it has begun, its next turn also encodes the text."""

    is_begun: bool = False
    steps: int = 0
    chunks: int = 0


NOT_BEGUN = Done()


class Curve:
    """Seconds as a linear function of some terms, corrected at every measured point."""

    def __init__(self, expected: Point) -> None:
        self._expected = np.array(expected)
        # The latest seconds at each point, and their median.
        self._seen: dict[Point, deque[float]] = {}
        self._medians: dict[Point, float] = {}
        self._fitted: np.ndarray[Any, np.dtype[np.float64]] | None = None

    def observe(self, point: Point, seconds: float) -> None:
        if not (seconds >= 0 and np.isfinite(seconds)):
            return
        seen = self._seen.pop(point, None) or deque(maxlen=_REMEMBERED_TURNS)
        seen.append(seconds)
        self._seen[point] = seen  # moves the point to the end of the dict
        self._medians[point] = median_low(seen)
        if len(self._seen) > _REMEMBERED_SHAPES:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self._medians[oldest]
        self._fitted = None

    def has(self, point: Point) -> bool:
        """Whether this point was measured."""
        return point in self._medians

    def seconds(self, point: Point) -> float:
        """The predicted seconds; never negative."""
        if point in self._medians:
            return self._medians[point]
        if not self._medians:
            return _UNMEASURED_S * float(self._expected @ point)
        if self._fitted is None:
            self._fitted = self._fit()
        return float(self._fitted @ point)

    def medians(self) -> list[tuple[Point, float]]:
        """All measured points with the seconds that are predicted for them."""
        return list(self._medians.items())

    def points(self) -> list[tuple[Point, list[float]]]:
        """All measured points with their latest seconds."""
        return [(point, list(seen)) for point, seen in list(self._seen.items())]

    def _fit(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Least squares of relative errors, with a small weight on the expected curve; no coefficient is negative."""
        points = np.array(list(self._medians))
        seconds = np.maximum(np.array(list(self._medians.values())), 1e-9)
        scale = float(np.median(seconds / np.maximum(points @ self._expected, 1e-9)))
        rows = points / seconds[:, None]
        pull = np.diag(np.sqrt(_EXPECTATION) * rows.mean(axis=0))
        left = np.vstack([rows, pull])
        right = np.concatenate([np.ones(len(rows)), pull @ (scale * self._expected)])
        used = np.ones(left.shape[1], dtype=bool)
        fitted = np.zeros(left.shape[1])
        while used.any():
            fitted[:] = 0.0
            fitted[used] = np.linalg.lstsq(left[:, used], right, rcond=None)[0]
            if (fitted >= 0).all():
                break
            used &= fitted > 0
        return fitted


class CostModel:
    """The costs of one model on one device. ``observe`` and the predictions belong to one thread.

    ``encodes_whole_film`` is that of the model's capabilities.
    """

    def __init__(self, *, encodes_whole_film: bool = False) -> None:
        self._encodes_whole_film = encodes_whole_film
        self._curves: dict[Kind, Curve] = {kind: Curve(expected) for kind, expected in _EXPECTED.items()}
        # Key: the point of a first step. Value: the point of its beginning, and the seconds of both together.
        self._begun: dict[Point, tuple[Point, float]] = {}
        # Key: the number of a video's steps. Value: the steps that take no time, because they are cached.
        self._cached: dict[int, set[int]] = {}
        # What ``told`` said last; None when it is out of date.
        self._told: dict[str, Any] | None = None

    def observe(
        self, request: GenerationRequest, before: Done, after: Done, seconds: float, *, is_cached: bool = False
    ) -> None:
        """Learn from a turn that took the generation from ``before`` to ``after``.

        A step that ``is_cached`` ran without the model, and says nothing about steps with it.
        """
        self._told = None
        if is_cached:
            self._cached.setdefault(request.num_denoising_steps, set()).add(after.steps)
        elif after.chunks > before.chunks:
            self._curves["chunk"].observe(_chunk(request, is_first=before.chunks == 0), seconds)
        elif after.steps > before.steps and before.is_begun:
            self._curves["step"].observe(_step(request), seconds)
            self._learn_begin(_step(request))
        elif after.steps > before.steps:
            self._begun[_step(request)] = (self._begin(request), seconds)
            self._learn_begin(_step(request))

    def _learn_begin(self, step: Point) -> None:
        """Learn the time of the beginning: a first turn also takes a step, whose own time must be known first."""
        if step in self._begun and self._curves["step"].has(step):
            point, seconds = self._begun.pop(step)
            self._curves["begin"].observe(point, max(seconds - self._curves["step"].seconds(step), 0.0))
        while len(self._begun) > _REMEMBERED_SHAPES:
            del self._begun[next(iter(self._begun))]

    def next_turn_s(self, request: GenerationRequest, done: Done = NOT_BEGUN) -> float:
        """The predicted seconds of the generation's next turn."""
        begin_s = 0.0 if done.is_begun else self._curves["begin"].seconds(self._begin(request))
        if done.steps + 1 in self._cached.get(request.num_denoising_steps, ()):
            return begin_s
        if done.steps < request.num_denoising_steps:
            return begin_s + self._curves["step"].seconds(_step(request))
        return begin_s + self._curves["chunk"].seconds(_chunk(request, is_first=done.chunks == 0))

    def remaining_s(self, request: GenerationRequest, done: Done = NOT_BEGUN) -> float:
        """The predicted seconds of the device until the generation's end."""
        cached = sum(step > done.steps for step in self._cached.get(request.num_denoising_steps, ()))
        steps = max(request.num_denoising_steps - done.steps - cached, 0)
        chunks = max(_num_chunks(request) - max(done.chunks, 1), 0)
        seconds = steps * self._curves["step"].seconds(_step(request))
        seconds += chunks * self._curves["chunk"].seconds(_chunk(request, is_first=False))
        if done.chunks == 0:
            seconds += self._curves["chunk"].seconds(_chunk(request, is_first=True))
        return seconds + (0.0 if done.is_begun else self._curves["begin"].seconds(self._begin(request)))

    def _begin(self, request: GenerationRequest) -> Point:
        """The terms of a beginning: the text is encoded, and nothing else, one or two frames, or a whole film."""
        num_pictures = bool(request.image_key or request.continues_key) + bool(request.last_frame_key)
        is_film = bool(request.edits_key) or (num_pictures > 0 and self._encodes_whole_film)
        num_frames = request.num_frames if is_film else num_pictures
        return (float(request.num_passes), request.size.pixels / 1e6 * num_frames)

    def to_json(self) -> dict[str, Any]:
        """The measured points for ``from_json``. May be called on any thread."""
        return {kind: [[list(point), seen] for point, seen in curve.points()] for kind, curve in self._curves.items()}

    def told(self) -> dict[str, Any]:
        """As much of it as predictions elsewhere need, a median for each point, in the form of ``to_json``."""
        if (told := self._told) is None:
            told = self._told = {
                kind: [[list(point), [float(f"{seconds:.4g}")]] for point, seconds in curve.medians()]
                for kind, curve in self._curves.items()
            }
        return told

    @property
    def has_measured(self) -> bool:
        """Whether it knows of steps and of chunks, which a prediction in seconds takes."""
        return bool(self._curves["step"].medians() and self._curves["chunk"].medians())

    @classmethod
    def from_json(cls, told: Mapping[str, Any], *, encodes_whole_film: bool = False) -> CostModel:
        """Read what ``to_json`` made. Raises ValueError, TypeError or KeyError for anything else."""
        costs = cls(encodes_whole_film=encodes_whole_film)
        for kind, curve in costs._curves.items():
            for point, seen in told[kind]:
                if len(point) != len(_EXPECTED[kind]):
                    raise ValueError(f"a point of {kind} has {len(point)} figures")
                for seconds in seen:
                    curve.observe(tuple(map(float, point)), float(seconds))
        return costs


def _step(request: GenerationRequest) -> Point:
    passes, kilotokens = request.num_passes, request.kilotokens
    return (1.0, passes * kilotokens, passes * kilotokens**2)


def _chunk(request: GenerationRequest, *, is_first: bool) -> Point:
    """The terms of a chunk: the first latent frame gives one frame, each other one gives four."""
    return (1.0, request.size.pixels / 1e6 * (1 if is_first else 4))


def _num_chunks(request: GenerationRequest) -> int:
    return (request.num_frames - 1) // 4 + 1
