"""A loaded transformer as the denoising loop holds it: what a request needs once, and then velocities, step by step.

Requests take turns. A request keeps its prompts as text states. Their keys and values are up to a hundred times as
large, so the transformer has those of one request at a time, and computes them when the turn changes.

On CUDA a guided forward is one CUDA graph: a step is a few copies and one launch, whatever else holds Python up. A
graph reads and writes the same memory at every replay: the latents, the rows of the step's time, and the keys and
values of the prompts of the generation whose step it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kinema.engines.wan.device_memory import bytes_of, held_bytes
from kinema.engines.wan.lora.delta import Deltas, LoraRef
from kinema.engines.wan.streaming import BlockStream, StreamedBlocks
from kinema.engines.wan.transformer.adapters import Adaptation, Adapters, Layout
from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.block_operations import BlockOperations, TorchBlockOperations
from kinema.engines.wan.transformer.embeddings import (
    Prompts,
    Rotation,
    Text,
    Times,
    embed_times,
    modulate,
    pad_prompts,
    read_prompts,
    room_for,
    room_for_any,
    rotation_of,
)
from kinema.engines.wan.transformer.forward import Forward, grid_of
from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype
from kinema.engines.wan.transformer.network import Network, TransformerWeights, extract_network

# Of one transformer at most: a graph for each shape, with and without guidance. They share the memory they work in, so
# it is not their memory that bounds their number, but what each keeps of the driver's.
_MAX_GRAPHS = 8


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """What one transformer keeps of one request between its steps: its prompts and pictures, its times, how many tokens
    it has along each axis (``grid``), and the numbers of its LoRAs.
    """

    prompts: Prompts
    times: Times
    grid: tuple[int, int, int]
    num_clean: int
    adaptation: Adaptation | None = None

    def branch(self, index: int) -> PreparedRequest:
        """The same request with one of its prompts alone."""
        return replace(self, prompts=self.prompts.branch(index))


@dataclass(frozen=True, eq=False)
class ExpandedRequest:
    """What the steps of a request need beside its times: keys and values of its prompts, and where its tokens are."""

    text: Text
    rotation: Rotation


def no_deltas(_lora: LoraRef) -> Deltas:
    """Where no request has a LoRA."""
    raise AssertionError("this transformer was not told how to read LoRAs")


class WanTransformer:
    """Computes the velocities of diffusers' WanTransformer3DModel with ``weights``, which it empties.

    CUDA graphs work in the memory ``pool``; without one a step is launched kernel by kernel. ``linears`` says what the
    large layers multiply (see ``check_linears``), and ``weights_dtype`` how they are kept. With a ``stream`` the blocks
    stay where it keeps them, and there is no ``pool``. ``read_deltas`` reads the LoRAs of requests. Generations may
    interleave on one transformer: whatever belongs to a generation is in its ``PreparedRequest``.
    """

    def __init__(
        self,
        weights: TransformerWeights,
        attention: Attention,
        pool: Any | None = None,  # noqa: ANN401 - torch has no type for it
        linears: Linears = "dtype",
        weights_dtype: WeightsDtype = "dtype",
        stream: BlockStream | None = None,
        read_deltas: Callable[[LoraRef], Deltas] = no_deltas,
    ) -> None:
        self.network = extract_network(weights, linears, weights_dtype, stream)
        self.operations = choose_block_operations(self.network.device, self.network.num_heads, self.network.eps)
        self.forward = Forward(self.network, self.operations, attention)
        self._adapters = Adapters(self.network, read_deltas)
        self._pool = pool
        self._graphs: OrderedDict[StepKey, StepGraph] = OrderedDict()
        # What the memory of the graphs grew by, with each that was recorded in it.
        self._pool_bytes = 0
        # The kinds of steps that came before.
        self._seen: set[StepKey] = set()
        # The memory where the graphs read prompts.
        self._text: Text | None = None
        # One entry at most, for the request that had the last step. It goes when the request does.
        self._expanded: WeakKeyDictionary[PreparedRequest, ExpandedRequest] = WeakKeyDictionary()

    @property
    def has_graphs(self) -> bool:
        """Whether a step is recorded and sent to the device as a whole."""
        return self._pool is not None

    @property
    def weight_bytes(self) -> int:
        """What the weights take of the device all the time."""
        blocks = self.network.blocks
        return bytes_of(self.network) + (blocks.device_bytes if isinstance(blocks, StreamedBlocks) else 0)

    @property
    def graph_bytes(self) -> int:
        """The memory of the recorded steps."""
        return self._pool_bytes

    @property
    def adapter_bytes(self) -> int:
        """The memory of LoRAs."""
        return self._adapters.num_bytes

    @property
    def prompt_bytes(self) -> int:
        """The memory of the keys and values of prompts."""
        return bytes_of(self._text, self._expanded)

    def prepare(
        self,
        texts: list[Tensor],
        timesteps: Tensor,
        latents: Tensor,
        *,
        has_clean_frame: bool,
        loras: Sequence[LoraRef] = (),
        images: Tensor | None = None,
    ) -> PreparedRequest:
        """Compute what a request needs once and keeps.

        ``texts`` are the states (1, tokens, t) of the prompt's own tokens and, with guidance, of the negative prompt's;
        zeros stand behind them. ``timesteps`` (steps,) are the request's. With a clean frame the tokens of the first
        latent frame have the time 0. ``images`` are the states (1, image keys, i) of the pictures, for a model that
        attends to them.
        """
        assert (images is None) == (self.network.images is None), "a model attends to pictures always, or never"
        adaptation = self._adapters.compose(loras)
        network = self.network if adaptation is None else self._adapters.network(adaptation)
        grid = grid_of(network, latents.shape)
        return PreparedRequest(
            prompts=pad_prompts(network, texts, images),
            times=embed_times(network, timesteps, has_clean=has_clean_frame),
            grid=grid,
            num_clean=grid[1] * grid[2] if has_clean_frame else 0,
            adaptation=adaptation,
        )

    def network_of(self, prepared: PreparedRequest) -> Network:
        """The network that computes the request's steps: with its LoRAs, until it is asked for that of another one."""
        adaptation = prepared.adaptation
        return self.network if adaptation is None else self._adapters.network(adaptation)

    def velocities(self, prepared: PreparedRequest, latents: Tensor, index: int) -> Tensor:
        """The velocities (b, c, f, h, w) of ``latents`` (1, i, f, h, w), one for each text, in the weights' type.

        Of the ``i`` channels the first c are noisy, and image-to-video models read more. ``index`` counts steps from 0.
        The caller may change the tensor.
        """
        projected, embedded = prepared.times.rows(index)
        network, expanded = self.network_of(prepared), self.expand(prepared)
        graph = self._graph_of(prepared, network, expanded, latents)
        if graph is not None:
            return graph.replay(latents, projected, embedded)
        modulation = modulate(network, projected, embedded, prepared.num_clean)
        latents = latents.to(network.dtype)
        return self.forward.over(network).velocities(latents, modulation, expanded.rotation, expanded.text)

    def drop_graphs(self, pool: Any | None) -> None:  # noqa: ANN401 - as above
        """Free the recorded steps. They are recorded again when they are needed, in the memory ``pool``: torch frees a
        pool with its last graph.
        """
        self._graphs.clear()
        self._seen.clear()
        self._pool_bytes = 0
        self._pool = pool

    def drop_prompts(self) -> None:
        """Free keys and values of prompts, which are computed again. The graphs, which read them, have gone before."""
        assert not self._graphs, "a graph reads its prompts where they were when it was recorded"
        self._expanded.clear()
        self._text = None

    def drop_adapters(self) -> None:
        """Free the memory where layers read LoRAs. The graphs, which read them too, have gone before."""
        assert not self._graphs, "a graph reads its LoRAs where they were when it was recorded"
        self._adapters.drop()

    def reserve(self) -> None:
        """Take the memory in which blocks pass by, for the next step. Raises torch.OutOfMemoryError."""
        if isinstance(self.network.blocks, StreamedBlocks):
            self.network.blocks.reserve()

    def expand(self, prepared: PreparedRequest) -> ExpandedRequest:
        """What the steps of the request need. It is computed when another request had the step before, and must not be
        kept: the next one may have the same memory.
        """
        expanded = self._expanded.get(prepared)
        if expanded is None:
            # The other one goes first, so that there is never memory for two.
            self._expanded.clear()
            text = self._room_for(prepared.prompts)
            read_prompts(self.network_of(prepared), prepared.prompts, text)
            expanded = ExpandedRequest(text, rotation_of(self.network, prepared.grid))
            self._expanded[prepared] = expanded
        return expanded

    def _room_for(self, prompts: Prompts) -> Text:
        """Memory for the prompts. Graphs read them always from the same, which is enough for two of any length."""
        if self._pool is None:
            return room_for(self.network, prompts)
        if self._text is None:
            self._text = room_for_any(self.network, prompts)
        return self._text.first(len(prompts.states))

    def _graph_of(
        self, prepared: PreparedRequest, network: Network, expanded: ExpandedRequest, latents: Tensor
    ) -> StepGraph | None:
        """The graph of such steps. The first one has none, since it may be the only one, and is when kernels are
        compiled.
        """
        if self._pool is None:
            return None
        layout = None if prepared.adaptation is None else prepared.adaptation.layout
        key = StepKey(tuple(latents.shape), len(prepared.prompts.states), prepared.num_clean, layout)
        graph = self._graphs.get(key)
        if graph is not None and graph.network is not network:  # its LoRAs had to go, and are read elsewhere now
            del self._graphs[key]
        if key not in self._seen:
            self._seen.add(key)
            return None
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            graph = StepGraph(key, network, self.forward.over(network), expanded.text, expanded.rotation, self._pool)
            self._pool_bytes += graph.pool_bytes
        self._graphs[key] = graph
        return graph


