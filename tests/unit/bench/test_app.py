"""The commands of ``kinema bench`` as the command line reads them."""

from __future__ import annotations

import subprocess
import sys


def test_reading_the_commands_loads_nothing_that_measures() -> None:
    """``kinema --help`` waits for the import of this file, so the parts come when a command runs."""
    code = (
        "import sys, kinema.shell; before = set(sys.modules); import kinema.bench.app; "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('kinema.bench')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
