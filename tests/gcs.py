"""An emulator of Google's object store for the tests, over HTTP on a free port, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.postgres import free_port
from tests.s3 import listening

BUCKET = "videos"
_MAIN = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()
"""


@contextmanager
def running_gcs() -> Iterator[str]:
    """The address of a server with an empty bucket. gcsfs in this process goes there, and asks nobody for a key."""
    from fsspec.config import conf

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setitem(conf, "gcs", {"token": "anon"})
        command = [sys.executable, "-W", "ignore", "-c", _MAIN, str(port), BUCKET]
        with listening(command, port):
            yield url
