"""What `kinema jobs` shows in a terminal and in a pipe."""

from __future__ import annotations

import time
from datetime import date
from io import StringIO

import pytest
from rich.console import Console

from kinema.cli.jobs_view import show_days, show_list, show_video, watching
from kinema.client import Usage, Video

ID = "video_" + "0" * 24 + "1c9f2d3e"
VIDEO = Video(
    id=ID,
    status="in_progress",
    progress=40,
    model="tiny-wan",
    prompt="a red circle moves right over a wide blue sea, slowly, in the evening, with gulls",
    size="128x128",
    seconds="2",
    created_at=int(time.time()) - 7200,
    num_frames=17,
    fps=8,
    num_inference_steps=4,
    guidance_scale=5.0,
    seed=7,
    eta_s=12.4,
    queue_position=3,
    warnings=["num_frames 80 -> 81: must be a multiple of 4 plus 1"],
)
CANCELLED = Video.model_validate(
    VIDEO.model_dump() | {"status": "failed", "error": {"code": "cancelled", "message": "It was."}}
)


def terminal(width: int = 80) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=width, color_system=None, soft_wrap=True)


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_a_list_fits_the_terminal() -> None:
    """Short ids, no column squeezed, and as much of the prompt as there is room for."""
    console = terminal()
    show_list([VIDEO], console)
    head, row = shown(console)
    assert head.split() == ["id", "status", "progress", "model", "size", "age", "prompt"]
    assert row.startswith("1c9f2d3e  in_progress       40%  tiny-wan  128x128  2 h  a red circle")
    assert row.endswith("…")
    assert len(row) == 80


def test_a_pipe_gets_whole_ids_and_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    """And no head, no colours, nothing shortened."""
    show_list([VIDEO], Console(file=StringIO()))
    fields = capsys.readouterr().out.rstrip("\n").split("\t")
    assert fields[:5] == [ID, "in_progress", "40", "tiny-wan", "128x128"]
    assert fields[6] == VIDEO.prompt


def test_nothing_of_a_prompt_is_obeyed() -> None:
    """Neither by the terminal nor by our own mark-up."""
    console = terminal(120)
    show_list([VIDEO.model_copy(update={"prompt": "\x1b[31m[bold]:smile:\n\tend"})], console)
    assert shown(console)[1].rstrip().endswith("2 h   [31m[bold]:smile:  end")


def test_an_empty_list_says_so() -> None:
    """In a terminal; a pipe gets no line."""
    console = terminal()
    show_list([], console)
    assert shown(console) == ["no videos"]


def test_everything_about_a_video() -> None:
    """A line each, and the outlook while it is not over."""
    console = terminal(100)
    show_video(VIDEO, console)
    lines = [line.rstrip() for line in shown(console)]
    assert f"id               {ID}" in lines
    assert "progress         40%, number 3 in the queue, done in about 12 s" in lines
    assert "video            128x128, 2 s, 17 frames at 8 fps" in lines
    assert "made with        4 steps, guidance 5, seed 7" in lines
    assert "note             num_frames 80 -> 81: must be a multiple of 4 plus 1" in lines


def test_a_video_of_a_tier_says_what_made_it() -> None:
    """The tier, its solver and its timesteps."""
    console = terminal(100)
    show_video(VIDEO.model_copy(update={"tier": "draft", "solver": "lcm", "timesteps": [1000, 750.5]}), console)
    lines = [" ".join(line.split()) for line in shown(console)]
    assert {"tier draft", "solver lcm", "timesteps 1000, 750.5"} <= set(lines)


def test_a_url_is_not_broken() -> None:
    """It can be copied from a narrow terminal, which wraps it by itself."""
    console = terminal(80)
    url = f"http://a-rather-long-name.of.a.server.example.com:8000/v1/videos/{ID}/content"
    show_video(Video.model_validate(VIDEO.model_dump() | {"data": [{"url": url}]}), console)
    assert f"url              {url}" in shown(console)


def test_a_failed_video_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """A cancelled one has a status of its own."""
    told = {"code": "out_of_memory", "message": "Too large."}
    show_video(Video.model_validate(VIDEO.model_dump() | {"status": "failed", "error": told}), Console(file=StringIO()))
    out = capsys.readouterr().out
    assert "status\tfailed\nerror\tToo large. (out_of_memory)\n" in out
    show_video(CANCELLED, Console(file=StringIO()))
    assert "status\tcancelled\nprompt\t" in capsys.readouterr().out


def test_the_bar_begins_with_the_outlook() -> None:
    """Until something happens."""
    console = terminal(120)
    with watching(VIDEO, console):
        pass
    assert "in progress, number 3 in the queue, done in about 12 s" in "\n".join(shown(console))


def test_days_are_rows_for_people_and_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """A server without keys has no name for them."""
    days = [
        Usage(day=date(2026, 12, 1), key="ann", videos=1200, device_s=3600.5, bytes=2_500_000),
        Usage(day=date(2026, 12, 2), videos=1, device_s=0.25, bytes=10),
    ]
    people = terminal()
    show_days(days, people)
    show_days([], people)
    head, first, second, nothing = shown(people)
    assert head.split() == ["day", "key", "videos", "seconds", "of", "a", "device", "MB"]
    assert (first.split(), second.split()) == (
        ["2026-12-01", "ann", "1,200", "3,600", "2.5"],
        ["2026-12-02", "1", "0", "0.0"],
    )
    assert nothing == "nothing was made"
    show_days(days, Console(file=StringIO()))
    assert capsys.readouterr().out == "2026-12-01\tann\t1200\t3600.5\t2500000\n2026-12-02\t\t1\t0.25\t10\n"
