"""Imports what ``kinema`` imports until it is ready, for the process that others are forked from."""

from __future__ import annotations

from importlib import import_module

from kinema.imports import without_collector

_NAMES = [
    "httpcore",
    "kinema.cli.app",
    "kinema.engines.wan.engine",
    "kinema.engines.wan.ranks.follower",
    "kinema.hosting.frontend",
    "kinema.hosting.logs",
    "kinema.hosting.worker",
    "kinema.settings_sources",
    "sqlalchemy.dialects.sqlite",
    "uvicorn.lifespan.on",
    "uvloop",
]

with without_collector():
    for _name in _NAMES:
        import_module(_name)
