"""Two kinds of charts as SVG text: lines, and bars over time.

Documentation pages show them on white or on black, so each chart has a background of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_WIDTH = 760
_FONT = "font-family='system-ui,sans-serif' font-size='13'"
_INK, _GREY, _GRID = "#1f2328", "#59636e", "#d9dee3"
COLOURS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37")
_LEFT, _RIGHT, _TOP = 150, 24, 56


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time, in the colour of its owner."""

    start: float
    end: float
    colour: str


def line_chart(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, bottom: float = 1.0, is_x_counted: bool = False
) -> str:
    """The y axis is logarithmic and begins at ``bottom``, a power of ten. An x is a part of 1, shown in percent, or a
    number from 1 on a logarithmic axis."""
    height, left = 400, 64
    xs = [x for line in lines for x, _ in line.points]
    top = 10 ** max(math.ceil(math.log10(max(y for line in lines for _, y in line.points))), 1)
    # Labels stand behind the ends of the lines.
    bottom_px, right_px = height - 48, _WIDTH - max(130, 7 * max(len(line.label) for line in lines) + 11)

    def place(x: float) -> float:
        return math.log10(x) if is_x_counted else x

    def across(x: float) -> float:
        return left + (place(x) - place(min(xs))) / (place(max(xs)) - place(min(xs))) * (right_px - left)

    def up(y: float) -> float:
        return bottom_px - math.log10(max(y, bottom) / bottom) / math.log10(top / bottom) * (bottom_px - _TOP)

    drawn = [_text(left, 26, title, weight="bold"), _text(left, 44, y_label, colour=_GREY)]
    for y in _ticks(bottom, top):
        drawn.append(f"<path d='M{left} {up(y):.1f}H{right_px}' stroke='{_GRID}'/>")
        drawn.append(_text(left - 8, up(y) + 4, f"{y:g}", anchor="end", colour=_GREY))
    told = {x: f"{x:,.0f}" if is_x_counted else f"{100 * x:.0f} %" for x in sorted(set(xs))}
    drawn += [_text(across(x), bottom_px + 20, text, anchor="middle", colour=_GREY) for x, text in told.items()]
    drawn.append(_text((left + right_px) / 2, height - 10, x_label, anchor="middle", colour=_GREY))
    for line, label_y in zip(lines, _apart([up(line.points[-1][1]) for line in lines]), strict=True):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        dashes = " stroke-dasharray='6 5'" if line.is_dashed else ""
        drawn.append(f"<polyline points='{path}' fill='none' stroke='{line.colour}' stroke-width='2.5'{dashes}/>")
        drawn.append(_text(right_px + 8, label_y + 4, line.label, colour=line.colour))
    return _svg(height, drawn)


def device_chart(title: str, rows: Mapping[str, Sequence[Bar]], owners: Mapping[str, str]) -> str:
    """A row of bars for each policy, over seconds; ``owners`` are the names of the colours."""
    row_px = 58
    height = _TOP + 24 + row_px * len(rows) + 44
    end = max(bar.end for bars in rows.values() for bar in bars)

    def across(x: float) -> float:
        return _LEFT + x / end * (_WIDTH - _LEFT - _RIGHT)

    drawn = [_text(24, 26, title, weight="bold")]
    for place, (owner, colour) in enumerate(owners.items()):
        x = 24 + 240 * place
        drawn.append(f"<rect x='{x}' y='40' width='12' height='12' rx='2' fill='{colour}'/>")
        drawn.append(_text(x + 18, 51, owner, colour=_GREY))
    for place, (row, bars) in enumerate(rows.items()):
        y = _TOP + 24 + row_px * place
        drawn.append(_text(24, y + 24, row))
        for bar in bars:
            width = max(across(bar.end) - across(bar.start), 0.8)
            drawn.append(
                f"<rect x='{across(bar.start):.1f}' y='{y}' width='{width:.1f}' height='38' fill='{bar.colour}'/>"
            )
    bottom = _TOP + 24 + row_px * len(rows)
    for second in range(0, int(end) + 1, 10):
        drawn.append(
            f"<path d='M{across(second):.1f} {_TOP + 18}V{bottom - 10}' stroke='{_GRID}' stroke-dasharray='2 4'/>"
        )
        drawn.append(_text(across(second), bottom + 8, f"{second} s", anchor="middle", colour=_GREY))
    return _svg(height, drawn)


def _ticks(bottom: float, top: float) -> list[float]:
    powers = range(round(math.log10(top / bottom)))
    return [step * bottom * 10**power for power in powers for step in (1, 2, 5)] + [top]


def _apart(places: Sequence[float], least: float = 17.0) -> list[float]:
    """The places, moved so far apart that labels at them do not touch, in the same order."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = _INK, weight: str = "normal") -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}' font-weight='{weight}'"
    return f"<text {place} {_FONT}>{escape(text)}</text>"


def _svg(height: int, drawn: Sequence[str]) -> str:
    box = f"width='{_WIDTH}' height='{height}' viewBox='0 0 {_WIDTH} {height}'"
    ground = f"<rect width='{_WIDTH}' height='{height}' rx='6' fill='#ffffff'/>"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {box}>", ground, *drawn, "</svg>\n"])
