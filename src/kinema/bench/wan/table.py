"""The reports of ``kinema bench engine`` as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kinema.bench.wan.ablation import Ablation
from kinema.bench.wan.breakdown import Against, Report, Stage
from kinema.bench.wan.loras import LoraTimes
from kinema.bench.wan.parallel import ParallelReport
from kinema.bench.wan.subject import Subject

_GIB = 2**30
_BAR_WIDTH = 10
# The stages that add up to the whole video.
_ADDENDS = ("text", "denoise", "decode", "encode", "store", "rest")
# The others: each is a part of one of these, or runs beside it.
_BESIDE = ("step", "convert", "encoding")


def render(report: Report | ParallelReport, subject: Subject) -> Iterator[RenderableType]:
    """The parts of the report, from top to bottom."""
    if isinstance(report, ParallelReport):
        yield from (
            _title(report, subject, f"{report.gpus} x {report.device}, {report.parallel}"),
            _modes(report),
            "",
            _runs(subject),
        )
        return
    yield from (_title(report, subject, report.device), _stages(report, subject), "", _device(report), "")
    if report.against is not None:
        yield from (_against(report.against, report.against_careful), "")
    if report.loras is not None:
        yield from (_loras(report.loras, report.stages["step"].ms), "")
    if report.ablations:
        yield from (_ablations(report.ablations), "")
    yield _notes(report, subject)


def _title(report: Report | ParallelReport, subject: Subject, device: str) -> Text:
    request = subject.request
    weights = ", random weights" if subject.is_random else ""
    versions = ", ".join(f"{name} {report.versions[name]}" for name in ("torch", "cudnn") if name in report.versions)
    title = Text(f"{request.model}{weights}", style="bold")
    title.append(
        f"  {request.size}, {request.num_frames} frames, {request.num_inference_steps} steps, guidance "
        f"{request.guidance_scale:g}\n",
        style="not bold",
    )
    kernels = [report.dtype]
    if report.linears is not None:
        kernels.append(f"linears {report.linears}")
    if report.weights_dtype is not None:
        kernels.append(f"weights {report.weights_dtype}")
    if isinstance(report, Report):
        kernels.append(f"decode in {report.decode_dtype}")
    kernels.append(f"attention {report.attention}")
    if isinstance(report, Report) and report.step_cache:
        kernels.append("step cache")
    return title.append(f"{device}; {versions}; {', '.join(kernels)}\n", style="not bold dim")


def _modes(report: ParallelReport) -> Table:
    """A step of one video in each mode of sharing it."""
    table = _table("a step", "ms", "faster by", "difference")
    first = report.modes[0]
    for one in report.modes:
        table.add_row(
            "one GPU" if one.mode == "single" else one.mode,
            _number(1000 * one.step_s),
            f"{first.step_s / one.step_s:.2f} x",
            "none" if one.difference == 0 else f"{one.difference:.1e}",
        )
    return table


def _stages(report: Report, subject: Subject) -> Table:
    table = _table("", "ms", "TFLOP", "TFLOP/s", "of floor", "of the whole")
    table.columns[-1].justify = "left"
    is_extrapolated = subject.steps_not_run > 0
    count = f"{subject.request.num_inference_steps} steps"
    names = {
        "text": "text",
        "step": "  a step, guided" if subject.is_guided else "  a step",
        "denoise": f"denoise, {count}" + (" *" if is_extrapolated else ""),
        "decode": "decode, to the host",
        "convert": "  to planes, alone",
        "encoding": "  H.264, beside it",
        "encode": "H.264, last frames",
        "store": "store",
        "rest": "rest",
        "video": "whole video" + (" *" if is_extrapolated else ""),
    }
    whole = report.stages.get("video")
    for key, stage in report.stages.items():
        if key == "video":
            _add_footer(table, names[key], *_cells(stage))
            continue
        share = _bar(stage.ms / whole.ms) if whole is not None and key in _ADDENDS else Text()
        table.add_row(names[key], *_cells(stage), share, style="dim" if key in _BESIDE else None)
    return table


def _add_footer(table: Table, *cells: str) -> None:
    table.show_footer = True
    for column, cell in zip(table.columns, cells, strict=False):
        column.footer = Text(cell, style="bold")


def _cells(stage: Stage) -> list[str]:
    if stage.tflop is None or stage.tflops is None or stage.of_floor is None:
        return [_number(stage.ms), "", "", ""]
    return [_number(stage.ms), _number(stage.tflop), _number(stage.tflops), f"{100 * stage.of_floor:.0f} %"]


def _device(report: Report) -> Table:
    best, table = report.ceilings, Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_row("floor", f"{_number(best.products / 1e12)} TFLOP/s, product of {best.side}x{best.side} matrices")
    attention = f"attention over {best.num_tokens:,} tokens ({best.kernel}); both in this run"
    table.add_row("", f"{_number(best.attention / 1e12)} TFLOP/s, {attention}")
    if report.peak_bytes is not None:
        table.add_row("memory", f"{report.peak_bytes / _GIB:.1f} GiB of the device at most")
    first = "" if report.first_video_s is None else f", {report.first_video_s:.2f} s for a first video of two steps"
    table.add_row("cold start", f"{report.load_s:.1f} s to load{first}")
    return table


def _against(published: Against, careful: Against | None) -> Table:
    """diffusers' pipeline as published and, beside it, as a careful user sets it up."""
    table = _table("diffusers, same weights", "published, ms", "by ours", "tuned, ms", "by ours")
    both = [published] if careful is None else [published, careful]
    names = {"step": "a step", "decode": "decode", "video": "prompt to frames, no file"}
    for key, name in names.items():
        table.add_row(name, *(cell for one in both for cell in _against_cells(one, key)))
    if published.peak_bytes is not None:
        sizes = [f"{one.peak_bytes / _GIB:.1f} GiB" for one in both if one.peak_bytes is not None]
        table.add_row("memory", *(cell for size in sizes for cell in (size, "")))
    if careful is not None:
        setup = ", ".join(f"{part} {how}" for part, how in careful.setup.items())
        table.caption, table.caption_justify = f"tuned: {setup}", "left"
    return table


