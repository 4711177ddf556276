"""Hooks: registered first, applied before the first request."""

from __future__ import annotations

import enum
import pkgutil
from typing import ClassVar


class HookType(enum.Enum):
    BEFORE = "before"


class HookRegistry:
    _hooks: ClassVar[list] = []

    @classmethod
    def register(cls, target, hook, hook_type):
        cls._hooks.append((target, hook, hook_type))


def apply_plugin_hooks():
    for target, hook, hook_type in HookRegistry._hooks:
        assert hook_type is HookType.BEFORE
        owner, _, name = target.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, _before(getattr(owner, name), hook))


def _before(original, hook):
    def wrapped(*args):
        hook(*args)
        return original(*args)

    return wrapped
