"""What `kinema config` and `kinema models` print in a terminal of 80 columns, in a pipe and as JSON."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kinema.cli.tables import show_families, show_models, show_settings
from kinema.settings import EngineSettings, WanSettings
from kinema.settings_sources import SettingRow, load_settings
from tests.unit.engines.wan.lora.files import pair, write_lora
from tests.unit.engines.wan.tiny import tiny_with

LONG_URL = "s3://a-bucket-with-a-rather-long-name/a-folder-with-a-rather-long-name/another-one/videos"


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=80, color_system=None, soft_wrap=True)


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> tuple[SettingRow, ...]:
    """Settings with a long value, a secret, and a number that JSON does not have."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("KINEMA_SERVER_API_KEYS", "one,two")
    return load_settings({"storage.url": LONG_URL, "retention.keep_h": "inf"}).rows


def test_no_name_or_value_is_cut(rows: tuple[SettingRow, ...]) -> None:
    """The terminal wraps a long line by itself, so it can be copied; descriptions are wrapped at words."""
    console = terminal()
    show_settings(rows, console, is_json=False)
    lines = shown(console)
    assert f"storage.url = {LONG_URL}  (flag)" in lines
    assert "    KINEMA_STORAGE_URL" in lines
    assert "server.api_keys = **********  (environment)" in lines
    assert "jobs.max_queued_s = not set  (default)" in lines
    assert {row.key for row in rows} <= {line.partition(" = ")[0] for line in lines}
    assert all(len(line) <= 80 for line in lines if line.startswith("    "))


def test_a_pipe_gets_a_line_for_each_setting(rows: tuple[SettingRow, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Key, value, source, environment variable and description, separated by tabs."""
    show_settings(rows, Console(file=StringIO()), is_json=False)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [row.key for row in rows]
    assert {len(line) for line in lines} == {5}
    assert ["storage.url", LONG_URL, "flag", "KINEMA_STORAGE_URL"] in [line[:4] for line in lines]


def test_json_keeps_the_kinds_of_values(rows: tuple[SettingRow, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, true, false and null; a secret is masked, and infinity is text."""
    show_settings(rows, terminal(), is_json=True)
    told = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert told["server.port"]["value"] == 8000
    assert told["engine.wan.cuda_graphs"]["value"] is True
    assert told["jobs.max_queued_s"]["value"] is None
    assert told["retention.keep_h"]["value"] == "inf"
    assert told["server.api_keys"] == {
        "key": "server.api_keys",
        "value": "**********",
        "source": "environment",
        "environment": "KINEMA_SERVER_API_KEYS",
        "description": told["server.api_keys"]["description"],
    }


def test_models_say_their_limits_in_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    """A limit is a number of pixels, whatever their shape."""
    show_models(EngineSettings(wan=WanSettings(memory_gb=24)), Console(file=StringIO()))
    name, modes, default, limits, memory, description, loras, tiers = (
        capsys.readouterr().out.splitlines()[-1].split("\t")
    )
    assert (name, modes, loras) == ("tiny-wan", "text, image, video", "draft, outlined")
    assert tiers.startswith("draft: 4 steps, guidance 1, flow shift 1, euler, LoRA draft, ")
    assert default == "128x128, 33 frames at 16 fps, 20 steps, guidance 3"
    assert limits == "65,536 pixels per frame, 65 frames"
    assert re.fullmatch(r"0\.0\d+ GB of weights in files, 24 GB of each GPU at most", memory)
    console = terminal()
    show_models(EngineSettings(), console)
    lines = shown(console)
    lines = lines[lines.index("tiny-wan") :]
    assert description.startswith(lines[1].strip())
    assert {f"    by default  {default}", "    LoRAs       draft, outlined"} <= set(lines)


def test_models_name_the_loras_that_fit_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without reading their files: their digests are not needed."""
    for name in ("z", "a"):
        write_lora(tmp_path / f"{name}.safetensors", pair("blocks.0.attn1.to_q", outs=256, ins=256))
    write_lora(tmp_path / "other.safetensors", pair("blocks.0.attn1.to_q", outs=8, ins=8))
    show_models(EngineSettings(wan=WanSettings(loras=tmp_path)), Console(file=StringIO()))
    assert capsys.readouterr().out.splitlines()[-1].split("\t")[-2] == "a, draft, outlined, z"


def test_models_name_the_tiers_that_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what each sets; one without its LoRA is left out."""
    draft = {"timesteps": [1000, 500], "guidance_scale": 1, "solver": "lcm", "loras": [{"name": "a"}]}
    folder = tiny_with(tmp_path / "model", {"draft": draft, "gone": {"loras": [{"name": "b"}]}})
    write_lora(tmp_path / "a.safetensors", pair("blocks.0.attn1.to_q", outs=256, ins=256))
    show_models(EngineSettings(model=str(folder), wan=WanSettings(loras=tmp_path)), Console(file=StringIO()))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split("\t")[-1] == "draft: 2 steps, guidance 1, lcm, LoRA a"


def test_families_say_what_they_make_or_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each into a pipe, a block each in a terminal."""
    show_families(Console(file=StringIO()))
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in capsys.readouterr().out.splitlines()}
    default = "704x480, 161 frames at 24 fps, 50 steps, guidance 3"
    assert rows["LTX-Video"] == [
        "text, image, first and last frame, frames",
        default,
        "the pipeline's example",
        "Lightricks/LTX-Video",
        "13.4 GB of weights in bfloat16, 3.8 GB with engine.offload = text",
        "LTX-Video Open Weights",
        "",
    ]
    assert rows["Latte"][4] == "11.6 GB of weights in bfloat16, 2.1 GB with engine.offload = text"
    assert rows["ConsisID"][0].startswith("not served: it needs a picture of a face")
    assert rows["Cosmos 2.5"][-1] == "the packages torchvision, cosmos_guardrail"
    console = terminal()
    show_families(console)
    lines = shown(console)
    assert lines[lines.index("LTX-Video") :][:3] == [
        "LTX-Video",
        "    made from     text, image, first and last frame, frames",
        f"    by default    {default}",
    ]
