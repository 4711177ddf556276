"""From a name to an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kinema.engines.registry import capabilities_of, create_engine, keep_kernels, known_models, lora_names
from kinema.engines.wan.checkpoint import BUNDLED
from kinema.errors import ConfigError, InvalidRequest
from kinema.settings import EngineSettings
from tests.serving import until
from tests.unit.engines.wan.lora.files import pair, write_lora
from tests.unit.engines.wan.tiny import tiny_with

# What a module of the bundled model has.
TINY = pair("blocks.0.attn1.to_q", outs=256, ins=256)


def test_the_fake_engine_has_its_own_name_or_the_chosen_one() -> None:
    """The default model's name belongs to the default engine."""
    assert create_engine(EngineSettings(name="fake")).capabilities.model == "fake"
    assert create_engine(EngineSettings(name="fake", model="pattern")).capabilities.model == "pattern"


@pytest.mark.parametrize("name", ["fake", "wan"])
def test_a_model_has_the_name_that_the_settings_give_it(name: str) -> None:
    """And its aliases, in the engine as in what is known without it; the other models keep theirs."""
    given: dict[str, Any] = {"name": name, "served_name": "org/films", "aliases": "films, org/films, old"}
    settings = EngineSettings(**given)
    for can in (create_engine(settings).capabilities, known_models(settings)[-1][0]):
        assert (can.model, can.aliases) == ("org/films", ("films", "old"))
    if name == "wan":
        beside = known_models(settings.model_copy(update={"model": str(BUNDLED["tiny-wan"])}))
        assert [(can.model, can.aliases) for can, _ in beside] == [
            ("tiny-wan", ()),
            ("tiny-wan-i2v", ()),
            ("org/films", ("films", "old")),
        ]


@pytest.mark.parametrize("name", ["fake", "wan"])
def test_choosing_an_engine_loads_no_torch(name: str, tmp_path: Path) -> None:
    """Neither torch nor diffusers nor av: that is for its load. What it makes is known, with the LoRAs that fit it."""
    write_lora(tmp_path / "paper.safetensors", TINY)
    loras = f", loras='{tmp_path}'" if name == "wan" else ""
    code = (
        "import sys; from kinema.engines.registry import create_engine; from kinema.settings import EngineSettings;"
        f"create_engine(EngineSettings(name='{name}'{loras})).capabilities.preset;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["torch", "tokenizers", "ftfy"])
def test_a_missing_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without the extra."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is missing; pip install 'kinema\[wan\]'"):
        create_engine(EngineSettings(name="wan"))


@pytest.mark.parametrize("given", [{"gpus": 2}, {"parallel": "cfg"}])
def test_the_fake_engine_shares_nothing(given: dict[str, Any]) -> None:
    """It has no GPU."""
    with pytest.raises(ConfigError, match=r"'fake' has no GPU to share its work; leave engine\.gpus at 1"):
        create_engine(EngineSettings(name="fake", **given))


@pytest.mark.parametrize("name", ["fake", "sglang"])
def test_a_bound_of_memory_is_for_the_wan_engine(name: str) -> None:
    """The others do not keep to it."""
    with pytest.raises(ConfigError, match=r"engine\.memory_gb bounds the memory of the wan engine"):
        create_engine(EngineSettings(name=name, memory_gb=20.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fake", "sglang"])
@pytest.mark.parametrize("setting", ["transformer", "transformer_2"])
def test_a_transformers_file_is_for_the_wan_engine(name: str, setting: str) -> None:
    """The others would make videos of another transformer."""
    given: dict[str, Any] = {"name": name, setting: Path("a.safetensors")}
    with pytest.raises(ConfigError, match=rf"engine\.{setting} is a file for the wan engine, and engine\.name is"):
        create_engine(EngineSettings(**given))


def test_a_gguf_file_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation from before."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError, match=r"engine\.transformer: the package gguf is missing; pip install 'kinema\[wan"
    ):
        create_engine(EngineSettings(transformer=Path("a.gguf")))


def test_a_transformers_file_belongs_to_the_configured_model(tmp_path: Path) -> None:
    """The bundled model is shown as it is beside it."""
    settings = EngineSettings(model=str(tmp_path), transformer=tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"the model folder {tmp_path} is incomplete")):
        known_models(settings)


