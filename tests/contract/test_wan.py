"""The wan engine keeps the contract, with the bundled model on the CPU."""

from __future__ import annotations

from pathlib import Path

from kinema.engines.base import Engine
from kinema.engines.registry import create_engine
from kinema.settings import EngineSettings
from tests.contract.engine import EngineContract, Stages


class TestWan(EngineContract):
    """Made as the service makes it."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return create_engine(EngineSettings(device="cpu"))

    def test_it_says_how_much_of_its_weights_is_read(self, engine: Engine, stages: Stages) -> None:
        """After the engine was imported, and up to the whole."""
        assert engine.facts.weights  # it is loaded
        assert stages[0][0] == "importing the engine"
        assert ("reading weights", 1.0) in stages
