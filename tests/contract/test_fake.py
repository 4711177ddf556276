"""The fake engine keeps the contract."""

from __future__ import annotations

from pathlib import Path

from kinema.engines.base import Engine
from kinema.engines.fake import FakeEngine
from tests.contract.engine import EngineContract


class TestFake(EngineContract):
    """Which knows no guidance."""

    has_guidance = False

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return FakeEngine()


class TestFakeWithSound(EngineContract):
    """Its frames come with a tone."""

    has_guidance = False

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return FakeEngine(has_sound=True)
