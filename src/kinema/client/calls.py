"""The part that both clients share: which request a call sends, when it is sent again, and what its answer means.

No I/O happens here; the clients send, sleep and write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError

from kinema.client.errors import UnexpectedAnswer, WaitedTooLong, api_error, connection_failed
from kinema.client.models import Deletions, Estimate, Manifest, UsagePage, Video, VideoPage, VideoRowPage
from kinema.client.submission import VideoRef, encode, id_of
from kinema.errors import ConfigError
from kinema.masking import masked

DEFAULT_URL = "http://127.0.0.1:8000"
# The longest silence: the server answers at once, and sends a comment every 15 s when there is no event.
TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_PATIENT = httpx.Timeout(None, connect=5.0)
# With these statuses the server has done nothing, and the same request may work later.
_RETRIED = {429, 502, 503, 504}
# With these errors no part of the request has reached the server.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LONGEST_PAUSE_S = 5.0
# If the server asks for a longer pause, the caller decides.
_LONGEST_RETRY_AFTER_S = 60.0
_DEFAULT_POLL_S = 1.0
# The server takes no more with one call.
_MAX_IDS = 100

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Outcome = httpx.Response | httpx.RequestError


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read. ``content`` has httpx's arguments for the body, and others.

    ``is_repeatable`` tells whether the request may be sent again when nobody knows whether the server has seen it.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    is_repeatable: bool = True

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx's ``stream``."""
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "headers": self.headers,
            **self.content,
        }

    def result(self, outcome: Outcome, url: str) -> T:
        """Read the answer. Raises ClientError when there is none, or when it is an error."""
        if isinstance(outcome, httpx.RequestError):
            raise connection_failed(outcome, url) from outcome
        if not outcome.is_success:
            raise api_error(outcome)
        return self.read(outcome)


@dataclass
class Retries:
    """Decides how often something is tried again, and after which pause."""

    max_retries: int
    backoff_s: float
    count: int = 0

    def pause_after(self, outcome: Outcome, *, is_repeatable: bool = True) -> float | None:
        """Return the seconds until the next try; None when there is no other try."""
        pause_s = self._pause_s(outcome, is_repeatable)
        if pause_s is None or self.count >= self.max_retries:
            return None
        self.count += 1
        return pause_s

    def _pause_s(self, outcome: Outcome, is_repeatable: bool) -> float | None:
        pause_s = min(self.backoff_s * 2.0**self.count, _LONGEST_PAUSE_S)
        if isinstance(outcome, httpx.RequestError):
            is_tried = isinstance(outcome, httpx.TransportError) and is_repeatable
            return pause_s if is_tried or isinstance(outcome, _NEVER_SENT) else None
        if outcome.status_code not in _RETRIED or outcome.headers.get("x-should-retry") == "false":
            return None
        asked_s = _seconds(outcome.headers.get("retry-after"))
        if asked_s is None:
            return pause_s
        return asked_s if asked_s <= _LONGEST_RETRY_AFTER_S else None


class Patience:
    """Decides when ``wait`` looks again, and when it gives up."""

    def __init__(self, timeout_s: float | None) -> None:
        self._until = None if timeout_s is None else time.monotonic() + timeout_s

    def pause_s(self, video: Video, poll_s: float) -> float:
        """Return the seconds until the next look. Raises WaitedTooLong."""
        if self._until is None:
            return poll_s
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise WaitedTooLong(f"{video.id} is still {video.status} ({video.progress}%) and goes on; wait again")
        return min(poll_s, left_s)


def root_of(base_url: str) -> str:
    """Return the address of the server without a ``/v1`` at its end. Raises ConfigError."""
    root = base_url.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(root)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"{masked(base_url)!r} is not the address of a server; give for instance {DEFAULT_URL}")
    return root


