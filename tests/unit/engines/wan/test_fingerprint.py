"""What names the code of an engine: a digest of all files in its package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kinema.bench.wan.subject import write_architecture
from kinema.engines.wan.fingerprint import code_digest, weights_digest


def test_every_file_of_the_package_counts(tmp_path: Path) -> None:
    """By its text, its name, and its being there; a copy of the package has the same digest."""
    digests = []
    for folder, name, code in (("a", "one.py", "X = 1\n"), ("b", "one.py", "X = 2\n"), ("c", "two.py", "X = 1\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(code, encoding="utf-8")
        digests.append(code_digest(tmp_path / folder))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "one.py").write_bytes((tmp_path / "a" / "one.py").read_bytes())
    assert code_digest(tmp_path / "copy") == digests[0]
    (tmp_path / "a" / "part").mkdir()
    (tmp_path / "a" / "part" / "__init__.py").touch()
    assert len({*digests, code_digest(tmp_path / "a")}) == 4


def test_weights_and_code_are_named_without_torch() -> None:
    """The sglang engine names weights by this module, in a process that does not load torch."""
    code = (
        "import sys; from kinema.engines.wan.fingerprint import code_digest; "
        "import kinema.engines.sglang.facts; print(code_digest(), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == f"{code_digest()} False\n"


def test_an_architecture_without_files_of_weights_has_a_digest(tmp_path: Path) -> None:
    """Of its configs; its weights are drawn, as benchmarks do."""
    digests = set()
    for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b"):
        (tmp_path / name).mkdir()
        digests.add(weights_digest(write_architecture(name, tmp_path / name)))
    assert len(digests) == 2
