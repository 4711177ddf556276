"""How far the start of a worker is."""

from __future__ import annotations

from structlog.testing import capture_logs

from kinema.worker.startup import Loading, Startup


def test_each_stage_is_logged_once_and_told_with_its_part() -> None:
    """A part that grows is no new stage; the seconds count from the beginning of the start."""
    now = 100.0
    startup = Startup("tiny-wan", clock=lambda: now)
    assert startup.loading is None
    with capture_logs() as logs:
        startup.report("importing the engine")
        now = 102.5
        startup.report("reading weights")
        startup.report("reading weights", 0.25)
        assert startup.loading == Loading("reading weights", 0.25, 2.5)
        startup.report("reading weights", 0.5)
    assert [(line["stage"], line["after_s"]) for line in logs] == [
        ("importing the engine", 0),
        ("reading weights", 2.5),
    ]
    startup.end()
    assert (startup.loading, startup.seconds) == (None, 2.5)


def test_a_start_is_told_in_words() -> None:
    """With the part where it is known, and without where nobody can know it."""
    assert str(Loading("reading weights", 0.25, 2.51)) == "reading weights, 25% done, 2.5 s after the start began"
    assert str(Loading("making a trial video", None, 3)) == "making a trial video, 3.0 s after the start began"


def test_a_report_after_the_end_begins_no_start() -> None:
    """A load that goes on after its start was given up reports on."""
    startup = Startup("tiny-wan")
    startup.report("reading weights", 0.5)
    startup.end()
    with capture_logs() as logs:
        startup.report("reading weights", 0.6)
        startup.report("compiling kernels")
    assert (startup.loading, logs) == (None, [])