def choose_block_operations(device: torch.device, num_heads: int, eps: float) -> BlockOperations:
    """The kernels on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TorchBlockOperations(num_heads, eps)
    from kinema.engines.wan.transformer.block_kernels import TritonBlockOperations  # noqa: PLC0415 - Triton needs CUDA

    return TritonBlockOperations(num_heads, eps)


@dataclass(frozen=True)
class StepKey:
    """What a graph was recorded for: latents of ``shape`` (1, i, f, h, w), so many prompts and clean tokens, and LoRAs
    of one layout."""

    shape: tuple[int, ...]
    num_texts: int
    num_clean: int
    layout: Layout | None = None


class StepGraph:
    """The graph of one key. Recording computes nothing. A step of the key ran before, so that kernels are compiled."""

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
        # Of which it reads the weights, and the memory of LoRAs.
        self.network = network
        # The graph reads their memory, also when the request for which they were made is gone.
        self._text, self._rotation = text, rotation
        self._latents = torch.zeros(key.shape, dtype=network.dtype, device=device)
        self._projected = torch.zeros(6, num_rows, network.width, device=device)
        self._embedded = torch.zeros(num_rows, network.width, dtype=network.dtype, device=device)

        def run() -> Tensor:
            modulation = modulate(network, self._projected, self._embedded, key.num_clean)
            return forward.velocities(self._latents, modulation, rotation, text)

        self._graph = torch.cuda.CUDAGraph()
        before = held_bytes(device)
        # Other threads may allocate and copy meanwhile: the encoder's does.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._velocities = run()
        # What the pool grew by.
        self.pool_bytes = max(held_bytes(device) - before, 0)

    def replay(self, latents: Tensor, projected: Tensor, embedded: Tensor) -> Tensor:
        """The velocities of one step. A copy, since the next replay of any graph overwrites what this one wrote."""
        self._latents.copy_(latents)
        self._projected.copy_(projected)
        self._embedded.copy_(embedded)
        self._graph.replay()
        return self._velocities.clone()
