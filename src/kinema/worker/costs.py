"""Predicts how many seconds of the device a generation takes: its beginning, each step, and each decoded chunk.

It learns only from the turns of the device. The prediction for a known shape is what the shape took lately; for another
shape it is read from a curve through the known ones. Plain arithmetic: no clock, no I/O, no torch.

The first turns of a shape in a process are cold: they may also compile, record or read something. They say how long
such a turn takes at most, and count as no more than that as soon as a warm turn of any shape is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal, TypeVar

import numpy as np

from kinema.request.geometry import Geometry
from kinema.request.request import GenerationRequest

# A median of nine ignores up to four outliers, and follows a changed device after five turns. Of two turns it is the
# shorter one.
_REMEMBERED_TURNS = 9
# The first turn of a shape compiles and reads, the second one records.
_COLD_TURNS = 2
# More shapes than a service makes in a day. The time of the fit grows with their number.
_REMEMBERED_SHAPES = 64
# Weight of the expected curve against a measured point. It is small, so it decides only where nothing was measured.
_EXPECTATION = 0.03
# Seconds for one unit before anything was measured: small against real times, with the right proportions.
_UNMEASURED_S = 1e-3

Kind = Literal["begin", "step", "chunk"]
Point = tuple[float, ...]
T = TypeVar("T")
# The seconds of each kind of turn are linear in some terms; these are the expected coefficients before any measurement.
# A step: a constant, tokens, and tokens squared for attention; see ``GenerationRequest.work``. A chunk: megapixels of
# all its frames.
_EXPECTED: dict[Kind, Point] = {"begin": (1.0, 0.05), "step": (0.0, 1.0, 1 / 20), "chunk": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Done:
    """How far a generation is: steps taken, chunks decoded. Until it has begun, its next turn also encodes the text."""

    is_begun: bool = False
    steps: int = 0
    chunks: int = 0


NOT_BEGUN = Done()


Coefficients = np.ndarray[Any, np.dtype[np.float64]]


class Curve:
    """Seconds as a linear function of some terms, corrected at every measured point."""

    def __init__(self, expected: Point) -> None:
        self._expected = np.array(expected)
        # The latest seconds at each point, and their median.
        self._seen: dict[Point, deque[float]] = {}
        self._medians: dict[Point, float] = {}
        # The seconds at each point by the shortest cold turn, behind those of that whole turn.
        self._cold: dict[Point, tuple[float, float]] = {}
        self._fitted: Coefficients | None = None

    def observe(self, point: Point, seconds: float) -> None:
        """Learn from a warm turn."""
        if not (seconds >= 0 and np.isfinite(seconds)):
            return
        self._fitted = None
        seen = self._seen.get(point) or deque(maxlen=_REMEMBERED_TURNS)
        seen.append(seconds)
        _put_last(self._seen, point, seen)
        _put_last(self._medians, point, median_low(seen))

    def observe_cold(self, point: Point, seconds: float, turn_s: float) -> None:
        """Learn from a cold turn, which took ``turn_s`` seconds with all that was in it beside this."""
        if seconds >= 0 and np.isfinite(seconds):
            self._fitted = None
            _put_last(self._cold, point, min((turn_s, seconds), self._cold.get(point, (np.inf, np.inf))))

    def is_warm(self, point: Point) -> bool:
        """Whether a warm turn at this point was measured."""
        return point in self._medians

    def has(self, point: Point) -> bool:
        """Whether this point was measured."""
        return point in self._medians or point in self._cold

    @property
    def is_measured(self) -> bool:
        """Whether any point was measured."""
        return bool(self._medians or self._cold)

    def seconds(self, point: Point) -> float:
        """The predicted seconds; never negative."""
        if point in self._medians:
            return self._medians[point]
        _, at_most = self._cold.get(point, (np.inf, np.inf))
        if not self._medians and point in self._cold:
            return at_most
        if not self.is_measured:
            return _UNMEASURED_S * float(self._expected @ point)
        if self._fitted is None:
            self._fitted = self._fit()
        return min(float(self._fitted @ point), at_most)

    def medians(self) -> list[tuple[Point, float]]:
        """The points of warm turns with the seconds that are predicted for them."""
        return list(self._medians.items())

    def points(self) -> list[tuple[Point, list[float]]]:
        """The points of warm turns with their latest seconds."""
        return [(point, list(seen)) for point, seen in list(self._seen.items())]

    def cold(self) -> list[tuple[Point, float]]:
        """The points of cold turns, where no warm ones are known, with the seconds of the shortest."""
        return [(point, seconds) for point, (_, seconds) in list(self._cold.items()) if point not in self._medians]

    def _fit(self) -> Coefficients:
        """The curve through warm turns, and cold ones that would be below it; or through cold ones alone."""
        known = self._medians or dict(self.cold())
        while True:
            fitted = self._fit_through(known)
            too_high = {point: seconds for point, seconds in self.cold() if seconds < fitted @ point}
            if too_high.keys() <= known.keys():
                return fitted
            known = known | too_high

    def _fit_through(self, known: Mapping[Point, float]) -> Coefficients:
        """Least squares of relative errors, with a small weight on the expected curve; no coefficient is negative."""
        points = np.array(list(known))
        seconds = np.maximum(np.array(list(known.values())), 1e-9)
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

    ``geometry`` and ``encodes_whole_film`` are those of the model's capabilities.
    """

    def __init__(self, geometry: Geometry = Geometry(), *, encodes_whole_film: bool = False) -> None:  # noqa: B008 - frozen
        self._geometry = geometry
        self._encodes_whole_film = encodes_whole_film
        self._curves: dict[Kind, Curve] = {kind: Curve(expected) for kind, expected in _EXPECTED.items()}
        # Key: the point of a first step. Value: the point of its beginning, the seconds of both together, and whether
        # that turn was cold.
        self._begun: dict[Point, tuple[Point, float, bool]] = {}
        # How many turns there were at each point of a step or a chunk.
        self._num_turns: dict[Point, int] = {}
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
            self._observe_chunk(request, seconds, is_first=before.chunks == 0)
        elif after.steps > before.steps:
            step = self._step(request)
            is_cold = self._is_cold(step)
            if before.is_begun:
                self._observe("step", step, seconds, seconds, is_cold=is_cold)
            else:
                self._begun[step] = (self._begin(request), seconds, is_cold)
            self._learn_begin(step)

    def _observe_chunk(self, request: GenerationRequest, seconds: float, *, is_first: bool) -> None:
        is_whole = self._geometry.chunk_frames is None
        if is_whole and not is_first:
            return  # it was decoded with the first one
        chunk = self._chunk(request, is_first=is_first)
        # The decoder of another size than that of the film before is made ready with the first chunk of a film.
        is_cold = self._is_cold(chunk) or (is_first and not is_whole)
        self._observe("chunk", chunk, seconds, seconds, is_cold=is_cold)

    def _observe(self, kind: Kind, point: Point, seconds: float, turn_s: float, *, is_cold: bool) -> None:
        if is_cold:
            self._curves[kind].observe_cold(point, seconds, turn_s)
        else:
            self._curves[kind].observe(point, seconds)

    def _is_cold(self, point: Point) -> bool:
        """Count a turn, and tell whether it is one of the first at its point in this process."""
        count = self._num_turns.get(point, 0)
        _put_last(self._num_turns, point, count + 1)
        return count < _COLD_TURNS

    def _learn_begin(self, step: Point) -> None:
        """Learn the time of the beginning: a first turn also takes a step, whose own time must be known first."""
        steps = self._curves["step"]
        if step in self._begun and steps.has(step):
            point, seconds, is_cold = self._begun.pop(step)
            begin_s = max(seconds - steps.seconds(step), 0.0)
            self._observe("begin", point, begin_s, seconds, is_cold=is_cold or not steps.is_warm(step))
        while len(self._begun) > _REMEMBERED_SHAPES:
            del self._begun[next(iter(self._begun))]

    def next_turn_s(self, request: GenerationRequest, done: Done = NOT_BEGUN) -> float:
        """The predicted seconds of the generation's next turn."""
        begin_s = 0.0 if done.is_begun else self._curves["begin"].seconds(self._begin(request))
        if done.steps + 1 in self._cached.get(request.num_denoising_steps, ()):
            return begin_s
        if done.steps < request.num_denoising_steps:
            return begin_s + self._curves["step"].seconds(self._step(request))
        if done.chunks > 0 and self._geometry.chunk_frames is None:
            return begin_s
        return begin_s + self._curves["chunk"].seconds(self._chunk(request, is_first=done.chunks == 0))

    def remaining_s(self, request: GenerationRequest, done: Done = NOT_BEGUN) -> float:
        """The predicted seconds of the device until the generation's end."""
        cached = sum(step > done.steps for step in self._cached.get(request.num_denoising_steps, ()))
        steps = max(request.num_denoising_steps - done.steps - cached, 0)
        chunks = max(self._geometry.num_chunks(request.num_frames) - max(done.chunks, 1), 0)
        seconds = steps * self._curves["step"].seconds(self._step(request))
        seconds += chunks * self._curves["chunk"].seconds(self._chunk(request, is_first=False)) if chunks else 0.0
        if done.chunks == 0:
            seconds += self._curves["chunk"].seconds(self._chunk(request, is_first=True))
        return seconds + (0.0 if done.is_begun else self._curves["begin"].seconds(self._begin(request)))

    def _begin(self, request: GenerationRequest) -> Point:
        """The terms of a beginning: the text is encoded, and nothing else, one or two frames, or a whole film."""
        num_pictures = bool(request.image_key or request.continues_key) + bool(request.last_frame_key)
        is_film = bool(request.edits_key) or (num_pictures > 0 and self._encodes_whole_film)
        num_frames = request.num_frames if is_film else num_pictures
        return (float(request.num_passes), request.size.pixels / 1e6 * num_frames)

    def _step(self, request: GenerationRequest) -> Point:
        """The terms of a step: a constant, the thousands of tokens in it, and their square."""
        frames = self._geometry.frames_at_once(request.num_frames)
        passes, thousands = request.num_passes, self._geometry.num_tokens(request.size, frames) / 1000
        return (1.0, passes * thousands, passes * thousands**2)

    def _chunk(self, request: GenerationRequest, *, is_first: bool) -> Point:
        """The terms of a chunk: its first one has a frame, or all of them."""
        chunk_frames = self._geometry.chunk_frames
        num_frames = request.num_frames if chunk_frames is None else 1 if is_first else chunk_frames
        return (1.0, request.size.pixels / 1e6 * num_frames)

    def to_json(self) -> dict[str, Any]:
        """The measured points for ``from_json``. May be called on any thread."""
        told = self._told_of_all()
        for kind, curve in self._curves.items():
            told[kind] = [[list(point), seen] for point, seen in curve.points()]
        return told

    def _told_of_all(self) -> dict[str, Any]:
        return {"geometry": self._geometry.model_dump(), "cold": self._cold()}

    def _cold(self) -> dict[str, Any]:
        return {
            kind: [[list(point), seconds] for point, seconds in curve.cold()] for kind, curve in self._curves.items()
        }

    def told(self) -> dict[str, Any]:
        """As much of it as predictions elsewhere need, a median for each point, in the form of ``to_json``."""
        if (told := self._told) is None:
            told = self._told_of_all()
            for kind, curve in self._curves.items():
                told[kind] = [[list(point), [float(f"{seconds:.4g}")]] for point, seconds in curve.medians()]
            self._told = told
        return told

    @property
    def has_measured(self) -> bool:
        """Whether it knows of steps and of chunks, which a prediction in seconds takes."""
        return self._curves["step"].is_measured and self._curves["chunk"].is_measured

    @classmethod
    def from_json(
        cls,
        told: Mapping[str, Any],
        geometry: Geometry = Geometry(),  # noqa: B008 - frozen
        *,
        encodes_whole_film: bool = False,
    ) -> CostModel:
        """Read what ``to_json`` made. Raises ValueError, TypeError or KeyError for anything else, and for costs that
        were counted by another geometry."""
        costs = cls(geometry, encodes_whole_film=encodes_whole_film)
        # An earlier version counted all models alike, and did not say how.
        if Geometry.model_validate(told.get("geometry", {})) != geometry:
            raise ValueError("they were counted in other tokens than those of the model")
        for kind, curve in costs._curves.items():
            for point, seen in told[kind]:
                for seconds in seen:
                    curve.observe(_point(kind, point), float(seconds))
            # An earlier version did not tell cold turns from warm ones.
            for point, seconds in told.get("cold", {}).get(kind, ()):
                curve.observe_cold(_point(kind, point), float(seconds), float(seconds))
        return costs


def _point(kind: Kind, figures: Sequence[float]) -> Point:
    if len(figures) != len(_EXPECTED[kind]):
        raise ValueError(f"a point of {kind} has {len(figures)} figures")
    return tuple(map(float, figures))


def _put_last(known: dict[Point, T], point: Point, value: T) -> None:
    """Set what is known of a point, and forget the point that was set longest ago when there are too many."""
    known.pop(point, None)
    known[point] = value
    if len(known) > _REMEMBERED_SHAPES:
        del known[next(iter(known))]
