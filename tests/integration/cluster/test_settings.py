"""Settings that cannot work stop the start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinema.cluster.dynamo import connect
from kinema.errors import ConfigError
from tests.integration.cluster.settings import Settings


async def test_file_discovery_needs_a_folder(settings: Settings) -> None:
    """The runtime's own default would be shared by everybody on the machine."""
    with pytest.raises(ConfigError, match=r"cluster\.file_dir"):
        await connect(replace(settings, file_dir=None))


@pytest.mark.parametrize("namespace", ["", "a.b", "A", "a/b"])
async def test_a_namespace_has_no_dots(settings: Settings, namespace: str) -> None:
    """They divide Dynamo's paths."""
    with pytest.raises(ConfigError, match=r"cluster\.namespace"):
        await connect(replace(settings, namespace=namespace))


async def test_a_variable_that_the_runtime_cannot_read_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying again would not help."""
    monkeypatch.setenv("DYN_SYSTEM_PORT", "99999")
    with pytest.raises(ConfigError, match="SYSTEM_PORT"):
        await connect(settings)
