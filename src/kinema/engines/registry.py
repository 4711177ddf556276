"""From a name in the settings to an engine, importing the chosen one only.

Importing this file loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from kinema.capabilities import Capabilities
from kinema.engines.base import Engine
from kinema.engines.wan.checkpoint import BUNDLED, Checkpoint, inspect
from kinema.errors import ConfigError
from kinema.settings import EngineSettings

if TYPE_CHECKING:
    from kinema.engines.wan.engine import WanEngine
    from kinema.engines.wan.weights import LoadComponents, LoadTransformers

# Looked for without loading them, so that a server without them says so before it opens anything.
_WAN_PACKAGES = ("torch", "diffusers", "transformers")


def create_engine(settings: EngineSettings) -> Engine:
    """The engine that the settings name, not loaded yet.

    Raises ConfigError when what it needs is not installed, or when it refuses the model.
    """
    if settings.name == "fake":
        if settings.gpus > 1 or settings.parallel != "auto":
            raise ConfigError(
                "engine.name = 'fake' has no GPU to share its work; leave engine.gpus at 1 and engine.parallel at auto"
            )
        return _create_fake(settings)
    return _create_wan(settings)


def known_models(settings: EngineSettings) -> list[Capabilities]:
    """What can be served from here without a download: the bundled models and the configured one; no torch needed.

    Raises ConfigError when the configured model cannot be used.
    """
    if settings.name == "fake":
        return [capabilities_of(settings)]
    return [inspect(name).capabilities() for name in dict.fromkeys([*BUNDLED, settings.model])]


def capabilities_of(settings: EngineSettings) -> Capabilities:
    """What the engine that the settings name will make, without making the engine; no torch needed.

    Raises ConfigError when the model cannot be used.
    """
    if settings.name == "fake":
        return _create_fake(settings).capabilities
    return inspect(settings.model).capabilities()


def _create_fake(settings: EngineSettings) -> Engine:
    from kinema.engines.fake import FakeEngine  # noqa: PLC0415 - only when chosen

    # The default model belongs to the default engine; a name that somebody chose is kept.
    is_default = settings.model == EngineSettings().model
    return FakeEngine("fake" if is_default else settings.model)


def _create_wan(settings: EngineSettings) -> Engine:
    require_wan()
    return create_wan(settings, inspect(settings.model))


def require_wan() -> None:
    """Raises ConfigError when what the wan engine needs is not installed."""
    for package in _WAN_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"engine.name = 'wan': the package {package} is missing; pip install 'kinema[wan]'")


def create_wan(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    load_components: LoadComponents | None = None,
    load_others: LoadTransformers | None = None,
) -> WanEngine:
    """The wan engine for this checkpoint, whose components come from ``load_components``, and the transformers of other
    ranks from ``load_others``; by default from its files."""
    from kinema.engines.wan.engine import WanEngine  # noqa: PLC0415 - loads torch, so only when chosen
    from kinema.engines.wan.weights import load, load_transformers  # noqa: PLC0415 - the same

    return WanEngine(
        checkpoint,
        settings.device,
        settings.dtype,
        vae_dtype=settings.vae_dtype,
        attention=settings.attention,
        has_graphs=settings.cuda_graphs,
        gpus=settings.gpus,
        parallel=settings.parallel,
        load_components=load_components or load,
        load_others=load_others or load_transformers,
    )
