"""HEIC pictures: pillow-heif reads them, which comes with the extra ``heic``."""

from __future__ import annotations

import io

from PIL import ImageFile

try:
    import pillow_heif
except ImportError:
    IS_INSTALLED = False
else:
    IS_INSTALLED = True


def open_heic(data: bytes) -> ImageFile.ImageFile:
    """Read the header of a HEIC picture whose extra is installed.

    The library turns and mirrors the pixels by the boxes of the file. Its EXIF has no say in this, and is taken as
    upright (ISO/IEC 23008-12, annex A).
    """
    image: ImageFile.ImageFile = pillow_heif.HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]
    return image
