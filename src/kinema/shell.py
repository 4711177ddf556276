"""What all commands share: where they print, how they read settings, and how they end.

Importing it is cheap, since ``kinema --help`` does: what only a running command needs is imported when it runs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from kinema.errors import ConfigError, KinemaError, RequestError

if TYPE_CHECKING:
    from kinema.settings_sources import LoadedSettings

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# A configuration that cannot work is a different exit code than work that failed.
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings in TOML; default: ./kinema.toml, if present.")
]

# Fields of the API whose flags have other names. The API's names are flags too, but the short ones are shown.
_SHORT_FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_frames": "--num-frames",
    "negative_prompt": "--negative-prompt",
    "input_reference": "--image",
    "last_frame": "--last-frame",
    "loras": "--lora",
}
_FIELD = re.compile(rf"\b({'|'.join(_SHORT_FLAGS)})\b")


def settings_from(flags: dict[str, object], config: Path | None) -> LoadedSettings:
    """The settings; what is wrong with them ends the command with a sentence."""
    from kinema.settings_sources import load_settings  # noqa: PLC0415 - imports pydantic, which --help does not need

    try:
        return load_settings(flags, config)
    except ConfigError as exc:
        fail(exc)
    except FileNotFoundError:
        _fail_without_folder()
        raise


def run(command: Callable[[], None]) -> None:
    """Run the command; when it fails, end with a sentence and an exit code."""
    from asyncio import CancelledError  # noqa: PLC0415 - as above

    # SIGTERM becomes an exit like any other, so that what is unfinished is cleaned up.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(EXIT_TERMINATED))
    try:
        command()
    except KinemaError as exc:
        fail(exc)
    except FileNotFoundError:
        _fail_without_folder()
        raise
    except CancelledError:  # a signal while the service was starting; it ends as a running service does
        err.print("stopped")
        # All parts are stopped by now, except a thread that may still read weights. It cannot be interrupted, and it
        # would abort the process while the interpreter ends.
        os._exit(0)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(EXIT_INTERRUPTED)


def run_joined(command: Callable[[], None]) -> NoReturn:
    """Run the command of a service's process as ``run`` does, and end the process at once.

    Threads of the cluster's runtime, or of a device that hangs or has failed, would abort it while the interpreter
    ends, or keep it from ending.
    """
    code: object = 0
    try:
        run(command)
    except SystemExit as exc:
        code = exc.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else EXIT_FAILED)


def _fail_without_folder() -> None:
    """End the command if the folder that it was started in is gone: then no relative path means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        fail(ConfigError("the folder in which this command was started does not exist any more; change to another one"))


def print_anything() -> None:
    """Let stdout and stderr write a character that the terminal's encoding does not have as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def fail(exc: KinemaError) -> NoReturn:
    """Say what went wrong and stop."""
    # A request was typed as flags. A configuration error may be about a file, where the names are right as they are.
    message = as_flags(exc.message) if isinstance(exc, RequestError) else exc.message
    err.print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(EXIT_CONFIG if isinstance(exc, ConfigError) else EXIT_FAILED)


def as_flags(sentence: str) -> str:
    """A sentence about the API's fields in the words of the command line."""
    return _FIELD.sub(lambda found: _SHORT_FLAGS[found[1]], sentence)
