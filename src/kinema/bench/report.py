"""The results of a run of ``kinema bench serve``: by class, and as a whole. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """A video that was asked for: its class, when, the seconds to its end, those that it takes alone, and those that
    the service predicted when it was asked for. ``latency_s`` is None for a video that was refused or failed."""

    name: str
    at_s: float
    latency_s: float | None
    alone_s: float
    eta_s: float | None = None

    @property
    def slowdown(self) -> float:
        return math.inf if self.latency_s is None else self.latency_s / self.alone_s

    @property
    def eta_error(self) -> float | None:
        """The error of the first ETA, relative to the latency; None where nothing was predicted."""
        if self.eta_s is None or self.latency_s is None:
            return None
        return abs(self.eta_s - self.latency_s) / self.latency_s


@dataclass(frozen=True, slots=True)
class ClassReport:
    """The results of one class. Latencies in seconds; ``slowdown_*`` against alone; ``slo`` is the share of the videos
    that ended within the objective; ``lost`` counts those that were refused or failed."""

    count: int
    lost: int
    p50_s: float
    p95_s: float
    p99_s: float
    slowdown_p50: float
    slowdown_p95: float
    slo: float
    eta_error_p50: float | None
    eta_error_p90: float | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """The results of one stream. ``per_hour`` counts the videos from the first arrival to the last end: it is the same
    for every policy that does not let the device wait, but for what switching costs. ``eta_error_*`` are over all
    classes together."""

    classes: dict[str, ClassReport]
    per_hour: float
    elapsed_s: float
    eta_error_p50: float | None
    eta_error_p90: float | None


@dataclass(frozen=True)
class Measured:
    """A run under one policy; ``behind`` is the slowdown of a short video that is asked for behind a long one."""

    report: RunReport
    behind: float | None


def summarize(outcomes: Sequence[Outcome], slo: float) -> RunReport:
    """Count by class and as a whole; ``slo`` is the slowdown that a video may have."""
    ended = [outcome for outcome in outcomes if outcome.latency_s is not None]
    start_s = min((outcome.at_s for outcome in outcomes), default=0.0)
    end_s = max((outcome.at_s + (outcome.latency_s or 0.0) for outcome in ended), default=start_s)
    elapsed_s = max(end_s - start_s, 1e-9)
    names = sorted({outcome.name for outcome in outcomes})
    eta_error_p50, eta_error_p90 = _eta_errors(outcomes)
    return RunReport(
        classes={name: _class_of([outcome for outcome in outcomes if outcome.name == name], slo) for name in names},
        per_hour=3600 * len(ended) / elapsed_s,
        elapsed_s=elapsed_s,
        eta_error_p50=eta_error_p50,
        eta_error_p90=eta_error_p90,
    )


def _class_of(outcomes: Sequence[Outcome], slo: float) -> ClassReport:
    latencies = [outcome.latency_s for outcome in outcomes if outcome.latency_s is not None]
    slowdowns = [outcome.slowdown for outcome in outcomes if outcome.latency_s is not None]
    eta_error_p50, eta_error_p90 = _eta_errors(outcomes)
    return ClassReport(
        count=len(outcomes),
        lost=len(outcomes) - len(latencies),
        p50_s=percentile(latencies, 50),
        p95_s=percentile(latencies, 95),
        p99_s=percentile(latencies, 99),
        slowdown_p50=percentile(slowdowns, 50),
        slowdown_p95=percentile(slowdowns, 95),
        slo=sum(outcome.slowdown <= slo for outcome in outcomes) / len(outcomes),
        eta_error_p50=eta_error_p50,
        eta_error_p90=eta_error_p90,
    )


def _eta_errors(outcomes: Sequence[Outcome]) -> tuple[float | None, float | None]:
    """The median and the 90th percentile; None where nothing was predicted."""
    errors = [error for outcome in outcomes if (error := outcome.eta_error) is not None]
    return (percentile(errors, 50), percentile(errors, 90)) if errors else (None, None)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` in a hundred do not exceed; nan when there are no values."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(percent / 100 * len(values)) - 1, 0)]
