"""Kernels of a decoder compiled before its weights are there: on a thread, while others read the weights.

Which kernels a decoder needs follows from its config and its type. A frame of nothing goes through a stream that
compiles each kernel and launches none; Triton compiles them side by side where it can (3.4 and later), and finds those
of an earlier start in its cache. What the convolutions between them load comes along.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.vae.stream import Stream
from kinema.engines.wan.vae.weights import decoder_shapes, extract_weights

log = logging.getLogger(__name__)

# Latent rows and columns. No kernel is compiled for a size.
_SIZE = (8, 8)
# A compiler keeps a core busy for half a second; more of them than kernels would help nobody.
_MOST_COMPILERS = 16


class KernelsAhead:
    """Begins to compile when it is made; ``device`` is a CUDA device."""

    def __init__(self, config: VaeConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._device = device
        self._dtype = dtype
        self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the kernels. An error is in the log, and what is missing then is compiled when it is first used."""
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            with torch.cuda.device(self._device), torch.inference_mode():
                self._compile()
        except Exception as exc:  # whatever it is, the decoder's trial meets it again, and says what it means
            log.warning("the decoder's kernels were not compiled ahead: %s", exc)
            return
        log.info("start: kernels compiled ahead in %.2f s", time.perf_counter() - started)

    def _compile(self) -> None:
        from kinema.engines.wan.vae.decoder_kernels import (  # noqa: PLC0415 - Triton is there with CUDA only
            TritonDecoderOperations,
            compile_kernel,
        )

        shapes = decoder_shapes(self._config).items()
        nothing = {name: torch.zeros(shape, dtype=self._dtype, device=self._device) for name, shape in shapes}
        weights = extract_weights(self._config, nothing, self._dtype)
        stream = Stream(weights, TritonDecoderOperations(self._dtype, compile_kernel), *_SIZE)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_COMPILERS)) as pool, _side_by_side(pool):
            for is_first in (True, False):
                stream.compute(stream.new_latent(), is_first=is_first)


def _side_by_side(pool: ThreadPoolExecutor) -> AbstractContextManager[Any]:
    """Within it Triton compiles on the pool; all is compiled when it ends."""
    try:
        from triton import AsyncCompileMode  # noqa: PLC0415 - Triton is there with CUDA only
    except ImportError:  # one after the other
        return nullcontext()
    mode: AbstractContextManager[Any] = AsyncCompileMode(pool)
    return mode
