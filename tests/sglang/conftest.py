"""The table that a run ends with, as docs/engines.md has it: what passed, and what was measured."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from importlib.metadata import version

import pytest

_LIBRARIES = ("sglang", "torch", "torchvision", "diffusers", "transformers")
# By class of tests: how many ended how, what they took in seconds, and what they measured.
_counts: dict[str, Counter[str]] = defaultdict(Counter)
_seconds: Counter[str] = Counter()
_measured: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Setup, call and teardown of each test: what is skipped has no call, and an error may be in any of them."""
    suite = report.nodeid.split("::")[1]
    _seconds[suite] += report.duration
    if report.when == "call" or not report.passed:
        _counts[suite][report.outcome] += 1
    if report.when == "call":
        _measured[suite].update({str(name): str(value) for name, value in report.user_properties})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Markdown, of a run that had any of these tests."""
    if not _counts:
        return
    write = terminalreporter.write_line
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    write(f"\n{versions}; Python {platform.python_version()}, {platform.machine()}\n")
    write("| suite | passed | not offered | failed | seconds | measured |")
    write("|---|---|---|---|---|---|")
    for suite, counts in _counts.items():
        measured = "; ".join(f"{name} {value}" for name, value in _measured[suite].items())
        ended = " | ".join(str(counts[outcome]) for outcome in ("passed", "skipped", "failed"))
        write(f"| `{suite}` | {ended} | {_seconds[suite]:.0f} | {measured} |")
