"""Small pictures of a video during its steps, for clients that asked for them."""

from __future__ import annotations

import base64
import io

import structlog
from PIL import Image

from kinema.engines.base import Output, Step, UInt8Array
from kinema.engines.failures import release_frames
from kinema.events import Preview
from kinema.request.request import GenerationRequest

log = structlog.get_logger(__name__)

# The longer side in pixels, at most that of the video: enough to recognise the video.
_SIDE = 320
# Enough for an event stream. Only noise at the first of these qualities comes close to it.
MAX_BYTES = 20_000
_QUALITIES = (80, 60, 40, 20)


def preview_of(request: GenerationRequest, output: Output) -> Preview | None:
    """The preview that is due after this output, or None. Call it where a step's ``preview`` may be called.

    A preview that fails is left out, with a line in the log, because it is no part of the video.
    """
    every = request.preview_every
    if every is None or not isinstance(output, Step) or output.preview is None or output.index % every:
        return None
    try:
        jpeg = _jpeg(output.preview(), request)
    except Exception as exc:
        log.warning("a preview was left out", step=output.index, exc_info=exc)
        release_frames(exc)
        return None
    return Preview(step=output.index, total=output.total, b64_jpeg=base64.b64encode(jpeg).decode("ascii"))


def _jpeg(pixels: UInt8Array, request: GenerationRequest) -> bytes:
    """A JPEG of pixels (h, w, 3) uint8 of any size, in the shape of the video."""
    scale = min(_SIDE / max(request.width, request.height), 1.0)
    size = (max(round(request.width * scale), 1), max(round(request.height * scale), 1))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()
