"""What it costs to read ordinary pictures and films, in this checkout and in another one, by turns.

``python -m tests.inputs.cost OTHER_CHECKOUT`` prints the median times of both, in milliseconds of the processor.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.integration.test_film import film_of
from tests.integration.test_mp4 import moving_square

ROUNDS = 41
# Reads the file whose path comes in a line, in a process of its own as a server does, and answers with the seconds of
# the processor that this took.
_READER = """
import os, sys, time
from pathlib import Path
from kinema.media.film import Size, open_film
from kinema.media.images import open_image
for line in sys.stdin:
    if not os.fork():
        data = Path(line.strip()).read_bytes()
        begin = time.process_time()
        if line.strip().endswith((".mp4", ".webm")):
            opened = open_film(data)
            opened.fit(Size(width=320, height=240), 16, 17)
        else:
            open_image(data).fit(Size(width=832, height=480))
        print(time.process_time() - begin, flush=True)
        os._exit(0)
    os.wait()
"""


def make_files(folder: Path) -> list[Path]:
    """Those that most clients send: no tags, no profile."""
    rows, columns = np.mgrid[0:1080, 0:1920]
    waves = [rows // 5 % 256, columns // 8 % 256, 128 + 100 * np.sin(rows / 60 + columns / 90)]
    picture = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    for name, options in (("a.png", {}), ("a.jpg", {"quality": 90}), ("a.webp", {"quality": 80})):
        picture.save(folder / name, **options)
    frames = np.repeat(np.repeat(moving_square(17), 10, axis=1), 10, axis=2)
    (folder / "a.mp4").write_bytes(film_of(frames))
    (folder / "a.webm").write_bytes(film_of(frames, kind="webm", codec="libvpx"))
    return sorted(folder.iterdir())


def reader(checkout: Path) -> subprocess.Popen[str]:
    """A process with the code of that checkout, and what it needs besides from the environment."""
    paths = os.pathsep.join([str(checkout / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _READER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def ask(process: subprocess.Popen[str], path: Path) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main(other: str) -> None:
    readers = [reader(Path(other)), reader(Path.cwd())]
    with tempfile.TemporaryDirectory() as folder:
        for path in make_files(Path(folder)):
            times: list[list[float]] = [[], []]
            for number in range(ROUNDS):
                pairs = list(zip(readers, times, strict=True))
                for process, taken in pairs if number % 2 else reversed(pairs):
                    taken.append(1000 * ask(process, path))
            before, now = (statistics.median(taken[1:]) for taken in times)
            print(f"{path.suffix[1:]:5} before {before:8.2f} ms  now {now:8.2f} ms  {100 * (now / before - 1):+.1f} %")
    for process in readers:
        process.communicate()


if __name__ == "__main__":
    main(sys.argv[1])
