"""The diffusers engine keeps the contract, with tiny random pipelines on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.engines.base import Engine
from kinema.engines.registry import create_engine
from kinema.settings import EngineSettings
from tests.contract.engine import EngineContract, Stages, frames_of, make_all

pytestmark = pytest.mark.filterwarnings("ignore")


def engine_of(name: str, folder: Path) -> Engine:
    """Made as the service makes it: from a folder, whose pipeline says which engine it is for."""
    from tests.dummies.pipelines import make

    make(name).save_pretrained(folder / "model")
    (folder / "model" / "kinema.json").write_text(json.dumps({"size": "96x64", "num_frames": 9}))
    return create_engine(EngineSettings(model=str(folder / "model"), device="cpu"))


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


@pytest.mark.families
class TestVace(EngineContract):
    """Wan VACE takes a first and a last frame, as a film with a mask."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_of("Wan VACE", folder)


@pytest.mark.families
class TestCogVideoX(EngineContract):
    """CogVideoX edits films."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_of("CogVideoX", folder)
