"""What only shows a text starts at once: no library that a command may need is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kinema import __version__

# A command imports them when it runs. A list of names, not of times: it says the same on every machine.
SLOW = {"alembic", "anyio", "av", "fastapi", "httpx", "numpy", "PIL", "pydantic", "sqlalchemy", "structlog", "torch"}
EVERY_HELP = """
import contextlib, io, json, sys
import typer
from kinema.cli.app import app

def paths(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))

shown = {}
for path in paths(typer.main.get_command(app)):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        app([*path, "--help"], prog_name="kinema")
    shown[" ".join(path)] = out.getvalue()
json.dump({"shown": shown, "modules": sorted(sys.modules)}, sys.stdout)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a terminal of 80 columns."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def imported(stderr: str) -> set[str]:
    """The libraries that ``-X importtime`` names."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in stderr.splitlines()}


def test_no_help_imports_what_a_command_needs() -> None:
    """Each command has its text, and no line of it is cut."""
    told = json.loads(run("-c", EVERY_HELP).stdout)
    assert not SLOW & set(told["modules"])
    shown: dict[str, str] = told["shown"]
    assert {"", "generate", "jobs create", "bench api", "config"} <= shown.keys()
    assert all(text.startswith(f"Usage: kinema {path}".rstrip()) for path, text in shown.items())
    listed = [line for text in shown.values() for line in text.partition("Commands:")[2].splitlines()]
    assert len(listed) > 20
    assert not [line for line in listed if line.endswith("...")], "a sentence is too long for 80 columns"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("kinema jo", ["jobs"]),
        ("kinema jobs cr", ["create"]),
        ("kinema jobs create --pr", ["--priority", "--preview-every"]),
    ],
)
def test_completion_imports_as_little(words: str, completed: list[str]) -> None:
    """It runs at each press of the key."""
    asked = {"_KINEMA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    told = run("-X", "importtime", "-m", "kinema", **asked)
    assert told.stdout.split() == completed
    assert "typer" in imported(told.stderr)
    assert not SLOW & imported(told.stderr)


def test_the_version_imports_as_little() -> None:
    """It is asked for by scripts."""
    told = run("-X", "importtime", "-m", "kinema", "--version")
    assert told.stdout == f"kinema {__version__}\n"
    assert not SLOW & imported(told.stderr)


def test_names_of_the_package_are_imported_when_they_are_used() -> None:
    """All that it offers can be had of it, and nothing else."""
    code = (
        "import sys, kinema; assert 'pydantic' not in sys.modules; "
        "from kinema import Settings; assert 'pydantic' in sys.modules; "
        "assert all(hasattr(kinema, name) for name in kinema.__all__); "
        "assert set(kinema.__all__) <= set(dir(kinema)); "
        "print(hasattr(kinema, 'Nonsense'))"
    )
    assert run("-c", code).stdout == "False\n"
