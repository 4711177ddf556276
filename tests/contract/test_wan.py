"""The wan engine keeps the contract, with the bundled model on the CPU."""

from __future__ import annotations

from pathlib import Path

from kinema.engines.base import Engine
from kinema.engines.registry import create_engine
from kinema.settings import EngineSettings
from tests.contract.engine import EngineContract


class TestWan(EngineContract):
    """Made as the service makes it."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return create_engine(EngineSettings(device="cpu"))
