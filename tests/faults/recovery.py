"""How long the service took to get over each fault: the table at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Recovery:
    """A line of the table. Times in seconds."""

    fault: str
    num_videos: int
    num_hit: int
    # Until the last video that the fault hit was begun again, and until the last of them was made.
    begun_again_s: float | None
    made_s: float | None
    # Until what was away worked again, counted from when it came back; None when nothing comes back.
    back_s: float | None = None


@dataclass
class Recoveries:
    """All lines of this run."""

    lines: list[Recovery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[str]:
        heads = ("fault", "videos", "hit", "begun again", "all made", "back in use")
        rows = [
            (
                line.fault,
                str(line.num_videos),
                str(line.num_hit),
                *(_seconds(value) for value in (line.begun_again_s, line.made_s, line.back_s)),
            )
            for line in self.lines
        ]
        widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
        return [_aligned(row, widths) for row in [heads, *rows]]


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    name, *values = (
        text.ljust(width) if index == 0 else text.rjust(width)
        for index, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([name, *values])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
