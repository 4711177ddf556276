"""What the pages name is there: commands, links, the keys of ``kinema.json``, the statuses of a video."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from kinema.bench.plots import draw_memory, draw_store, limit_of
from kinema.bench.recorded import REPORTS
from kinema.cli.app import app
from kinema.engines.diffusers.model_folder import _Geometry
from kinema.engines.wan.checkpoint import BUNDLED, read_configs
from kinema.engines.wan.presets import (
    _WAN_21,
    _WAN_21_FIRST_LAST,
    _WAN_21_IMAGE,
    _WAN_21_IMAGE_720P,
    _WAN_22_A14B,
    _WAN_22_A14B_IMAGE,
    _WAN_22_TI2V,
    LIMIT_KEYS,
)
from kinema.errors import NoWorker
from kinema.request.capabilities import Limits, Preset
from kinema.server.errors import response_for
from kinema.server.routes import _starting
from kinema.server.schemas import WireStatus
from kinema.settings import Settings
from kinema.worker.startup import Loading

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/*/*.md"), *ROOT.glob("src/**/*.md")]
}
MODELS = PAGES["docs/models.md"]


def commands() -> Iterator[tuple[str, str]]:
    """Every line after the word kinema in the code blocks of a page, and the page."""
    for page, text in PAGES.items():
        for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ")
            for line in re.findall(r"^(?:\w+=\S+ +)*(?:\.venv/bin/)?kinema (\S.*)$", lines, re.MULTILINE):
                yield page, line


@cache
def kinema_command() -> Any:
    """All commands with their options, which take a tenth of a second to make."""
    return typer.main.get_command(app)


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_every_command_of_the_pages_is_one_that_kinema_takes(page: str, line: str) -> None:
    """Parsed as the command would, without running it."""
    words = shlex.split(line, comments=True)
    command = kinema_command()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"{page}: {words[0]} is no command"
    command.make_context(command.name, words)


def test_every_command_of_the_training_has_its_options() -> None:
    """`.venv/bin/python -m training.tiny.NAME`: the file is there and has each option, without importing torch."""
    text = PAGES["training/tiny/README.md"]
    assert "\npython" not in text
    lines = re.findall(r"^\.venv/bin/python -m training\.tiny\.(\w+) (.*)$", text, re.MULTILINE)
    assert {name for name, _ in lines} == {
        "vae",
        "denoiser",
        "image_to_video",
        "export",
        "evaluate",
        "contact_sheet",
        "style",
        "distill",
        "lora",
    }
    for name, options in lines:
        files = {"image_to_video": "denoiser", "style": "denoiser"}  # which has the options of all three
        source = (ROOT / f"training/tiny/{files.get(name, name)}.py").read_text(encoding="utf-8")
        shared = (ROOT / "training/tiny/ranks.py").read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source + shared, f"{name} {option}"


def test_each_kind_of_command_stands_on_the_pages() -> None:
    """Or the parsing above has missed them."""
    assert {"serve", "frontend", "worker", "generate", "jobs", "bench"} <= {line.split()[0] for _, line in commands()}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    """Of this repository; other sites are not asked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        name, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_python_file_that_a_page_names_exists(page: str) -> None:
    """In the package, beside the wan engine's files, or from the root; programs that the page shows are its own."""
    folders = [ROOT, ROOT / "src/kinema", ROOT / "src/kinema/engines/wan"]
    for name in set(re.findall(r"`([\w/]+\.py)`", PAGES[page])) - {"receiver.py"}:
        assert any((folder / name).is_file() for folder in folders), name


def test_the_reference_of_kinema_json_has_every_key() -> None:
    """And no other; the defaults of the limits are the real ones."""
    keys = re.findall(r"^\| `(\w+)` \| (?:text|whole number|number|\"area\"|`\"area\")", MODELS, re.MULTILINE)
    assert sorted(keys) == sorted([*Preset.model_fields, *LIMIT_KEYS, *_Geometry.model_fields])
    limits = replace(read_configs("tiny", BUNDLED["tiny-wan"]), overrides={}).capabilities().limits
    told = dict(re.findall(r"^\| `(\w+)` \| whole number \|[^|]*\| ([\d,]+)", MODELS, re.MULTILINE))
    assert told.keys() >= {"max_pixels", "max_frames", "max_steps", "min_side"}
    for key, value in told.items():
        assert getattr(limits, key) == int(value.replace(",", "")), key
    assert Limits.model_fields.keys() >= set(LIMIT_KEYS)


