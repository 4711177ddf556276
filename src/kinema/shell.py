"""What all commands share: where they print, how they read settings, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from kinema.errors import ConfigError, KinemaError, RequestError
from kinema.settings_sources import LoadedSettings, load_settings

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# A configuration that cannot work is a different exit code than work that failed.
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_TERMINATED = 128 + signal.SIGTERM

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; by default ./kinema.toml if there.")]

# What the API calls by another name than the command line.
_FLAGS = {"num_inference_steps": "--steps", "guidance_scale": "--guidance", "input_reference": "--image"}


def settings_from(flags: dict[str, object], config: Path | None) -> LoadedSettings:
    """The settings, or the end of the command with a sentence about what is wrong with them."""
    try:
        return load_settings(flags, config)
    except ConfigError as exc:
        fail(exc)


def run(command: Callable[[], None]) -> None:
    """Run it, and end with a sentence and an exit code when it fails."""
    # As an exit like any other, so that what is unfinished is cleaned up.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(EXIT_TERMINATED))
    try:
        command()
    except KinemaError as exc:
        fail(exc)
    except asyncio.CancelledError:  # a signal while the service was starting; it ends as a running one does
        err.print("stopped")
        # All parts are stopped by now, but for a thread that may still read weights: it cannot be interrupted, and the
        # interpreter's own end would abort in it.
        os._exit(0)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


def run_joined(command: Callable[[], None]) -> NoReturn:
    """As ``run``, for a process of a cluster, which ends here.

    Threads of the cluster's runtime, or of a device that hangs, abort in the interpreter's own end.
    """
    code: object = 0
    try:
        run(command)
    except SystemExit as exc:
        code = exc.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else EXIT_FAILED)


def fail(exc: KinemaError) -> NoReturn:
    """Say what went wrong and stop."""
    # A request was typed as flags; a configuration error may be about a file, whose names are right as they stand.
    message = as_flags(exc.message) if isinstance(exc, RequestError) else exc.message
    err.print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(EXIT_CONFIG if isinstance(exc, ConfigError) else EXIT_FAILED)


def as_flags(sentence: str) -> str:
    """A sentence about the API's fields in the words of the command line."""
    for field, flag in _FLAGS.items():
        sentence = sentence.replace(field, flag)
    return sentence
