"""A stream whose kernels are recorded once and then sent to the GPU all together.

A decoded latent frame is some two hundred small calls, which Python cannot send as fast as a GPU runs them when the
pictures are small; and a server's other threads hold Python up. torch is asked for nothing between two steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.vae.stream import Decoded, Stream


class RecordedStream:
    """The same pictures as the stream's, which it uses up; made in the time of a few of its steps."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        before = _free_bytes()
        self._latent = stream.new_latent()
        # The kernels are compiled and chosen before they are recorded, the first frame's and the others'.
        for is_first in (True, False):
            stream.compute(self._latent, is_first=is_first)
        pool = torch.cuda.graph_pool_handle()
        self._first = _Recording(stream, self._latent, pool, is_first=True)
        self._later = _Recording(stream, self._latent, pool, is_first=False)
        self._is_first = True
        self._size_bytes = max(before - _free_bytes(), 0)

    @property
    def share_of_memory(self) -> float:
        """Of the card's, in [0, 1]: what making it took."""
        return self._size_bytes / torch.cuda.get_device_properties(self._latent.device).total_memory

    def begin(self) -> None:
        """See ``Stream.begin``."""
        self._stream.begin()
        self._is_first = True

    def step(self, latent: Tensor) -> Decoded:
        """See ``Stream.step``."""
        self._latent.copy_(latent)
        recording = self._first if self._is_first else self._later
        self._is_first = False
        return recording.play()


def _free_bytes() -> int:
    """Of the card's memory, with what torch keeps for later given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


class _Recording:
    def __init__(self, stream: Stream, latent: Tensor, pool: Any, *, is_first: bool) -> None:  # noqa: ANN401 - torch's own
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; this one does nothing that cannot be recorded.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._decoded = stream.compute(latent, is_first=is_first)

    def play(self) -> Decoded:
        self._graph.replay()
        return self._decoded