def _against_cells(against: Against, stage: str) -> tuple[str, Text]:
    ms = {"step": against.step_ms, "decode": against.decode_ms, "video": against.video_ms}
    ratio = against.ratios.get(stage)
    return _number(ms[stage]), Text("" if ratio is None else f"{ratio:.2f} x", style="bold")


def _loras(loras: LoraTimes, plain_ms: float) -> Table:
    table = _table(f"with a LoRA of rank {loras.rank}", "ms", "of a step without")
    table.add_row("a step", _number(loras.step_ms), Text(f"{loras.ratio:.3f} x", style="bold"))
    share = loras.turn_ms / plain_ms
    table.add_row("more after another video's step", _number(loras.turn_ms), f"{100 * share:.1f} %")
    return table


def _ablations(ablations: list[Ablation]) -> Table:
    table = _table("a step with", "ms", "more ms", "longer by", "")
    table.columns[-1].justify = "left"
    for index, one in enumerate(ablations):
        if index == 0:
            table.add_row(one.base, _number(1000 * one.base_s), "", "", "")
        more = one.step_s - one.base_s
        share = more / one.base_s
        is_last = index == len(ablations) - 1
        table.add_row(
            one.name,
            _number(1000 * one.step_s),
            f"{1000 * more:+,.2f}",
            f"{100 * share:.1f} %",
            _bar(share, has_number=False),
            style="bold" if is_last else None,
        )
    return table


def _notes(report: Report, subject: Subject) -> Text:
    notes = [f"{_count_runs(subject)}, after a first one"]
    if subject.steps_not_run:
        notes.append(
            f"* {subject.measured_steps} of {subject.request.num_inference_steps} steps were run; the others are "
            "counted as long as these"
        )
    bases = dict.fromkeys(one.base for one in report.ablations)
    if len(bases) > 1:
        notes.append(f"{report.ablations[0].name!r} is compared with {report.ablations[0].base!r}, the others with it")
    return Text("\n".join(notes), style="dim")


def _runs(subject: Subject) -> Text:
    text = f"{_count_runs(subject)} of {subject.measured_steps} steps, of which the first does not count"
    return Text(text, style="dim")


def _count_runs(subject: Subject) -> str:
    return f"medians of {subject.runs} runs" if subject.runs > 1 else "one run"


def _table(*headers: str) -> Table:
    table = Table(*headers, box=box.SIMPLE, show_edge=False, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


def _bar(share: float, *, has_number: bool = True) -> Text:
    """A share of 1 as a row of blocks, drawn to an eighth of a block."""
    eighths = round(8 * _BAR_WIDTH * min(max(share, 0.0), 1.0))
    blocks = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    bar = Text(blocks.ljust(_BAR_WIDTH), style="cyan")
    return bar.append(f" {100 * share:.0f} %", style="default") if has_number else bar


def _number(value: float) -> str:
    """The value with three digits, or with all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def as_json(report: Report | ParallelReport, subject: Subject) -> Mapping[str, object]:
    """The report as data: first what was asked for, then what was measured."""
    request = subject.request
    return {
        "model": request.model,
        "weights": "random" if subject.is_random else "checkpoint",
        "size": str(request.size),
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "measured_steps": subject.measured_steps,
        "guidance_scale": request.guidance_scale,
        "runs": subject.runs,
        **asdict(report),
    }
