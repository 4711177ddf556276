"""Compile the blocks that a network repeats, by the library's own means: once for all of them."""

from __future__ import annotations

import os
import shutil
from typing import Any

from kinema.engines.diffusers.families import DENOISERS
from kinema.errors import ConfigError

_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


def require_compiler() -> None:
    """Raises ConfigError where torch.compile would find no compiler, for a CPU's kernels or for what starts a GPU's."""
    if not any(map(os.environ.get, ("CC", "CXX"))) and not any(map(shutil.which, _COMPILERS)):
        raise ConfigError("engine.diffusers.compile: there is no C++ compiler here; install g++, or leave it out")


def refuse_moved_blocks(offload: str, quantization: str | None) -> None:
    """Raises ConfigError for blocks of torchao's tensors that come and go: torch moves none of these once compiled code
    looks at it. With some models the first video would fail."""
    if offload == "blocks" and quantization is not None and quantization.startswith("torchao"):
        raise ConfigError(
            f"engine.diffusers.compile: not with engine.diffusers.quantization = {quantization!r} where engine.offload "
            "is 'blocks'; give engine.offload = 'none', 'text' or 'networks', or leave one of them out"
        )


def compile_blocks(pipeline: Any) -> None:  # noqa: ANN401 - of diffusers
    """Let torch compile the blocks of the networks that denoise, at their first turn. Raises ConfigError for a network
    of which the library does not say what is repeated."""
    for network in filter(None, (getattr(pipeline, name, None) for name in DENOISERS)):
        if not getattr(network, "_repeated_blocks", None):
            raise ConfigError(
                f"engine.diffusers.compile: diffusers names no repeated blocks of {type(network).__name__}; leave the "
                "setting out"
            )
        network.compile_repeated_blocks()
