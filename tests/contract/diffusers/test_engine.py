"""The diffusers engine keeps the contract, with tiny random pipelines on the CPU."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Engine
from kinema.engines.registry import create_engine
from kinema.errors import ConfigError
from kinema.settings import DiffusersSettings, EngineSettings
from tests.contract.engine import EngineContract, Stages, begin, frames_of, make_all

pytestmark = pytest.mark.filterwarnings("ignore")


def engine_of(name: str, folder: Path, **settings: Any) -> Engine:
    """Made as the service makes it: from a folder, whose pipeline says which engine it is for."""
    from tests.dummies.pipelines import make

    make(name).save_pretrained(folder / "model")
    (folder / "model" / "kinema.json").write_text(json.dumps({"size": "96x64", "num_frames": 9}))
    return create_engine(EngineSettings(model=str(folder / "model"), device="cpu", **settings))


class TestLtx(EngineContract):
    """LTX-Video makes videos from texts and from pictures, by two pipelines."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_of("LTX-Video", folder)

    def test_the_folder_is_read_when_it_is_loaded(self, engine: Engine, stages: Stages) -> None:
        """After the engine was imported."""
        assert [stage for stage, _ in stages][:3] == ["importing the engine", "importing diffusers", "reading weights"]
        assert engine.facts.weights
        assert (engine.facts.engine, engine.facts.solver) == ("diffusers", "FlowMatchEulerDiscreteScheduler")

    def test_the_mode_of_torch_is_that_of_the_caller(self, engine: Engine) -> None:
        """Between two turns too: the library turns gradients off for itself."""
        import torch

        assert torch.is_grad_enabled()
        assert frames_of(make_all(engine)).any()
        assert torch.is_grad_enabled()


class TestSavings(EngineContract):
    """All that saves memory, at once."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_of(
            "LTX-Video", folder, offload="blocks", weights="fp8", diffusers=DiffusersSettings(vae_tiling=True)
        )

    def test_the_manifest_says_what_changes_the_frames(self, engine: Engine) -> None:
        """Where weights lie does not."""
        assert (engine.facts.weights_dtype, engine.facts.vae_tiling) == ("fp8", True)


@pytest.mark.parametrize("offload", ["text", "blocks", "networks"])
def test_a_video_with_offload_is_that_without(offload: str, tmp_path: Path) -> None:
    """Bit for bit; of two that take turns, both."""
    plain, saving = engine_of("LTX-Video", tmp_path / "plain"), engine_of("LTX-Video", tmp_path, offload=offload)
    for engine in (plain, saving):
        engine.load()
    together = zip(begin(saving), begin(saving, seed=4), strict=True)
    made = [frames_of(list(outputs)) for outputs in zip(*together, strict=True)]
    assert np.array_equal(made[0], frames_of(make_all(plain)))
    assert np.array_equal(made[1], frames_of(make_all(plain, seed=4)))


def test_weights_in_8_bits_make_another_video(tmp_path: Path) -> None:
    """Their networks keep them so."""
    plain, small = engine_of("LTX-Video", tmp_path / "plain"), engine_of("LTX-Video", tmp_path, weights="fp8")
    for engine in (plain, small):
        engine.load()
    assert not np.array_equal(frames_of(make_all(small)), frames_of(make_all(plain)))


def test_the_log_quotes_no_prompts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The library would write all of a prompt that it does not read."""
    engine = engine_of("LTX-Video", tmp_path)
    engine.load()
    caplog.set_level("WARNING", "diffusers")  # a benchmark turns warnings off, for the rest of its process
    (handler,) = (one for one in logging.getLogger("diffusers").handlers if type(one) is logging.StreamHandler)
    monkeypatch.setattr(handler, "stream", written := io.StringIO())
    logging.getLogger("diffusers").warning("another warning")
    assert frames_of(make_all(engine, prompt="secret " * 200, num_inference_steps=1)).any()
    assert written.getvalue().split("\n")[0] == "another warning"
    assert "secret" not in written.getvalue()


def test_a_vae_without_tiles_is_named(tmp_path: Path) -> None:
    """When the model is loaded."""
    engine = engine_of("Stable Video Diffusion", tmp_path, diffusers=DiffusersSettings(vae_tiling=True))
    with pytest.raises(ConfigError, match=r"engine\.diffusers\.vae_tiling: AutoencoderKLTemporalDecoder has no tiles"):
        engine.load()


def with_free(num_bytes: int, **savings: Any) -> Any:
    """An engine of the dummy of HunyuanVideo, whose weights are 577 kB, on a device that has so much memory free."""
    from kinema.engines.diffusers.engine import DiffusersEngine
    from kinema.engines.diffusers.families import family_of
    from kinema.engines.diffusers.memory import Savings
    from kinema.engines.diffusers.model_folder import Model
    from tests.dummies.pipelines import make

    family = family_of("HunyuanVideoPipeline")
    assert family is not None
    model = Model(family.name, Path(), {"_class_name": "HunyuanVideoPipeline"}, family, {}, flow_shift=None)
    return DiffusersEngine(
        model,
        "cpu",
        savings=Savings(**savings),
        load_pipeline=lambda *_: make(family.name),
        free_bytes=lambda _: num_bytes,
    )


@pytest.mark.parametrize(
    ("free", "chosen"), [(770_000, "none"), (768_000, "text"), (680_000, "blocks"), (405_000, "blocks")]
)
def test_auto_offloads_what_leaves_no_room_for_a_video(
    free: int, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the sizes of the parts and what the device has free: a quarter is for the video, where that can be."""
    caplog.set_level("INFO", "kinema.engines.diffusers.memory")
    engine = with_free(free)
    engine.load()
    assert engine.offload == chosen
    (said,) = caplog.messages
    assert said.startswith(f"engine.offload = 'auto': chose {chosen}; ")


@pytest.mark.parametrize(
    ("savings", "sentence"),
    [
        ({}, "engine.offload = 'auto': 0.000405 GB of weights must lie on the device, and 0.0004 GB of its memory are"),
        ({"offload": "none"}, "0.0004 GB of its memory are free; auto or blocks take less"),
        ({"offload": "networks"}, "0.0004 GB of its memory are free; auto or blocks take less"),
    ],
)
def test_weights_that_do_not_fit_stop_the_start(savings: dict[str, str], sentence: str) -> None:
    """Before any is on the device."""
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        with_free(400_000, **savings).load()
