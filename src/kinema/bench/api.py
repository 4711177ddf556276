"""``kinema bench api``: how much the service itself costs, whatever the model.

The fake engine makes the smallest possible video at once, so the figures are those of HTTP, the queue, the database and
the storage: of one server process, with its load on the same machine.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

from rich.table import Table

from kinema.bench.load import Answer, Load, Pace
from kinema.bench.server import running_server
from kinema.shell import err, out

_POLLED_AT_ONCE = 200
_BODY = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 1, "num_inference_steps": 1}


@dataclass(frozen=True)
class CallPlan:
    """How many requests a run sends, over how many connections."""

    submissions: int
    polls: int
    calls: int
    concurrency: int
    api_key: str | None


@dataclass(frozen=True)
class CallReport:
    """How fast the calls were answered. ``submit`` is POST /v1/videos, ``poll`` GET /v1/videos/{id}, ``call`` the
    synchronous POST /v1/videos/generations, one after the other; ``overhead_p50_ms`` is a call's time without the
    making of its video."""

    submit: Pace
    poll: Pace
    call: Pace
    overhead_p50_ms: float

    @classmethod
    def median_of(cls, reports: Sequence[CallReport]) -> CallReport:
        """Each figure's own median over several runs."""
        return cls(
            submit=Pace.median_of([report.submit for report in reports]),
            poll=Pace.median_of([report.poll for report in reports]),
            call=Pace.median_of([report.call for report in reports]),
            overhead_p50_ms=median(report.overhead_p50_ms for report in reports),
        )


def measure_api(plan: CallPlan, url: str | None, database: str | None, runs: int, *, is_json: bool) -> None:
    """Measure ``runs`` times, at this address or a service of its own, and print the medians. Raises ServiceError."""
    with _service(url, database) as address:
        report = CallReport.median_of([_run_once(address, plan, number, runs) for number in range(1, runs + 1)])
    _show(report, plan, runs, is_json=is_json)


@contextmanager
def _service(url: str | None, database: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with running_server(database) as address:
        yield address


def _run_once(url: str, plan: CallPlan, number: int, of: int) -> CallReport:
    with err.status(f"run {number} of {of}"):
        # The server's own loop: what the load costs the machine is taken from the server.
        loop = None if sys.platform == "win32" else importlib.import_module("uvloop").new_event_loop
        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(measure(url, plan))


async def measure(url: str, plan: CallPlan) -> CallReport:
    """One run. Raises ServerGone."""
    load, alone = Load(url, plan.concurrency, plan.api_key), Load(url, 1, plan.api_key)
    body = json.dumps(_BODY).encode()
    submit, answers = await load.run([load.post("/v1/videos", body)] * plan.submissions)
    # The queue is empty again when a synchronous call is answered, which stood at its end.
    await alone.run([alone.post("/v1/videos/generations", body)] * 2)
    ids = [json.loads(answer.body)["id"] for answer in answers[:_POLLED_AT_ONCE]]
    paths = [f"/v1/videos/{ids[number % len(ids)]}" for number in range(plan.polls)]
    poll, _ = await load.run([load.get(path) for path in paths])
    call, answers = await alone.run([alone.post("/v1/videos/generations", body)] * plan.calls)
    return CallReport(submit, poll, call, call.p50_ms - _inference_p50_ms(answers))


def _inference_p50_ms(answers: Sequence[Answer]) -> float:
    return 1000 * median(float(json.loads(answer.body)["inference_time_s"]) for answer in answers)


def _show(report: CallReport, plan: CallPlan, runs: int, *, is_json: bool) -> None:
    if is_json:
        out.print_json(json.dumps({"runs": runs, "concurrency": plan.concurrency, **asdict(report)}))
        return
    table = Table("", "a second", "p50 ms", "p99 ms", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"submissions": report.submit, "polls": report.poll, "synchronous calls": report.call}
    for name, pace in names.items():
        table.add_row(name, f"{pace.per_s:,.0f}", f"{pace.p50_ms:.1f}", f"{pace.p99_ms:.1f}")
    out.print(table)
    out.print(f"\nHTTP and the job cost {report.overhead_p50_ms:.1f} ms of a synchronous call (p50)")
    out.print(f"[dim]medians of {runs} runs; {plan.concurrency} connections, for synchronous calls one[/]")
