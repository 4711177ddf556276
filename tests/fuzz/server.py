"""``kinema`` as it is fuzzed: every name leads to this machine, so that no webhook can leave it.

Fuzzers make up addresses. The stand-in below takes the place of the name service for names and addresses alike, so
nothing is resolved, and whatever is sent goes to a loopback address on which nobody listens. The engine's bounds are
small, so that no request that is accepted takes seconds of a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from kinema.cli.app import main
from kinema.engines.fake import FakeEngine
from kinema.request.capabilities import Capabilities, Limits
from kinema.service.outbound import PublicTransport

NOWHERE = "127.66.66.66"
_LIMITS = Limits(max_pixels=128 * 128, max_frames=33, max_volume=128 * 128 * 33)


async def _resolve(_host: str, _port: int) -> Sequence[str]:
    return (NOWHERE,)


def _put_in_place() -> None:
    defaults = cast("dict[str, Any]", PublicTransport.__init__.__kwdefaults__)
    assert "resolve" in defaults, "the name service is not where it was; nothing is fuzzed before it is replaced"
    defaults["resolve"] = _resolve
    capabilities = cast("Any", FakeEngine.capabilities).fget

    def small(engine: FakeEngine) -> Capabilities:
        return cast("Capabilities", capabilities(engine).model_copy(update={"limits": _LIMITS}))

    cast("Any", FakeEngine).capabilities = property(small)


if __name__ == "__main__":
    _put_in_place()
    main()
