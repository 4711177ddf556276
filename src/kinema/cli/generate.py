"""One video to one file, without a service: what ``kinema generate`` and ``kinema replay`` run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

from av.error import FFmpegError

from kinema.engines.base import Engine, Frames, Inputs, Output, UInt8Array
from kinema.errors import EngineFailed, InvalidRequest, StorageUnavailable
from kinema.files import replacing
from kinema.inputs import Prepared
from kinema.manifest import Manifest
from kinema.media.mp4 import Mp4Writer, encoder_facts
from kinema.media.planes import size_of


@contextmanager
def saved_film(path: Path) -> Iterator[Path]:
    """A path to write an MP4 to, which takes the place of ``path`` when the block ends without an error.

    Raises InvalidRequest when ``path`` cannot be the name of a film, StorageUnavailable when it cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise InvalidRequest(f"--output {path}: the video is an MP4; give a name that ends in .mp4", param="output")
    try:
        if path.exists() and not path.is_file():
            raise InvalidRequest(f"--output {path} is not a file; give the name of one, old or new", param="output")
        with replacing(path) as unfinished:
            yield unfinished
    except (OSError, FFmpegError) as exc:
        raise StorageUnavailable(f"--output {path} cannot be written: {exc.strerror or exc}") from exc


def generate_file(engine: Engine, prepared: Prepared, path: Path, on_output: Callable[[Output], None]) -> float:
    """Write the video to ``path`` as MP4 and return the seconds it took; no file is left when it fails.

    ``engine`` is loaded. ``on_output`` sees every step and every chunk of frames as it comes.
    """
    started = time.perf_counter()
    request = prepared.request
    tags = Manifest.of(request, prepared.described(), engine.facts, encoder_facts()).tags
    with closing(_frames(engine, prepared, on_output)) as frames:
        first = next(frames, None)
        if first is None:
            raise EngineFailed("The engine ended without a frame.")
        size = size_of(first)
        writer = Mp4Writer(path, width=size.width, height=size.height, fps=request.fps, metadata=tags)
        try:
            for chunk in chain([first], frames):
                writer.add(chunk)
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return time.perf_counter() - started


def _frames(
    engine: Engine, prepared: Prepared, on_output: Callable[[Output], None]
) -> Generator[UInt8Array, None, None]:
    """Yield the frames of the film to continue, if any, then the new frames without the one that both share."""
    request, num_doubled = prepared.request, 0
    older = prepared.older_film()
    if older is not None:
        num_doubled = 1
        for pixels in older.frames(request.size, request.fps):
            yield pixels[None]
    inputs = Inputs(prepared.first_frame, prepared.last_frame, prepared.edited_frames())
    for output in engine.generate(request, inputs):
        if isinstance(output, Frames):
            yield output.data[num_doubled:]
            num_doubled = 0
        on_output(output)