def test_the_example_of_kinema_json_is_accepted() -> None:
    """Its values are what the model then has."""
    (block,) = re.findall(r"^```json\n(.*?)^```$", MODELS, re.DOTALL | re.MULTILINE)
    example = json.loads(block)
    can = replace(read_configs("tiny", BUNDLED["tiny-wan"]), overrides=example).capabilities()
    assert (can.description, str(can.preset.size)) == (example["description"], example["size"])
    assert (can.preset.num_frames, can.limits.max_frames) == (example["num_frames"], example["max_frames"])


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Wan 2.1 T2V 1.3B, 14B", _WAN_21),
        ("Wan 2.1 I2V 14B 480P", _WAN_21_IMAGE),
        ("Wan 2.1 I2V 14B 720P", _WAN_21_IMAGE_720P),
        ("Wan 2.1 FLF2V 14B 720P", _WAN_21_FIRST_LAST),
        ("Wan 2.2 T2V A14B", _WAN_22_A14B),
        ("Wan 2.2 I2V A14B", _WAN_22_A14B_IMAGE),
        ("Wan 2.2 TI2V 5B", _WAN_22_TI2V),
    ],
)
def test_the_defaults_of_the_published_models_are_told(name: str, preset: Preset) -> None:
    """As a row of the table."""
    guidance = f"{preset.guidance_scale}"
    if preset.guidance_scale_2 is not None:
        guidance += f", second expert {preset.guidance_scale_2}"
    cells = [name, preset.size, preset.num_frames, preset.fps, preset.num_inference_steps, guidance, preset.flow_shift]
    assert f"| {' | '.join(map(str, cells))} |" in MODELS


def test_every_status_is_explained_and_drawn() -> None:
    """The table and the drawing of docs/api.md have the four words, and no other."""
    api = PAGES["docs/api.md"]
    statuses = {status.value for status in WireStatus}
    assert set(re.findall(r"^\| `(\w+)` \| [A-Z]", api, re.MULTILINE)) == statuses
    (drawing,) = re.findall(r"^```mermaid\n(.*?)^```$", api, re.DOTALL | re.MULTILINE)
    arrows = re.findall(r"(\S+) --> ([^\s:]+)", drawing)
    assert {end for arrow in arrows for end in arrow} - {"[*]"} == statuses


def test_the_answer_of_a_server_that_starts_is_the_real_one() -> None:
    """The JSON on docs/api.md, from what a worker reports."""
    shown = json.loads(re.findall(r"^```json\n(.*?)^```$", PAGES["docs/api.md"], re.DOTALL | re.MULTILINE)[2])
    loading = Loading(**shown["loading"])
    answer = response_for(NoWorker(f"no worker is ready yet: {loading}"), beside=_starting(loading))
    assert (answer.status_code, json.loads(bytes(answer.body))) == (503, shown)


def bounds() -> Iterator[tuple[str, str]]:
    """The bound and the setting of each row of the page's table that has a setting."""
    rows = re.findall(r"^\| .* \| (.*) \| `(\w+\.\w+)` \| .* \|$", PAGES["docs/security.md"], re.MULTILINE)
    yield from rows


@pytest.mark.parametrize(("bound", "setting"), list(bounds()))
def test_the_bounds_of_the_security_page_are_the_defaults(bound: str, setting: str) -> None:
    """The setting is there, and the first number of the bound is its default; a bound that is none has no number."""
    section, name = setting.split(".")
    default = getattr(getattr(Settings(), section), name)
    number = re.match(r"[\d,.]+", bound)
    assert (None if number is None else float(number[0].replace(",", ""))) == default


def test_the_recorded_memory_is_told_and_drawn(tmp_path: Path) -> None:
    """The table on docs/memory.md has the rows of the reports, and the picture beside it is drawn from them."""
    for report in json.loads((REPORTS / "memory.json").read_text(encoding="utf-8")):
        cells = [
            f"{report['model']}, {report['steps']} steps",
            limit_of(report),
            f"{report['step_ms']:,} ms",
            f"{report['whole_s']} s",
            f"{report['peak_gib']} GiB",
        ]
        assert f"| {' | '.join(cells)} |" in PAGES["docs/memory.md"]
    assert draw_memory(tmp_path).read_text() == (ROOT / "docs/memory/cards.svg").read_text()


def test_the_recorded_calls_of_the_database_are_told_and_drawn(tmp_path: Path) -> None:
    """The table on docs/scaling.md has the figures of the report, and the picture beside it is drawn from them."""
    recorded = json.loads((REPORTS / "store.json").read_text(encoding="utf-8"))
    columns = [recorded[database]["calls_ms"][count] for database in recorded for count in ("1000", "1000000")]
    for name in columns[0]:
        cells = [f"{figures[name]:.1f}" for figures in columns]
        assert f"| {' | '.join(cells)} |" in PAGES["docs/scaling.md"], name
    assert draw_store(tmp_path).read_text() == (ROOT / "docs/scaling/store.svg").read_text()
