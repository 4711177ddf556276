"""The sglang engine keeps the contract, before a stand-in for the library; tests/sglang has it before the real one."""

from __future__ import annotations

from pathlib import Path

from kinema.engines.base import Engine
from kinema.engines.sglang.engine import SglangEngine
from tests.contract.engine import EngineContract
from tests.contract.processes import ProcessContract
from tests.contract.standins import engine_before_standin, image_pipeline


class TestOwnPipeline(EngineContract):
    """The library's own backend, of which progress comes by a socket."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_standin(sglang={"backend": "sglang"})


class TestDiffusers(EngineContract):
    """The library's diffusers backend, of which progress comes by a callback."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_standin(sglang={"backend": "diffusers"})


class TestImages(EngineContract):
    """A pipeline that begins with a picture."""

    @classmethod
    def make(cls, folder: Path) -> Engine:
        return engine_before_standin(str(image_pipeline(folder)), sglang={"backend": "diffusers"})


class TestOwnPipelinesProcess(ProcessContract):
    """Stopped by a hook on the library's progress bar."""

    @classmethod
    def make(cls, folder: Path) -> SglangEngine:
        return engine_before_standin(sglang={"backend": "sglang"})


class TestDiffusersProcess(ProcessContract):
    """Stopped by diffusers' callback."""

    @classmethod
    def make(cls, folder: Path) -> SglangEngine:
        return engine_before_standin(sglang={"backend": "diffusers"})
