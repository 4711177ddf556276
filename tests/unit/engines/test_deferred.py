"""An engine that is made when it is loaded."""

from __future__ import annotations

import pytest

from kinema.engines.deferred import DeferredEngine
from kinema.engines.fake import FakeEngine
from kinema.errors import ConfigError
from tests.unit.worker.tasks import make_request


def test_nothing_is_made_before_the_load() -> None:
    """What the engine makes is known all the same, and it can be closed."""
    engine = DeferredEngine(lambda: FakeEngine().capabilities, "auto", lambda: pytest.fail("it was made"))
    assert (engine.capabilities, engine.device, engine.is_lost) == (FakeEngine().capabilities, "auto", False)
    engine.close()


def test_a_load_makes_the_engine_and_loads_it() -> None:
    """From then on it is that engine, and a second load makes no second one."""
    made: list[FakeEngine] = []
    stages: list[str] = []

    def make() -> FakeEngine:
        made.append(FakeEngine())
        return made[-1]

    engine = DeferredEngine(lambda: FakeEngine().capabilities, "auto", make)
    engine.load(lambda stage, _part: stages.append(stage))
    engine.load()
    (inner,) = made
    assert stages == ["importing the engine", "loading test patterns"]
    assert (inner.is_loaded, engine.device, engine.facts) == (True, inner.device, inner.facts)
    request = make_request()
    assert list(map(repr, engine.generate(request))) == list(map(repr, FakeEngine().generate(request)))
    inner.is_lost = True
    assert engine.is_lost
    engine.close()
    assert not inner.is_loaded


def test_an_engine_that_cannot_be_made_fails_the_load() -> None:
    """With its own reason."""

    def refuse() -> FakeEngine:
        raise ConfigError("engine.device = 'cuda:9' cannot be used")

    with pytest.raises(ConfigError, match="cuda:9"):
        DeferredEngine(lambda: FakeEngine().capabilities, "auto", refuse).load()
