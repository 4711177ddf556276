"""Temporary folders, and what happens to those of processes that were killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kinema.worker.scratch import ScratchFolder, remove_abandoned

MAKE_ONE = """
import sys, time
from kinema.worker.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "video.mp4").write_bytes(b"half a film")
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_when_it_is_removed(temporary: Path) -> None:
    """With all that is in it; again is fine."""
    folder = ScratchFolder()
    (folder.path / "video.mp4").write_bytes(b"x")
    assert folder.path.parent == temporary
    folder.remove()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not() -> None:
    """Whether it lives is asked of the system, not guessed from its age."""
    mine = ScratchFolder()
    with subprocess.Popen([sys.executable, "-c", MAKE_ONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        assert remove_abandoned() == 0
        assert (other / "video.mp4").exists()
        process.kill()
        process.wait()
    assert remove_abandoned() == 1
    assert not other.exists()
    assert mine.path.exists()
    mine.remove()


def test_other_folders_are_not_ours(temporary: Path) -> None:
    """A data folder in the same place, a file, and a link to a folder stay."""
    (temporary / "kinema-data").mkdir()
    (temporary / "kinema-film-x").write_bytes(b"a file")
    (temporary / "kinema-film-y").symlink_to(temporary / "kinema-data")
    assert remove_abandoned() == 0
    assert len(list(temporary.iterdir())) == 3