def headers_for(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request. Raises ConfigError for a key that no header can carry."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("the API key has characters that no header can carry; ASCII letters, digits and signs can be")
    return {"authorization": f"Bearer {api_key}"}


def submission(path: str, fields: Mapping[str, Any], idempotency_key: str | None) -> Call[Video]:
    """Ask for a new video. The key makes sure that sending this again gives the same video."""
    headers = {"idempotency-key": idempotency_key or uuid4().hex}
    return Call("POST", path, _video, headers=headers, content=encode(fields))


def estimation(fields: Mapping[str, Any]) -> Call[Estimate]:
    return Call("POST", "/v1/videos/estimate", lambda response: _parsed(Estimate, response), content=encode(fields))


def retrieval(video: VideoRef) -> Call[Video]:
    return Call("GET", f"/v1/videos/{id_of(video)}", _video)


def poll(video: VideoRef) -> Call[tuple[Video, float]]:
    """Ask for the video, and for the seconds after which the server suggests to look again."""

    def read(response: httpx.Response) -> tuple[Video, float]:
        asked = _seconds(response.headers.get("openai-poll-after-ms"))
        return _video(response), _DEFAULT_POLL_S if asked is None else asked / 1000

    return Call("GET", f"/v1/videos/{id_of(video)}", read)


class Looked(TypedDict, total=False):
    """Which videos a list has, in which order (by default the newest first), and how many come with each call.

    ``status``: queued, in_progress, completed, failed or cancelled, or several. ``prompt``: a text in the prompt.
    """

    status: str | Sequence[str]
    model: str
    prompt: str
    starred: bool
    order: Literal["asc", "desc"]
    page_size: int


def listing(after: str | None, looked: Looked) -> Call[VideoPage]:
    return Call("GET", "/v1/videos", _page, params=_listed(after, looked))


def row_listing(after: str | None, looked: Looked) -> Call[VideoRowPage]:
    params = {**_listed(after, looked), "fields": "slim"}
    return Call("GET", "/v1/videos", lambda answer: _parsed(VideoRowPage, answer), params=params)


def _listed(after: str | None, looked: Looked) -> dict[str, str | int]:
    params: dict[str, str | int] = {
        "limit": looked.get("page_size", _MAX_IDS),
        "order": looked.get("order", "desc"),
    }
    if status := looked.get("status"):
        params["status"] = status if isinstance(status, str) else ",".join(status)
    if model := looked.get("model"):
        params["model"] = model
    if prompt := looked.get("prompt"):
        params["prompt"] = prompt
    if "starred" in looked:
        params["starred"] = "true" if looked["starred"] else "false"
    return params | ({} if after is None else {"after": after})


def retrieval_of(videos: Sequence[str]) -> Call[VideoPage]:
    return Call("GET", "/v1/videos", _page, params={"ids": ",".join(videos)})


def deletion_of(videos: Sequence[str]) -> Call[Deletions]:
    """Ask for deletions. They are not repeatable: the second answer would be that there are no such videos."""
    ids = {"ids": ",".join(videos)}
    return Call("DELETE", "/v1/videos", lambda answer: _parsed(Deletions, answer), params=ids, is_repeatable=False)


def pages_of(videos: Iterable[VideoRef]) -> Iterator[Sequence[str]]:
    """The ids of these videos, each once, as many at a time as the server takes."""
    ids = list(dict.fromkeys(map(id_of, videos)))
    for start in range(0, len(ids), _MAX_IDS):
        yield ids[start : start + _MAX_IDS]


def usage(first: date | None, last: date | None) -> Call[UsagePage]:
    days = {name: day.isoformat() for name, day in (("from", first), ("to", last)) if day is not None}
    return Call("GET", "/v1/usage", lambda response: _parsed(UsagePage, response), params=days)


def cancellation(video: VideoRef) -> Call[Video]:
    return Call("POST", f"/v1/videos/{id_of(video)}/cancel", _video)


def starring(video: VideoRef, *, is_starred: bool) -> Call[Video]:
    return Call("POST" if is_starred else "DELETE", f"/v1/videos/{id_of(video)}/star", _video)


def deletion(video: VideoRef) -> Call[None]:
    """Ask for a deletion. It is not repeatable: the second answer would be that there is no such video."""
    return Call("DELETE", f"/v1/videos/{id_of(video)}", lambda _response: None, is_repeatable=False)


def download(video: VideoRef, variant: str) -> Call[httpx.Response]:
    return Call("GET", f"/v1/videos/{id_of(video)}/content", lambda response: response, params={"variant": variant})


def live(video: VideoRef) -> Call[httpx.Response]:
    """Ask for the video while it is made. The answer begins when its first frame is there, however long that takes."""
    call = download(video, "live")
    return replace(call, content={"timeout": _PATIENT})


def manifest(video: VideoRef) -> Call[Manifest]:
    path = f"/v1/videos/{id_of(video)}/content"
    return Call("GET", path, lambda response: _parsed(Manifest, response), params={"variant": "manifest"})


def _video(response: httpx.Response) -> Video:
    return _parsed(Video, response)


def _page(response: httpx.Response) -> VideoPage:
    return _parsed(VideoPage, response)


def _parsed(model: type[M], response: httpx.Response) -> M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as exc:
        raise UnexpectedAnswer(
            f"the answer of {masked(str(response.url))} does not come from a Kinema server; is the address right?"
        ) from exc


def _seconds(text: str | None) -> float | None:
    """Return the whole number in a header; None for anything else, for example an HTTP date."""
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None
