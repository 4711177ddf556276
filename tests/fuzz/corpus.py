"""Valid requests for every call of the API: what mutations begin with."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tests.fuzz.requests import Form, Json, Part, Request
from tests.integration.test_film import film_of

SMALL = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
_EVERY_FIELD = SMALL | {
    "model": "fake",
    "negative_prompt": "blur",
    "fps": 8,
    "guidance_scale": 5.0,
    "flow_shift": 3,
    "seed": 7,
    "preview_every": 1,
    "priority": "high",
    "deadline_s": 60,
    "user": "somebody",
}


@dataclass(frozen=True)
class Known:
    """The ids of a finished video and of a webhook endpoint that the server has."""

    video_id: str
    endpoint_id: str


def requests_for(known: Known) -> Sequence[Request]:
    """Each of them is accepted as it is."""
    video, endpoint = f"/v1/videos/{known.video_id}", f"/v1/webhook_endpoints/{known.endpoint_id}"
    return [
        *_reads(video, endpoint),
        *_submissions(known),
        *_webhook_calls(endpoint),
        Request("POST", f"{video}/cancel"),
    ]


def refused_for(known: Known) -> Sequence[Request]:
    """Valid, and refused: nobody listens where a webhook of the fuzzed server goes."""
    return [
        Request("POST", f"/v1/webhook_endpoints/{known.endpoint_id}/test", body=Json({"event_type": "video.failed"}))
    ]


def removals_for(known: Known) -> Sequence[Request]:
    """What makes the known ids unknown."""
    return [
        Request("DELETE", f"/v1/videos/{known.video_id}"),
        Request("DELETE", f"/v1/webhook_endpoints/{known.endpoint_id}"),
    ]


def _reads(video: str, endpoint: str) -> Sequence[Request]:
    content = f"{video}/content"
    return [
        *[Request("GET", path) for path in ("/live", "/ready", "/health", "/metrics", "/openapi.json", "/docs")],
        *[Request("GET", path) for path in ("/v1/models", "/v1/models/fake", "/v1/webhook_event_types")],
        Request("GET", "/v1/videos", [("limit", "2"), ("order", "asc")]),
        Request("GET", "/v1/videos", [("after", video.rpartition("/")[2]), ("limit", "2")]),
        Request("GET", video, headers=[("x-request-id", b"fuzz-1")]),
        Request("GET", f"{video}/events", [("follow", "false")], [("last-event-id", b"1")]),
        Request("GET", content, headers=[("range", b"bytes=0-99")]),
        Request("HEAD", content),
        *[Request("GET", content, [("variant", name)]) for name in ("thumbnail", "spritesheet", "manifest")],
        Request("GET", "/v1/webhook_endpoints", [("limit", "2")]),
        Request("GET", endpoint),
    ]


def _submissions(known: Known) -> Sequence[Request]:
    picture = "data:image/png;base64," + base64.b64encode(pictures()[0]).decode()
    film = Part("video", films()[0], "film.mp4", "video/mp4")
    ours = {"id": known.video_id}
    small_form = [Part(name, str(value).encode()) for name, value in SMALL.items()]
    return [
        Request("POST", "/v1/videos", body=Json(_EVERY_FIELD), headers=[("idempotency-key", b"fuzz-key")]),
        Request("POST", "/v1/videos", body=Json(SMALL), headers=[("x-stainless-retry-count", b"1")]),
        Request("POST", "/v1/videos", body=Json(SMALL | {"input_reference": {"image_url": picture}})),
        Request("POST", "/v1/videos", body=Json(SMALL | {"input_reference": picture, "last_frame": picture})),
        Request("POST", "/v1/videos", body=Json(SMALL | {"input_reference": [picture, picture]})),
        Request("POST", "/v1/videos", body=Json({"prompt": "a cat", "extra_body": SMALL})),
        *[Request("POST", "/v1/videos", body=_form(small_form, picture)) for picture in pictures()],
        Request("POST", "/v1/videos/estimate", body=Json(_EVERY_FIELD)),
        Request("POST", "/v1/videos/generations", body=Json(SMALL | {"nvext": {"seed": 7, "annotations": ["a"]}})),
        Request("POST", "/v1/videos/generations", body=Json(SMALL | {"stream": True})),
        Request("POST", "/v1/videos/generations", body=Json(SMALL | {"response_format": "b64_json"})),
        Request("POST", f"/v1/videos/{known.video_id}/remix", body=Json({"prompt": "a blue circle"})),
        Request("POST", "/v1/videos/extensions", body=Json({"prompt": "on", "seconds": 0.5, "video": ours})),
        Request("POST", "/v1/videos/edits", body=Json({"prompt": "a cat", "strength": 0.5, "video": ours})),
        Request("POST", "/v1/videos/edits", body=Form([Part("prompt", b"a cat"), Part("strength", b"0.5"), film])),
        Request("POST", "/v1/videos/extensions", body=Form([Part("prompt", b"on"), Part("seconds", b"0.5"), film])),
    ]


def _webhook_calls(endpoint: str) -> Sequence[Request]:
    made = {"name": "fuzz", "url": "http://fuzz.invalid/hook", "event_types": ["video.completed"]}
    return [
        Request("POST", "/v1/webhook_endpoints", body=Json(made)),
        Request("POST", endpoint, body=Json(made | {"name": "other"})),
        Request("POST", f"{endpoint}/rotate_secret", body=Json({"keep_old_secret_active_for_24_hours": True})),
        Request("POST", f"{endpoint}/rotate_secret"),
    ]


def _form(parts: Sequence[Part], picture: bytes) -> Form:
    return Form([*parts, Part("input_reference", picture, "first.png", "image/png")])


@cache
def pictures() -> Sequence[bytes]:
    """A small picture in each format that is accepted, also with a palette, an alpha channel and EXIF."""
    picture = Image.effect_noise((64, 48), 40).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (picture, {"format": "PNG"}),
        (picture.convert("P"), {"format": "PNG", "transparency": 0}),
        (picture, {"format": "JPEG", "exif": exif, "progressive": True}),
        (picture.convert("RGBA"), {"format": "WEBP", "lossless": True}),
    ]
    return [_saved(image, **options) for image, options in kinds]


def _saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@cache
def films() -> Sequence[bytes]:
    """A short film in each container that is accepted."""
    frames = np.random.default_rng(7).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    return [film_of(frames), film_of(frames, kind="mov"), film_of(frames, kind="webm", codec="libvpx-vp9")]
