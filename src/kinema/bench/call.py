"""``kinema bench call``: where the time of one synchronous call goes, from the HTTP request to its answer.

Calls are made one after the other, each with a prompt that is new to the server. A video's manifest says when the
worker had which part of it done, and a clock beside that the rest, so server and client must have the same clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rich.table import Table

from kinema.bench.live import NotMade
from kinema.bench.server import running_server
from kinema.bench.wan.engine import PROMPT
from kinema.bench.wan.start import write_random
from kinema.shell import err, out

_PATIENCE_S = 600.0
_LABELS = {
    "request_s": "HTTP, job and queue, to the worker",
    "begin_s": "to the device",
    "text_s": "text, and the rest before the first step",
    "steps_s": "steps",
    "decode_s": "decode, to the last frame",
    "file_s": "H.264 of the last frames, files",
    "answer_s": "job, answer",
    "whole_s": "request to answer",
}


@dataclass(frozen=True)
class Service:
    """What is called: a running service, or one that is started with a model or an architecture's random weights."""

    url: str | None
    api_key: str | None
    model: str
    architecture: str | None


@dataclass(frozen=True)
class Call:
    """The seconds of a call, in the order of its parts, and the whole."""

    request_s: float
    begin_s: float
    text_s: float
    steps_s: float
    decode_s: float
    file_s: float
    answer_s: float
    whole_s: float

    @classmethod
    def of(cls, sent_at: float, answered_at: float, video: Mapping[str, Any], manifest: Mapping[str, Any]) -> Call:
        """Read a call off the answer and the video's manifest; times in seconds since the epoch.

        The first step is counted as long as the mean of the others, or as all the time before its end where that is
        less; at least two were computed.
        """
        end, stored = video["timings"], manifest["timings"]
        num_steps = manifest["request"]["num_inference_steps"]
        others_s = stored["denoise_s"] - stored["first_step_s"]
        steps_s = min(others_s / (num_steps - 1), stored["first_step_s"]) + others_s
        admitted_at = manifest["made_at"] - stored["total_s"]
        on_device_s = stored["denoise_s"] + stored["decode_s"]
        begin_s = stored["total_s"] - on_device_s - stored["delivery_s"]
        return cls(
            request_s=admitted_at - sent_at,
            begin_s=begin_s,
            text_s=stored["denoise_s"] - steps_s,
            steps_s=steps_s,
            decode_s=stored["decode_s"],
            file_s=end["total_s"] - begin_s - on_device_s,
            answer_s=answered_at - admitted_at - end["total_s"],
            whole_s=answered_at - sent_at,
        )

    @classmethod
    def median_of(cls, calls: Sequence[Call]) -> Call:
        """Each part's own median."""
        return cls(*(median(getattr(call, one.name) for call in calls) for one in fields(cls)))


def measure_call(
    service: Service,
    body: Mapping[str, object],
    num_frames: Sequence[int],
    runs: int,
    output: Path | None,
    *,
    is_json: bool,
) -> None:
    """Call ``runs`` times for each number of frames, after a first call, and print the medians.

    ``body`` has fields of a request; those that are None are left out. Raises KinemaError.
    """
    given = {name: value for name, value in body.items() if value is not None}
    counts: Sequence[int | None] = num_frames or [None]
    with _serving(service) as url, _client(url, service.api_key) as client, err.status("calling"):
        found = {}
        for count in counts:
            asked = given if count is None else given | {"num_frames": count}
            calls = [_call(client, asked, take) for take in range(runs + 1)][1:]
            found["as the model's preset" if count is None else f"{count} frames"] = Call.median_of(calls)
    text = json.dumps({"runs": runs, "body": given, "calls": {name: asdict(call) for name, call in found.items()}})
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    out.print_json(text) if is_json else out.print(_table(found, runs))


@contextmanager
def _serving(service: Service) -> Iterator[str]:
    if service.url is not None:
        yield service.url
        return
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        model = service.model
        if service.architecture is not None:
            with err.status("writing random weights"):
                model = str(write_random(service.architecture, Path(folder) / service.architecture))
        with running_server(None, model) as url:
            yield url


def _client(url: str, api_key: str | None) -> httpx.Client:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=_PATIENCE_S)


def _call(client: httpx.Client, body: Mapping[str, object], take: int) -> Call:
    """Make one call. Raises NotMade."""
    sent = json.dumps({"prompt": f"{PROMPT}, take {take}", **body}).encode()
    try:
        sent_at = time.time()
        answer = client.post("/v1/videos/generations", content=sent, headers={"content-type": "application/json"})
        answered_at = time.time()
        answer.raise_for_status()
        video = answer.json()
        manifest = client.get(f"/v1/videos/{video['id']}/content", params={"variant": "manifest"})
        manifest.raise_for_status()
    except httpx.HTTPStatusError as exc:
        raise NotMade(f"the service answered {exc.response.status_code}: {exc.response.text[:300]}") from exc
    except httpx.HTTPError as exc:
        raise NotMade(f"the service did not answer: {exc}") from exc
    return Call.of(sent_at, answered_at, video, manifest.json())


def _table(found: Mapping[str, Call], runs: int) -> Table:
    caption = f"medians of {runs} calls, one after the other, after a first one"
    table = Table("ms", *found, box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in _LABELS.items():
        cells = [f"{1000 * getattr(call, name):,.1f}" for call in found.values()]
        table.add_row(label, *cells, style="bold" if name == "whole_s" else None)
    return table
