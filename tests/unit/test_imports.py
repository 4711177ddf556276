"""The rooms of ARCHITECTURE.md hold: imports go down only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "kinema"
ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
# The protocol is all that users of a cluster see; only hosting knows which one it is.
ONLY_HOSTING = {"kinema.cluster.local", "kinema.cluster.host", "kinema.cluster.remote", "kinema.cluster.dynamo"}
HEAVY = {
    "torch": ("engines.", "bench.wan.", "bench.diffusers."),
    "diffusers": ("engines.", "bench.wan.", "bench.diffusers."),
    "transformers": ("engines.", "bench.wan.", "bench.diffusers."),
    "sglang": ("engines.sglang.",),
    "zmq": ("engines.sglang.",),
    "dynamo": ("cluster.dynamo.",),
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    return list(parsed())


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(tree: ast.Module) -> list[str]:
    return list(imports_of(tree))


def imports_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms() -> list[list[str]]:
    """Read the list in ARCHITECTURE.md, from the top down: the rooms of each line, without what is said of them."""
    after = ARCHITECTURE.read_text(encoding="utf-8").partition("## Rooms, and who may import whom")[2]
    lines = after.split("```")[1].strip("\n").splitlines()
    return [re.split(r"\s{2,}", line)[0].split(" | ") for line in lines if not line.startswith(" ")]


def test_the_list_of_rooms_is_whole() -> None:
    """Each folder and file of the package stands in it once, and nothing else does."""
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(room for line in rooms() for room in line) == sorted(there - {"__init__", "__main__"})


def test_imports_go_down_only() -> None:
    """Every import within the package points to the same part or to a lower line."""
    floor = {room: number for number, line in enumerate(rooms()) for room in line}
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        if name not in {"__init__", "__main__"} and points_up(name.split(".")[0], target, floor)
    ]
    assert not wrong


def points_up(room: str, target: str, floor: Mapping[str, int]) -> bool:
    below = target.removeprefix("kinema.").split(".")[0]
    if not target.startswith("kinema.") or below in {room, "__version__"}:
        return False
    return floor[below] <= floor[room]


def test_only_hosting_knows_which_cluster_it_is() -> None:
    """Everything else sees the protocol in cluster/base.py. The simulator of a cluster makes one itself."""
    wrong = [
        name
        for name, tree in modules()
        if not name.startswith(("hosting", "cluster", "bench.cluster")) and ONLY_HOSTING & set(imported(tree))
    ]
    assert not wrong


def test_heavy_libraries_stay_in_their_part() -> None:
    """torch under engines/ and the two folders that measure it, sglang and dynamo in one folder each."""
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        for library, homes in HEAVY.items()
        if target.split(".")[0] == library and not f"{name}.".startswith(homes)
    ]
    assert not wrong


def test_the_wan_engine_has_no_file_that_only_measures() -> None:
    """Each of its files is reached without bench/: the digest that checkpoints name covers what computes, and no more.

    The follower is a process of its own, which the leader starts by its name.
    """
    imports = {f"kinema.{name}": set(imported(tree)) for name, tree in modules()}
    reached = {name for name in imports if not name.startswith(("kinema.bench", "kinema.engines.wan"))}
    reached |= {"kinema.engines.wan.ranks.follower"}
    waiting = [*reached]
    while waiting:
        found = {name for name in imports[waiting.pop()] & imports.keys() if not name.startswith("kinema.bench")}
        waiting += found - reached
        reached |= found
    packages = {name.rpartition(".")[0] for name in imports}
    wan = {name for name in imports if name.startswith("kinema.engines.wan.")}
    assert wan <= reached | packages


def test_importing_kinema_loads_neither_torch_nor_dynamo() -> None:
    """Nor do the service and the server, until an engine is chosen."""
    code = (
        "import sys, kinema, kinema.hosting.frontend, kinema.hosting.worker, kinema.cli.app; "
        "print([m for m in ('torch', 'diffusers', 'sglang', 'dynamo') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_the_client_loads_no_server() -> None:
    """Nor a database, nor a model's libraries."""
    code = (
        "import sys, kinema.client; "
        "print([m for m in ('torch', 'sqlalchemy', 'fastapi', 'av', 'kinema.server') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
