"""An engine that makes videos of the size of small inputs."""

from __future__ import annotations

from kinema.engines.fake import FakeEngine
from kinema.request.capabilities import Capabilities


class SmallEngine(FakeEngine):
    """Makes videos from 16x16 on."""

    @property
    def capabilities(self) -> Capabilities:
        limits = super().capabilities.limits.model_copy(update={"min_side": 16})
        return super().capabilities.model_copy(update={"limits": limits})
