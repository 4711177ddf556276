"""A loaded transformer as the denoising loop holds it: what a request needs once, and then velocities, step by step.

On CUDA a guided forward is one CUDA graph: a step is a few copies and one launch, whatever else holds Python up. A
graph reads and writes the same memory at every replay: the latents, the rows of the step's time, and the keys and
values of the prompts of the generation whose step it is.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.block_operations import BlockOperations, TorchBlockOperations
from kinema.engines.wan.transformer.embeddings import (
    Rotation,
    Text,
    Times,
    embed_times,
    empty_text,
    modulate,
    read_texts,
    rotation_of,
)
from kinema.engines.wan.transformer.forward import Forward, grid_of
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.engines.wan.transformer.network import Network, TransformerWeights, extract_network

# Of one transformer at most: a graph for each shape, with and without guidance. They share the memory they work in.
_MAX_GRAPHS = 8


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """What one transformer knows of one request: its prompts, its times, and where its tokens stand."""

    text: Text
    times: Times
    rotation: Rotation
    num_clean: int

    def branch(self, index: int) -> PreparedRequest:
        """The same request with one of its prompts alone."""
        return replace(self, text=self.text.branch(index))


class WanTransformer:
    """Computes the velocities of diffusers' WanTransformer3DModel with ``weights``, which it empties.

    CUDA graphs work in the memory ``pool``; without one a step is launched kernel by kernel. ``linears`` says what the
    large layers multiply; see ``check_linears``. Generations may interleave on one transformer: whatever belongs to a
    generation is in its ``PreparedRequest``.
    """

    def __init__(
        self,
        weights: TransformerWeights,
        attention: Attention,
        pool: Any | None = None,  # noqa: ANN401 - torch has no type for it
        linears: Linears = "dtype",
    ) -> None:
        self.network = extract_network(weights, linears)
        self.operations = choose_block_operations(self.network.device, self.network.num_heads, self.network.eps)
        self.forward = Forward(self.network, self.operations, attention)
        self._pool = pool
        self._graphs: OrderedDict[StepKey, StepGraph] = OrderedDict()
        # The prompts that the graphs read, and the request whose prompts they are now.
        self._text: Text | None = None
        self._text_of: weakref.ref[PreparedRequest] | None = None

    @property
    def has_graphs(self) -> bool:
        """Whether a step is recorded and sent to the device as a whole."""
        return self._pool is not None

    def prepare(
        self, texts: list[Tensor], timesteps: Tensor, latents: Tensor, *, has_clean_frame: bool
    ) -> PreparedRequest:
        """Compute what a request needs once.

        ``texts`` are the states (1, tokens, t) of the prompt and, with guidance, of the negative prompt; ``timesteps``
        (steps,) are the request's. With a clean frame the tokens of the first latent frame have the time 0.
        """
        grid = grid_of(self.network, latents.shape)
        return PreparedRequest(
            text=read_texts(self.network, texts),
            times=embed_times(self.network, timesteps, has_clean=has_clean_frame),
            rotation=rotation_of(self.network, grid),
            num_clean=grid[1] * grid[2] if has_clean_frame else 0,
        )

    def velocities(self, prepared: PreparedRequest, latents: Tensor, index: int) -> Tensor:
        """The velocities (b, c, f, h, w) of ``latents`` (1, c, f, h, w), one for each text, in the weights' type.

        ``index`` counts steps from 0. The caller may change the tensor.
        """
        projected, embedded = prepared.times.rows(index)
        if self._pool is None:
            modulation = modulate(self.network, projected, embedded, prepared.num_clean)
            latents = latents.to(self.network.dtype)
            return self.forward.velocities(latents, modulation, prepared.rotation, prepared.text)
        self._load_text(prepared)
        return self._graph_of(prepared, latents).replay(latents, projected, embedded)

    def drop_graphs(self, pool: Any | None) -> None:  # noqa: ANN401 - as above
        """Free the recorded steps. They are recorded again when they are needed, in the memory ``pool``: torch frees a
        pool with its last graph.
        """
        self._graphs.clear()
        self._text = self._text_of = None
        self._pool = pool

    def _load_text(self, prepared: PreparedRequest) -> None:
        """Copy the prompts to where the graphs read them, unless they are there already."""
        if self._text_of is not None and self._text_of() is prepared:
            return
        text = self._graph_text(prepared.text)
        text.load(prepared.text)
        self._text_of = weakref.ref(prepared)

    def _graph_text(self, text: Text) -> Text:
        """The memory where the graphs read prompts: enough for two of any length."""
        if self._text is None:
            self._text = empty_text(self.network, 2, text.max_keys)
        return self._text

    def _graph_of(self, prepared: PreparedRequest, latents: Tensor) -> StepGraph:
        key = StepKey(tuple(latents.shape), len(prepared.text.counts), prepared.num_clean)
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            assert self._text is not None
            graph = StepGraph(
                key, self.network, self.forward, self._text.first(key.num_texts), prepared.rotation, self._pool
            )
        self._graphs[key] = graph
        return graph


def choose_block_operations(device: torch.device, num_heads: int, eps: float) -> BlockOperations:
    """The kernels on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TorchBlockOperations(num_heads, eps)
    from kinema.engines.wan.transformer.block_kernels import TritonBlockOperations  # noqa: PLC0415 - Triton needs CUDA

    return TritonBlockOperations(num_heads, eps)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The one stream beside the current one: for each that is used cuBLAS keeps 32 MB."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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
        stream = _side_stream(torch.cuda.current_device())
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
