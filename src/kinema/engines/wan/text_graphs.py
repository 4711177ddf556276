"""Prompts through the text encoder on a GPU: at one of a few lengths, each recorded as a CUDA graph.

A prompt is some 900 small operations. Python needs longer to send them than a GPU to run them, and a server's other
threads hold Python up; a graph sends them all together. Each prompt is padded to the next of the lengths, also where
nothing is recorded, so that its states are the same bits in each case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.device_memory import held_bytes
from kinema.engines.wan.text_encoder import TextEncoder

# The last is the most tokens of a prompt.
LENGTHS = (32, 64, 128, 256, 512)


class PaddedTexts:
    """Encodes prompts with ``encoder``, whose device is CUDA; it belongs to the thread of the device.

    With ``has_graphs`` a length is recorded when it is used for the second time, so a server that never sees long
    prompts pays nothing for them. The encoder's weights must then stay where they are.
    """

    def __init__(self, encoder: TextEncoder, *, has_graphs: bool) -> None:
        self._encoder = encoder
        self._has_graphs = has_graphs
        self._is_used: set[int] = set()
        self._graphs: dict[int, _TextGraph] = {}
        self._pool: Any = None

    @property
    def graph_bytes(self) -> int:
        """What the graphs take of the device."""
        return sum(graph.num_bytes for graph in self._graphs.values())

    def drop_graphs(self) -> None:
        """Free the graphs; a length that is used again is recorded again."""
        self._graphs.clear()
        self._pool = None

    def __call__(self, tokens: list[int]) -> Tensor:
        """The states (1, t, d) of a prompt's tokens, in the weights' type."""
        length = next(length for length in LENGTHS if length >= len(tokens))
        graph = self._graphs.get(length)
        if graph is None and self._has_graphs and length in self._is_used:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = self._graphs[length] = _TextGraph(self._encoder, length, self._pool)
        self._is_used.add(length)
        states = self._encoder.padded(tokens, length) if graph is None else graph.replay(tokens)
        return states[:, : len(tokens)].clone()  # the next replay overwrites what this one wrote


class _TextGraph:
    """The encoder at one length. A prompt of this length was encoded before, so everything is loaded."""

    def __init__(self, encoder: TextEncoder, length: int, pool: Any) -> None:  # noqa: ANN401 - torch has no type for it
        self._numbers = torch.zeros(1, length, dtype=torch.long, device=encoder.device)
        self._count = torch.ones((), dtype=torch.long, device=encoder.device)
        self._graph = torch.cuda.CUDAGraph()
        before = held_bytes(encoder.device)
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._states = encoder.encode(self._numbers, self._count)
        self.num_bytes = max(held_bytes(encoder.device) - before, 0)

    def replay(self, tokens: list[int]) -> Tensor:
        self._numbers[0, : len(tokens)].copy_(torch.tensor(tokens), non_blocking=True)
        self._numbers[0, len(tokens) :].zero_()
        self._count.fill_(len(tokens))
        self._graph.replay()
        return self._states
