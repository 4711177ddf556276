"""The modules of the engines: no two import each other, and none has the name of another."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ENGINES = Path(__file__).parents[3] / "src" / "kinema" / "engines"
# Each engine has one, and its class has the engine's name.
SHARED_NAMES = {"__init__", "engine"}


def names() -> dict[str, Path]:
    """The modules under ``engines/`` by their names in an import."""
    paths = [path for path in ENGINES.rglob("*.py") if path.name != "__init__.py"]
    return {"kinema.engines." + ".".join(path.relative_to(ENGINES).with_suffix("").parts): path for path in paths}


def imported(path: Path) -> Iterator[str]:
    """What a module imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_modules_import_each_other_in_no_circle() -> None:
    """An import within a function counts, so that kernels stand above what they implement and below who chooses."""
    modules = names()
    graph = {name: set(imported(path)) & modules.keys() - {name} for name, path in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


def test_a_module_name_is_used_once() -> None:
    """Also in the folders of an engine, so that a name says which file it is."""
    counts = Counter(path.stem for path in names().values() if path.stem not in SHARED_NAMES)
    assert [name for name, count in counts.items() if count > 1] == []
