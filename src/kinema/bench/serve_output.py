"""What ``kinema bench serve`` prints: a table with a row for each class and policy, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.table import Table

from kinema.bench.report import ClassReport, Measured
from kinema.shell import out


def show(found: Mapping[str, Measured], *, slo: float, load: float, seed: int, is_json: bool) -> None:
    """Print what was measured, by policy."""
    if is_json:
        policies = {name: asdict(measured) for name, measured in found.items()}
        out.print_json(json.dumps({"slo": slo, "load": load, "seed": seed, "policies": policies}))
        return
    out.print(_table(found))
    for name, measured in found.items():
        out.print(_sentence(name, measured))
    out.print(f"[dim]x: times as slow as alone; in time: at most {slo:g} x; ETA: error of the first one[/]")


def _table(found: Mapping[str, Measured]) -> Table:
    headers = ("", "videos", "p50 s", "p95 s", "p99 s", "x p50", "x p95", "in time", "ETA p50", "p90")
    # Narrow gaps, so that it fits into 80 columns.
    table = Table(*headers, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, measured in found.items():
        for kind, report in measured.report.classes.items():
            table.add_row(f"{kind}, {name}", *_cells(report))
    return table


def _sentence(name: str, measured: Measured) -> str:
    whole = measured.report
    sentence = f"{name}: {whole.per_hour:,.1f} videos an hour, all of them in {whole.elapsed_s:,.1f} s"
    if measured.behind is not None:
        sentence += f"; a short video behind a long one takes {measured.behind:.2f} times as long as alone"
    if whole.eta_error_p50 is not None and whole.eta_error_p90 is not None:
        sentence += f"; ETA error of all p50 {100 * whole.eta_error_p50:.0f} %, p90 {100 * whole.eta_error_p90:.0f} %"
    return sentence


def _cells(report: ClassReport) -> list[str]:
    latencies = [f"{seconds:.1f}" for seconds in (report.p50_s, report.p95_s, report.p99_s)]
    errors = ["" if error is None else f"{100 * error:.0f} %" for error in (report.eta_error_p50, report.eta_error_p90)]
    slowdowns = [f"{report.slowdown_p50:.2f}", f"{report.slowdown_p95:.2f}"]
    count = f"{report.count}, {report.lost} lost" if report.lost else str(report.count)
    return [count, *latencies, *slowdowns, f"{100 * report.slo:.0f} %", *errors]
