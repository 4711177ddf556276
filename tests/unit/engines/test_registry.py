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
from kinema.settings import EngineSettings, WanSettings
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
    loras = f", wan={{'loras': '{tmp_path}'}}" if name == "wan" else ""
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


@pytest.mark.parametrize(
    ("name", "given", "key", "owner"),
    [
        ("wan", {"sglang": {"lora": "some/lora"}}, "sglang.lora", "sglang"),
        ("wan", {"sglang": {"tp_size": 2}}, "sglang.tp_size", "sglang"),
        ("wan", {"diffusers": {"vae_tiling": True}}, "diffusers.vae_tiling", "diffusers"),
        ("auto", {"sglang": {"lora_scale": 0.5}}, "sglang.lora_scale", "sglang"),
        ("auto", {"diffusers": {"vae_tiling": True}}, "diffusers.vae_tiling", "diffusers"),
        ("diffusers", {"wan": {"step_cache": True}}, "wan.step_cache", "wan"),
        ("diffusers", {"wan": {"gpus": 2}}, "wan.gpus", "wan"),
        ("diffusers", {"sglang": {"offload": False}}, "sglang.offload", "sglang"),
        ("sglang", {"wan": {"loras": "folder"}}, "wan.loras", "wan"),
        ("sglang", {"wan": {"cuda_graphs": False}}, "wan.cuda_graphs", "wan"),
        ("sglang", {"offload": "blocks"}, "offload", "wan and diffusers"),
        ("sglang", {"weights": "fp8"}, "weights", "wan and diffusers"),
        ("fake", {"wan": {"memory_gb": 20.0}}, "wan.memory_gb", "wan"),
        ("fake", {"wan": {"parallel": "cfg"}}, "wan.parallel", "wan"),
        ("fake", {"wan": {"transformer_2": "a.safetensors"}}, "wan.transformer_2", "wan"),
        ("fake", {"dtype": "bfloat16"}, "dtype", "wan and diffusers and sglang"),
    ],
)
def test_a_setting_of_another_engine_stops_the_start(name: str, given: dict[str, Any], key: str, owner: str) -> None:
    """The chosen engine would ignore it. The commands that create no engine say so, too."""
    settings = EngineSettings.model_validate({"name": name, **given})
    sentence = rf"^engine\.{re.escape(key)} is a setting of {owner}, and engine\.name .*; leave it out, or choose"
    for use in (create_engine, known_models):
        with pytest.raises(ConfigError, match=sentence):
            use(settings)


def test_what_every_engine_keeps_to_and_defaults_are_no_reason() -> None:
    """A setting of another engine may be written down with its default."""
    for given in (
        {"sglang": {"lora_scale": 1.0}},
        {"weights_cache": False, "kernels_dir": "kernels"},
        {"device": "cpu"},
    ):
        assert create_engine(EngineSettings.model_validate({"name": "fake", **given})).capabilities.engine == "fake"


def test_whole_networks_are_no_way_of_the_wan_engine() -> None:
    """It has the others."""
    with pytest.raises(ConfigError, match=r"^engine\.offload = 'networks' .* alone; give auto, none, text or blocks"):
        create_engine(EngineSettings(offload="networks"))


def test_a_gguf_file_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation from before."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError, match=r"engine\.wan\.transformer: the package gguf is missing; pip install 'kinema\[wan"
    ):
        create_engine(EngineSettings(wan=WanSettings(transformer=Path("a.gguf"))))


def test_a_transformers_file_belongs_to_the_configured_model(tmp_path: Path) -> None:
    """The bundled model is shown as it is beside it."""
    settings = EngineSettings(model=str(tmp_path), wan=WanSettings(transformer=tmp_path / "a.safetensors"))
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


def test_a_folder_of_loras_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    """Rather than a service without them."""
    with pytest.raises(ConfigError, match=r"engine\.wan\.loras = '.*/none' is no folder"):
        create_engine(EngineSettings(wan=WanSettings(loras=tmp_path / "none")))


async def test_loras_are_known_before_the_engine_is_made(tmp_path: Path) -> None:
    """And files that appear meanwhile; digests are kept beside the copies of weights."""
    folder, cache = tmp_path / "loras", tmp_path / "cache"
    folder.mkdir()
    model = tiny_with(tmp_path / "model", {})
    engine = create_engine(EngineSettings(model=str(model), wan=WanSettings(loras=folder), weights_cache_dir=cache))
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
    settings = EngineSettings(model=str(folder), wan=WanSettings(loras=loras))
    for tier in tiers:
        assert [info.name for info in capabilities_of(settings, (), tier).loras] == ["paper"]
    assert [tier.name for tier in capabilities_of(settings, (), "draft").offered_tiers] == ["draft"]
    create_engine(settings)
    assert [record.getMessage() for record in caplog.records if "tier" in record.getMessage()] == [
        "the tier gone is not offered: there is no LoRA that fits with the name wood"
    ]


def test_a_model_brings_loras_of_its_own(tmp_path: Path) -> None:
    """Also as links out of its folder, as the hub's cache has them. One of engine.wan.loras takes the place of that
    with its name."""
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
    both = own.model_copy(update={"wan": WanSettings(loras=given)})
    assert sorted(lora_names(both)) == ["clay", "paper", "wood"]
    (other,) = capabilities_of(both, tier="draft").loras
    assert other.digest != paper.digest


def test_a_command_knows_the_loras_that_it_asks_for(tmp_path: Path) -> None:
    """Their files are read when they are asked for."""
    model, loras = tiny_with(tmp_path / "model", {}), tmp_path / "loras"
    loras.mkdir()
    write_lora(loras / "paper.safetensors", TINY)
    settings = EngineSettings(model=str(model), wan=WanSettings(loras=loras))
    assert capabilities_of(settings).loras == ()
    (info,) = capabilities_of(settings, ["paper"]).loras
    assert (info.name, len(info.digest)) == ("paper", 64)
    with pytest.raises(InvalidRequest, match="there is no LoRA 'wood' here; there are 'paper'"):
        capabilities_of(settings, ["wood"])
    assert capabilities_of(EngineSettings(model=str(model)), ["paper"]).loras == ()


@pytest.mark.parametrize(
    "settings",
    [
        EngineSettings(name="wan", model="m" * 5000),
        EngineSettings(name="diffusers", model="/" + "m" * 5000),
        EngineSettings(model="m" * 5000),
        EngineSettings(wan=WanSettings(loras=Path("m" * 5000))),
        EngineSettings(wan=WanSettings(transformer=Path("m" * 5000))),
    ],
    ids=["wan", "diffusers", "auto", "loras", "a transformer"],
)
def test_a_path_that_the_system_refuses_stops_the_start(settings: EngineSettings) -> None:
    """As one that this user may not look at, in a short sentence."""
    with pytest.raises(ConfigError, match="cannot be read: File name too long") as refused:
        create_engine(settings)
    assert len(refused.value.message) < 400
