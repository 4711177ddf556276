"""What the installed diffusers takes, read from its source: nothing is imported, so it is known in milliseconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Signature:
    """The arguments of a pipeline's call: all of them, and those that have no default.

    ``has_bar`` says that the pipeline draws its loops by its own ``progress_bar``, from which its steps are known.
    ``prompt_tokens`` is how much it reads of a prompt, where it says so.
    """

    arguments: frozenset[str]
    required: frozenset[str]
    has_bar: bool
    prompt_tokens: int | None


def pipelines_folder() -> Path | None:
    """The folder with the pipelines of the installed diffusers; None when it is not installed."""
    spec = importlib.util.find_spec("diffusers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "pipelines"


@cache
def signature_of(pipeline: str) -> Signature | None:
    """The call of this class of pipeline; None when the installed diffusers has no such class."""
    folder = pipelines_folder()
    for path in sorted(folder.rglob("pipeline_*.py")) if folder else ():
        source = path.read_text(encoding="utf-8")
        if f"class {pipeline}(" in source:
            return next(_calls(source, pipeline), None)
    return None


def _calls(source: str, pipeline: str) -> Iterator[Signature]:
    has_bar = "self.progress_bar(" in source
    for owner in ast.parse(source).body:
        if isinstance(owner, ast.ClassDef) and owner.name == pipeline:
            for method in owner.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__call__":
                    yield _signature(method.args, has_bar=has_bar)


def _signature(arguments: ast.arguments, *, has_bar: bool) -> Signature:
    names = [argument.arg for argument in arguments.args[1:]]
    num_required = len(names) - len(arguments.defaults)
    defaults = dict(zip(names[num_required:], arguments.defaults, strict=True))
    most = defaults.get("max_sequence_length")
    prompt_tokens = most.value if isinstance(most, ast.Constant) and isinstance(most.value, int) else None
    return Signature(frozenset(names), frozenset(names[:num_required]), has_bar, prompt_tokens)
