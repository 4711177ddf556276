"""Typer without pydantic, until there is a value to convert.

Typer converts the value of each option with pydantic, and imports it also for options that nobody gave, and while a
shell completes a word. That takes longer than all the rest of ``--help`` and completion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer


class _LazyConversion:
    """Typer's conversion of one parameter, made when a value needs it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ANN401 - Typer's own signature
        """What Typer's conversion gives; nobody reads the values of a line that is completed."""
        if ctx.resilient_parsing:
            return value
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        return self._make().coerce(value, param=param, ctx=ctx)


def convert_lazily() -> None:
    """Change Typer for the rest of the process. Versions before 0.29 import no pydantic and stay as they are."""
    for kind in (typer.core.TyperOption, typer.core.TyperArgument):
        convert = getattr(kind, "get_runtime_param", None)
        if convert is not None and "get_runtime_param" not in vars(kind):
            kind.get_runtime_param = _lazily(convert)  # type: ignore[assignment, method-assign]


def _lazily(convert: Callable[[Any], Any]) -> Callable[[Any], _LazyConversion]:
    return lambda param: _LazyConversion(lambda: convert(param))
