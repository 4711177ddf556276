"""The kinds of files that a video is stored as."""

from __future__ import annotations

from typing import Literal

OutputFormat = Literal["mp4", "webm", "gif"]

# The name is the ending of the file, too.
MEDIA_TYPES: dict[OutputFormat, str] = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}
# Kinds that have a place for sound.
WITH_SOUND: tuple[OutputFormat, ...] = ("mp4", "webm")
