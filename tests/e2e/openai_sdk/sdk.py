"""What the tests of the SDKs share: how they connect, the smallest videos, and what of two videos must be equal."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import openai
from openai import OpenAI
from openai.types import Video
from PIL import Image

from tests.server_process import Server

OLD_SDK = Path(sys.prefix) / "openai-2.25"
AS_JSON = {"Content-Type": "application/json"}
# The smallest video, as the SDK's own arguments and as what goes beside them.
SMALL: dict[str, Any] = {"prompt": "a red circle moving right", "size": "64x64"}
QUICK = {"num_frames": 5, "num_inference_steps": 2, "seed": 7}
# What two videos of the same request may differ in.
OWN = {
    "id", "created", "created_at", "completed_at", "expires_at", "data", "inference_time_s", "timings",
    "queue_position", "eta_s",
}  # fmt: skip


class Unsized(io.RawIOBase):
    """A stream that can be read once and tells no length; the SDK sends it in chunks, and never again."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._data.readinto(buffer)


def connect(server: Server, **options: Any) -> OpenAI:
    """A client of the new SDK."""
    return OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "sk-anything", "timeout": 60} | options)


def recording(sent: list[httpx2.Request]) -> httpx2.Client:
    """An ``http_client`` that keeps what the SDK sends."""
    return openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})


def by_old_sdk(server: Server, *calls: dict[str, Any], api_key: str = "sk-anything") -> list[dict[str, Any]]:
    """What the older SDK gives for these calls; see ``old_sdk.py``."""
    asked = {"base_url": f"{server.url}/v1", "api_key": api_key, "calls": calls}
    program = [sys.executable, str(Path(__file__).with_name("old_sdk.py"))]
    environment = {**os.environ, "PYTHONPATH": str(OLD_SDK)}
    ended = subprocess.run(
        program, input=json.dumps(asked), capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


def create(client: OpenAI, *, as_json: bool = False, **fields: Any) -> Video:
    """Create a small video; what the SDK has no argument for goes the way it wants it, in ``extra_body``."""
    named = SMALL | {k: fields.pop(k) for k in ("prompt", "model", "size", "seconds", "input_reference") if k in fields}
    headers = AS_JSON if as_json else None
    return client.videos.create(**named, extra_body=QUICK | fields, extra_headers=headers)


def finish(client: OpenAI, video: Video) -> Video:
    """The video once it has ended."""
    return client.videos.poll(video.id, poll_interval_ms=20)


def effective(video: Video) -> dict[str, Any]:
    """Everything that two videos of the same request have in common."""
    return {name: value for name, value in video.model_dump(mode="json").items() if name not in OWN}


def download(client: OpenAI, video: Video, **arguments: Any) -> bytes:
    return client.videos.download_content(video.id, **arguments).read()


def wait_for(client: OpenAI, video: Video, is_so: Callable[[Video], bool], patience_s: float = 30) -> Video:
    """The video as soon as that is so of it."""
    deadline = time.monotonic() + patience_s
    while not is_so(found := client.videos.retrieve(video.id)):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def cancel(client: OpenAI, video: Video) -> Video:
    """What the SDK has no method for."""
    return client.post(f"/videos/{video.id}/cancel", cast_to=Video)


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    """An image file: a red square on white."""
    image = Image.new("RGB", size, (246, 246, 246))
    image.paste((228, 38, 38), (size[0] // 3, size[1] // 3, 2 * size[0] // 3, 2 * size[1] // 3))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def frames_of(mp4: bytes) -> np.ndarray:
    """Frames (f, h, w, 3) as float."""
    with av.open(io.BytesIO(mp4)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(float)


def count_frames(mp4: bytes) -> int:
    return len(frames_of(mp4))
