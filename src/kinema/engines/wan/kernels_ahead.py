"""Triton kernels compiled before the weights are there: on a thread, while others read the weights.

Which kernels a network needs follows from its config: ``vae/decoder_warmup.py`` and ``transformer/block_warmup.py``
send a small input of zeros through a network of zeros, whose operations compile each kernel and run none. Triton
compiles them side by side where it can (3.4 and later), and finds those of an earlier start in its cache. What runs
between the kernels, convolutions and products, is loaded along the way.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

log = logging.getLogger(__name__)

# A compiler keeps a core busy for half a second; more of them than kernels would help nobody.
_MOST_COMPILERS = 16

# Takes a kernel, its grid and its arguments.
Launch = Callable[..., None]


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:  # noqa: ANN401
    """Run the kernel, which is compiled by its first run."""
    kernel[grid](*arguments, **constants)


def compile_kernel(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:  # noqa: ANN401
    """Compile what these arguments need, and run nothing."""
    kernel.warmup(*arguments, grid=grid, **constants)


class KernelsAhead:
    """Runs ``passes`` on a thread of its own from the moment that it is made; ``device`` is a CUDA device."""

    def __init__(self, device: torch.device, passes: Sequence[Callable[[], None]]) -> None:
        self._device = device
        self._passes = passes
        self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the kernels. An error is in the log, and what is missing then is compiled when it is first used."""
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            with torch.cuda.device(self._device), torch.inference_mode():
                compile_side_by_side(self._passes)
        except Exception as exc:  # whatever it is, the first use meets it again, and says what it means
            log.warning("not all kernels were compiled ahead: %s", exc)
            return
        log.info("start: kernels compiled ahead in %.2f s", time.perf_counter() - started)


def compile_side_by_side(passes: Sequence[Callable[[], None]]) -> None:
    """Run the passes; when this returns, all kernels that they asked for are compiled."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_COMPILERS)) as pool, _on_pool(pool):
        for one in passes:
            one()


def _on_pool(pool: ThreadPoolExecutor) -> AbstractContextManager[Any]:
    """Triton compiles on the pool within this, and all is compiled when it ends."""
    try:
        from triton import AsyncCompileMode  # noqa: PLC0415 - Triton is there with CUDA only
    except ImportError:  # one after the other
        return nullcontext()
    mode: AbstractContextManager[Any] = AsyncCompileMode(pool)
    return mode
