"""NVIDIA Dynamo's runtime as the transport: discovery, and streams over TCP. The only part that imports dynamo.

What it adds to that runtime: errors by class, an explicit end of every stream, signs of life, cancelling that reaches
the handler at once, and a way back after discovery lost the lease. ``serve`` is the worker's side, ``connect`` the
frontend's.
"""

from __future__ import annotations

import os

from kinema.errors import ConfigError

# Read when dynamo is imported. By default it writes several lines a call to standard error, past Python's logging; of
# these one is left, which nothing silences. Its store of files complains of every watch that ended.
os.environ.setdefault("DYN_LOG", "error,dynamo_runtime::storage::kv::file=off")

try:
    import dynamo.runtime  # noqa: F401 - says at once, and in our words, that it is not installed
except ImportError as exc:
    raise ConfigError("a cluster needs the dynamo extra, which is for Linux: pip install 'kinema[dynamo]'") from exc

from kinema.cluster.dynamo.connection import connect
from kinema.cluster.dynamo.serving import serve, slug

__all__ = ["connect", "serve", "slug"]
