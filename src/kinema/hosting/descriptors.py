"""File descriptors: how many the process may have, and how many of them connections may take.

Every socket, file and pipe is one. Connections get a part of them and the service keeps the rest: a job must not fail
because somebody opens connections.
"""

from __future__ import annotations

import sys

import structlog

from kinema.errors import ConfigError

log = structlog.get_logger(__name__)

# The service has about 30 while it makes videos, more with child processes, PostgreSQL and object storage.
_RESERVED = 64
_RESERVED_PART = 1 / 8
# More are of no use, and some libraries make a table of this size.
_MOST = 65_536
# Of what is not reserved. Most connections need a second one at some time, for the file that they are sent or the body
# that they send.
_CONNECTIONS_PART = 1 / 2
_MOST_CONNECTIONS = 4096
_FEWEST_CONNECTIONS = 8


def raise_limit() -> None:
    """Raise the limit of this process as far as the system allows. Raises ConfigError when it is too low to serve."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if _spare() * _CONNECTIONS_PART < _FEWEST_CONNECTIONS:
        raise ConfigError(f"the system lets this process open {_limit()} files, which is too few; set ulimit -n to 256")
    log.info("open files", limit=_limit(), max_connections=max_connections())


def max_connections() -> int:
    """How many connections there may be, by the limit as it is at this moment: it may be changed from outside."""
    return max(min(int(_spare() * _CONNECTIONS_PART), _MOST_CONNECTIONS), _FEWEST_CONNECTIONS)


def _spare() -> float:
    return _limit() - max(_RESERVED, _limit() * _RESERVED_PART)


def _limit() -> int:
    if sys.platform == "win32":
        return _MOST
    import resource  # noqa: PLC0415 - not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)
