"""The layers of ARCHITECTURE.md hold: imports go down only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "kinema"
# From the top down; parts on one line do not know each other. A part may import itself and everything below its line.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["jobs_cli", "bench"],
    ["wiring", "hosting", "terminal", "jobs_view"],
    ["shell", "process"],
    ["replay"],
    ["generate", "logs"],
    ["server"],
    ["service", "dispatcher", "webhooks", "retention"],
    ["queue_view"],
    ["cluster"],
    ["submissions"],
    ["worker", "inputs", "fields"],
    ["engines", "media", "storage", "jobs", "outbound"],
    ["job", "manifest"],
    ["request", "events"],
    ["sizes"],
    ["capabilities", "settings", "client", "json_text"],
    ["errors"],
]
# The protocol is all that users of a cluster see; only wiring knows which one it is.
ONLY_WIRING = {"kinema.cluster.local", "kinema.cluster.host", "kinema.cluster.remote", "kinema.cluster.dynamo"}
HEAVY = {
    "torch": "engines",
    "diffusers": "engines",
    "transformers": "engines",
    "sglang": "engines.sglang",
    "zmq": "engines.sglang",
    "dynamo": "cluster.dynamo",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_imports_go_down_only() -> None:
    """Every import within the package points to the same part or to a lower line."""
    wrong = []
    for name, tree in modules():
        part = name.split(".")[0]
        if part == "__init__":
            continue
        for target in imported(tree):
            below = target.removeprefix("kinema.").split(".")[0]
            if not target.startswith("kinema.") or below in {part, "__version__"}:
                continue
            if layer_of(below) <= layer_of(part):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_only_wiring_knows_which_cluster_it_is() -> None:
    """Everything else sees the protocol in cluster/base.py."""
    wrong = [
        name
        for name, tree in modules()
        if not name.startswith(("wiring", "hosting", "cluster")) and ONLY_WIRING & set(imported(tree))
    ]
    assert not wrong


def test_heavy_libraries_stay_in_their_part() -> None:
    """torch under engines/, sglang under engines/sglang/, dynamo under cluster/dynamo/."""
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        for library, part in HEAVY.items()
        if target.split(".")[0] == library and not f"{name}.".startswith(f"{part}.")
    ]
    assert not wrong


def test_importing_kinema_loads_neither_torch_nor_dynamo() -> None:
    """Nor do the service and the server, until an engine is chosen."""
    code = (
        "import sys, kinema, kinema.wiring, kinema.hosting, kinema.cli; "
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
