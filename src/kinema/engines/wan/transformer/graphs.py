"""A guided forward as one CUDA graph: a step is a few copies and one launch, whatever else holds Python up.

A graph reads and writes the same memory at every replay: the latents, the rows of the step's time, and the keys and
values of the prompts of the generation whose step it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.transformer.embeddings import Rotation, Text, modulate
from kinema.engines.wan.transformer.forward import Forward
from kinema.engines.wan.transformer.network import Network


@dataclass(frozen=True)
class StepKey:
    """What a graph was recorded for: latents of ``shape`` (1, c, f, h, w), so many prompts and clean tokens."""

    shape: tuple[int, ...]
    num_texts: int
    num_clean: int


class StepGraph:
    """The graph of one key. Recording runs the step once, so that kernels are compiled, and captures it then: it takes
    about the time of two steps.
    """

    def __init__(
        self,
        key: StepKey,
        network: Network,
        forward: Forward,
        text: Text,
        rotation: Rotation,
        pool: Any,  # noqa: ANN401
    ) -> None:
        num_rows, device = 2 if key.num_clean else 1, network.device
        # The graph reads their memory, also when the request for which they were made is gone.
        self._text, self._rotation = text, rotation
        self._latents = torch.zeros(key.shape, dtype=network.dtype, device=device)
        self._projected = torch.zeros(6, num_rows, network.width, device=device)
        self._embedded = torch.zeros(num_rows, network.width, dtype=network.dtype, device=device)

        def run() -> Tensor:
            modulation = modulate(network, self._projected, self._embedded, key.num_clean)
            return forward.velocities(self._latents, modulation, rotation, text)

        self._warm(run)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile: the encoder's does.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._velocities = run()

    @staticmethod
    def _warm(run: Any) -> None:  # noqa: ANN401 - a function without arguments
        """Run once beside the current stream, as torch wants it before a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, latents: Tensor, projected: Tensor, embedded: Tensor) -> Tensor:
        """The velocities of one step. A copy, since the next replay of any graph overwrites what this one wrote."""
        self._latents.copy_(latents)
        self._projected.copy_(projected)
        self._embedded.copy_(embedded)
        self._graph.replay()
        return self._velocities.clone()
