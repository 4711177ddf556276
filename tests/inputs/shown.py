"""What ffmpeg's command shows of films."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.inputs.films import Film

UInt8Array = npt.NDArray[np.uint8]
FFMPEG = shutil.which("ffmpeg")


def shown_by_ffmpeg(films: Mapping[str, Film], folder: Path) -> dict[str, UInt8Array]:
    """The frames (f, h, w, 3) uint8 RGB that each film is shown with, on white; by one process for all of them."""
    assert FFMPEG is not None
    given, asked = [], []
    for number, film in enumerate(films.values()):
        (folder / f"{number}").write_bytes(film.data)
        given += [*(("-c:v", film.decoder) if film.decoder else ()), "-i", f"{number}"]
        filters = ("-filter:v", film.shown) if film.shown else ()
        asked += ["-map", f"{number}:v:0", *filters, "-vsync", "passthrough", "-pix_fmt", "rgba", "-f", "rawvideo"]
        asked.append(f"{number}.rgba")
    command = [FFMPEG, "-v", "error", "-nostdin", "-y", "-threads", "1", *given, *asked]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    frames = {}
    for number, (name, film) in enumerate(films.items()):
        width, height = film.size
        stored = np.fromfile(folder / f"{number}.rgba", np.uint8).reshape(-1, height, width, 4).astype(float)
        frames[name] = np.rint(255 - (255 - stored[..., :3]) * stored[..., 3:] / 255).astype(np.uint8)
    return frames
