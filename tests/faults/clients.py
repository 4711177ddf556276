"""Clients that know all frontends: what one does not answer, they ask of the next."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.faults.ledger import TERMINAL
from tests.faults.processes import PATIENCE_S

Body = dict[str, Any]
# What a frontend may say while a part of the service is away; anything else is a failure of the test.
_TRY_AGAIN = (429, 503)
_PAUSE_S = 0.1


class Clients:
    """``urls`` may change while frontends are replaced."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.accepted: dict[str, Body] = {}
        self._turn = itertools.count()
        self._http = httpx.Client(timeout=10)

    def close(self) -> None:
        self._http.close()

    def create(self, body: Body) -> str:
        """The id of the video, which is accepted now. One idempotency key for all tries, so that none is made twice."""
        answer = self._ask("POST", "/v1/videos", json=body, headers={"Idempotency-Key": uuid4().hex})
        video_id: str = answer.json()["id"]
        self.accepted[video_id] = body
        return video_id

    def video(self, video_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", f"/v1/videos/{video_id}").json()
        return found

    def content(self, video_id: str) -> bytes:
        return self._ask("GET", f"/v1/videos/{video_id}/content").content

    def wait(self, video_ids: Sequence[str]) -> None:
        """Return when all have ended; fails when one did not complete."""
        deadline = time.monotonic() + PATIENCE_S
        for video_id in video_ids:
            while (video := self.video(video_id))["status"] in ("queued", "in_progress"):
                if time.monotonic() > deadline:
                    pytest.fail(f"{video_id} is not made in {PATIENCE_S:.0f} s: {video}")
                time.sleep(_PAUSE_S)
            assert video["status"] == "completed", video

    def follow(self, video_id: str, first_at: str) -> list[int]:
        """The numbers of all its events, as a client that goes on at the next frontend when one breaks off."""
        numbers: list[int] = []
        deadline = time.monotonic() + PATIENCE_S
        for url in itertools.chain([first_at], itertools.cycle(self.urls)):
            try:
                if self._follow_at(f"{url}/v1/videos/{video_id}/events", numbers):
                    return numbers
            except httpx.TransportError:
                time.sleep(_PAUSE_S)
            if time.monotonic() > deadline:
                break
        pytest.fail(f"{video_id} has no end after {PATIENCE_S:.0f} s, but the events {numbers}")

    def _follow_at(self, url: str, numbers: list[int]) -> bool:
        """Add what comes after the last of these numbers; whether that was the end."""
        with self._http.stream("GET", url, headers={"Last-Event-ID": str(numbers[-1] if numbers else 0)}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    numbers.append(int(value))
                if name == "event" and value in TERMINAL:
                    return True
        return False

    @contextmanager
    def streaming(self, bodies: Sequence[Body], every_s: float) -> Iterator[None]:
        """Accept one of these after the other meanwhile. Raises at the end what a client could not get over."""
        is_over = threading.Event()

        def stream() -> None:
            for body in itertools.cycle(bodies):
                self.create(body)
                if is_over.wait(every_s):
                    return

        with ThreadPoolExecutor(1) as threads:
            streaming: Future[None] = threads.submit(stream)
            try:
                yield
            finally:
                is_over.set()
            streaming.result()

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer of the first frontend that has one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            urls = self.urls  # may be others in a moment
            url = urls[next(self._turn) % len(urls)]
            try:
                answer = self._http.request(method, url + path, **options)
            except httpx.TransportError as exc:
                trouble = f"{type(exc).__name__}: {exc}"
            else:
                if answer.status_code not in _TRY_AGAIN:
                    return answer.raise_for_status()
                trouble = answer.text
            if time.monotonic() > deadline:
                pytest.fail(f"{method} {path} was not answered in {PATIENCE_S:.0f} s, at last: {trouble}")
            time.sleep(_PAUSE_S)
