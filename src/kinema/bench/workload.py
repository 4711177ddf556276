"""Which videos are asked for and when: a Poisson stream, or a trace from a file.

The loop is open: a video is asked for at its time, whatever became of the videos before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.errors import ConfigError

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VideoClass:
    """Videos that are alike: the fields of their body, and their share of all videos."""

    name: str
    body: Body
    share: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A video that is asked for ``at_s`` seconds after the start."""

    at_s: float
    name: str
    body: Body


def poisson(classes: Sequence[VideoClass], per_s: float, count: int, seed: int) -> list[Arrival]:
    """Draw ``count`` arrivals with exponential pauses; each class comes as often as its share says, in any order."""
    draw = random.Random(seed)  # noqa: S311 - a stream that can be drawn again
    chosen = draw.choices(classes, [one.share for one in classes], k=count)
    at_s, arrivals = 0.0, []
    for one in chosen:
        at_s += draw.expovariate(per_s)
        arrivals.append(Arrival(at_s, one.name, one.body))
    return arrivals


def read_trace(path: Path) -> list[Arrival]:
    """A JSON object a line: ``{"at_s": 1.5, "class": "short", "body": {...}}``. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the trace {path}: {exc}") from exc
    arrivals = [_arrival(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not arrivals:
        raise ConfigError(f"the trace {path} is empty; it has a JSON object a line, with at_s, class and body")
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _arrival(line: str, number: int, path: Path) -> Arrival:
    try:
        fields = json.loads(line)
        arrival = Arrival(float(fields["at_s"]), str(fields["class"]), dict(fields["body"]))
    except (ValueError, TypeError, KeyError) as exc:
        raise ConfigError(
            f'{path}, line {number}: not {{"at_s": 1.5, "class": "short", "body": {{...}}}} ({type(exc).__name__})'
        ) from exc
    if not arrival.at_s >= 0:
        raise ConfigError(f"{path}, line {number}: at_s must be a number of seconds from 0")
    return arrival
