"""How many connections the limit of open files allows."""

from __future__ import annotations

import resource

import pytest

from kinema.errors import ConfigError
from kinema.hosting import descriptors


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit, in place of the process's own."""
    found = [1024, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(found))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: found.__setitem__(slice(2), wanted))
    return found


@pytest.mark.parametrize(
    ("hard", "raised"), [(1024, 1024), (4096, 4096), (10**9, 65_536), (resource.RLIM_INFINITY, 65_536)]
)
def test_the_limit_is_raised_as_far_as_it_makes_sense(limits: list[int], hard: int, raised: int) -> None:
    """The hard limit stays what it is."""
    limits[1] = hard
    descriptors.raise_limit()
    assert limits == [raised, hard]


@pytest.mark.parametrize("limit", [96, 128, 256, 1024, 20_000, 65_536])
def test_two_files_for_each_connection_leave_the_service_its_own(limits: list[int], limit: int) -> None:
    limits[:] = limit, limit
    descriptors.raise_limit()
    assert 8 <= descriptors.max_connections() <= 4096
    assert limit - 2 * descriptors.max_connections() >= 64


def test_the_limit_may_change_later(limits: list[int]) -> None:
    before = descriptors.max_connections()
    limits[0] = 256
    assert descriptors.max_connections() < before


def test_a_limit_that_is_too_low_stops_the_start(limits: list[int]) -> None:
    limits[:] = 70, 70
    with pytest.raises(ConfigError, match="70 files, which is too few; set ulimit -n to 256"):
        descriptors.raise_limit()
