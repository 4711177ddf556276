"""One video to one file, without a service: what ``kinema generate`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kinema.engines.base import Engine, Frames, Output, UInt8Array
from kinema.media.images import fit, read_size
from kinema.media.mp4 import Mp4Writer
from kinema.request import GenerationOptions, GenerationRequest, Resolved, resolve


@dataclass(frozen=True)
class Prepared:
    """A complete request with its first frame (h, w, 3) uint8, None for text-to-video."""

    resolved: Resolved
    image: UInt8Array | None


def prepare(engine: Engine, options: GenerationOptions, image: bytes | None) -> Prepared:
    """Check the options against the engine's model and bring the image to the video's size. Raises RequestError."""
    resolved = resolve(options, engine.capabilities, read_size(image) if image is not None else None)
    if image is None:
        return Prepared(resolved, None)
    fitted = fit(image, resolved.request.size)
    notes = (fitted.note,) if fitted.note else ()
    return Prepared(Resolved(request=resolved.request, warnings=resolved.warnings + notes), fitted.pixels)


def generate_file(
    engine: Engine,
    request: GenerationRequest,
    image: UInt8Array | None,
    path: Path,
    on_output: Callable[[Output], None],
) -> float:
    """Write the video to ``path`` as MP4 and return the seconds it took; no file is left when it fails.

    ``engine`` is loaded. ``on_output`` sees every step and every chunk of frames as it comes.
    """
    started = time.perf_counter()
    writer = Mp4Writer(path, width=request.width, height=request.height, fps=request.fps)
    try:
        for output in engine.generate(request, image):
            if isinstance(output, Frames):
                writer.add(output.data)
            on_output(output)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return time.perf_counter() - started