def test_sglang_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that brings it; what a model makes with it is known without it."""
    monkeypatch.setitem(sys.modules, "sglang", None)
    settings = EngineSettings(name="sglang", device="cpu")
    with pytest.raises(ConfigError, match=r"sglang is missing; pip install 'kinema\[sglang\]'"):
        create_engine(settings)
    assert [can.engine for can, _ in known_models(settings)] == ["sglang"]


def test_kernels_go_to_the_folder_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads it from the environment, where a folder that somebody chose comes first."""
    monkeypatch.setattr("kinema.engines.registry.has_nvidia", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", "chosen")
    keep_kernels(EngineSettings(kernels_dir=tmp_path / "kernels"))
    assert os.environ["TRITON_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_kernels(EngineSettings(kernels_dir=tmp_path / "kernels"))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "kernels")


def test_kernels_are_not_kept_in_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, and the start goes on."""
    monkeypatch.setattr("kinema.engines.registry.has_nvidia", lambda: True)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    keep_kernels(EngineSettings(kernels_dir=tmp_path / "file" / "kernels"))
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "are not kept" in caplog.text


@pytest.mark.parametrize("name", ["fake", "sglang"])
def test_a_folder_of_loras_is_for_the_wan_engine(name: str, tmp_path: Path) -> None:
    """The others would ignore it."""
    with pytest.raises(ConfigError, match=r"engine\.loras is for the wan engine, and engine\.name is"):
        create_engine(EngineSettings(name=name, loras=tmp_path))  # type: ignore[arg-type]


def test_a_folder_of_loras_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    """Rather than a service without them."""
    with pytest.raises(ConfigError, match=r"engine\.loras = '.*/none' is no folder"):
        create_engine(EngineSettings(loras=tmp_path / "none"))


async def test_loras_are_known_before_the_engine_is_made(tmp_path: Path) -> None:
    """And files that appear meanwhile; digests are kept beside the copies of weights."""
    folder, cache = tmp_path / "loras", tmp_path / "cache"
    folder.mkdir()
    model = tiny_with(tmp_path / "model", {})
    engine = create_engine(EngineSettings(model=str(model), loras=folder, weights_cache_dir=cache))
    assert engine.capabilities.loras == ()
    write_lora(folder / "paper.safetensors", TINY)
    write_lora(folder / "other.safetensors", pair("blocks.0.attn1.to_q", outs=8, ins=8))
    await until(lambda: [info.name for info in engine.capabilities.loras] == ["paper"])
    await until((cache / "lora-digests.json").exists)


def test_a_command_knows_the_loras_of_its_tier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tier whose LoRA is not there is named once when the engine is made."""
    tiers = {"draft": {"loras": [{"name": "paper"}]}, "gone": {"loras": [{"name": "wood"}, {"name": "paper"}]}}
    folder, loras = tiny_with(tmp_path / "model", tiers), tmp_path / "loras"
    loras.mkdir()
    write_lora(loras / "paper.safetensors", TINY)
    settings = EngineSettings(model=str(folder), loras=loras)
    for tier in tiers:
        assert [info.name for info in capabilities_of(settings, (), tier).loras] == ["paper"]
    assert [tier.name for tier in capabilities_of(settings, (), "draft").offered_tiers] == ["draft"]
    create_engine(settings)
    assert [record.getMessage() for record in caplog.records if "tier" in record.getMessage()] == [
        "the tier gone is not offered: there is no LoRA that fits with the name wood"
    ]


def test_a_model_brings_loras_of_its_own(tmp_path: Path) -> None:
    """Also as links out of its folder, as the hub's cache has them. One of engine.loras takes the place of that with
    its name."""
    folder, given = tiny_with(tmp_path / "model", {"draft": {"loras": [{"name": "paper"}]}}), tmp_path / "given"
    for path in (folder / "loras", given):
        path.mkdir()
    (folder / "loras" / "paper.safetensors").symlink_to(write_lora(tmp_path / "blob", TINY))
    write_lora(folder / "loras" / "wood.safetensors", TINY)
    own = EngineSettings(model=str(folder))
    assert sorted(lora_names(own)) == ["paper", "wood"]
    (paper,) = capabilities_of(own, tier="draft").loras
    write_lora(given / "paper.safetensors", pair("blocks.1.attn1.to_q", outs=256, ins=256))
    write_lora(given / "clay.safetensors", TINY)
    both = own.model_copy(update={"loras": given})
    assert sorted(lora_names(both)) == ["clay", "paper", "wood"]
    (other,) = capabilities_of(both, tier="draft").loras
    assert other.digest != paper.digest


def test_a_command_knows_the_loras_that_it_asks_for(tmp_path: Path) -> None:
    """Their files are read when they are asked for."""
    model, loras = tiny_with(tmp_path / "model", {}), tmp_path / "loras"
    loras.mkdir()
    write_lora(loras / "paper.safetensors", TINY)
    settings = EngineSettings(model=str(model), loras=loras)
    assert capabilities_of(settings).loras == ()
    (info,) = capabilities_of(settings, ["paper"]).loras
    assert (info.name, len(info.digest)) == ("paper", 64)
    with pytest.raises(InvalidRequest, match="there is no LoRA 'wood' here; there are 'paper'"):
        capabilities_of(settings, ["wood"])
    assert capabilities_of(EngineSettings(model=str(model)), ["paper"]).loras == ()
