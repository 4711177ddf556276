"""NVIDIA Dynamo's runtime as the transport: discovery, and streams over TCP. Only this part imports dynamo.

It adds to that runtime: errors by class, an explicit end of every stream, heartbeats, cancelling that reaches the
handler at once, and a new registration after discovery lost the lease. ``serve`` is the worker's side, ``connect`` the
frontend's.
"""

from __future__ import annotations

import os

from kinema.errors import ConfigError

# Dynamo reads these when it is imported. By default it writes several lines for each call to standard error, without
# Python's logging; one of these lines cannot be silenced. Its file store reports every watch that ended.
os.environ.setdefault("DYN_LOG", "error,dynamo_runtime::storage::kv::file=off")

try:
    import dynamo.runtime  # noqa: F401 - reports at once, in our words, that it is not installed
except ImportError as exc:
    raise ConfigError("a cluster needs the dynamo extra, which is for Linux: pip install 'kinema[dynamo]'") from exc

from kinema.cluster.dynamo.connection import connect
from kinema.cluster.dynamo.serving import serve, slug

__all__ = ["connect", "serve", "slug"]
