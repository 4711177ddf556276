"""What each of the transformer's optimisations is worth: the time of a step with it, and with what it replaces.

Only the served form uses CUDA graphs, which are one of the optimisations; the kernels of every other form are launched
one by one. The numbers that a plain form computes are not checked here. The forms are timed in turns, because a device
gets slower as it gets warm.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinema.bench.wan.diffusers_pipeline import make_scheduler
from kinema.bench.wan.gauge import Gauge
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.conditioning import encode_text
from kinema.engines.wan.denoise import guide, make_noise
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.solvers.choice import make_solver
from kinema.engines.wan.transformer.attention import Attention, AttentionChoice, Kernel, choose_attention
from kinema.engines.wan.transformer.block_operations import BlockOperations, TorchBlockOperations
from kinema.engines.wan.transformer.embeddings import (
    Modulation,
    Rotation,
    modulate,
    read_prompts,
    room_for,
    rotation_of,
)
from kinema.engines.wan.transformer.forward import Forward
from kinema.engines.wan.transformer.layers import Linear
from kinema.engines.wan.transformer.model import ExpandedRequest, PreparedRequest, WanTransformer
from kinema.engines.wan.transformer.network import Block, Network
from kinema.errors import ConfigError
from kinema.request.request import GenerationRequest

log = logging.getLogger(__name__)

# One way to compute a step.
Form = Callable[[], object]

# The parts of ``BlockOperations``; those that are one idea stand together.
_PARTS = {
    "norms, gates and modulation one by one": ("norm", "add_norm", "add_norm_affine"),
    "rotation and its norms one by one": ("rotate", "norm_query"),
    "torch's attention to the text": ("attend_text",),
    "GELU after its product": ("gelu_linear",),
}
_ALL_PARTS = tuple(name for names in _PARTS.values() for name in names)
_KERNEL_NAMES: dict[Kernel, str] = {
    "fa3": "FlashAttention 3",
    "cudnn": "cuDNN's attention",
    "sdpa": "torch's own choice of attention",
}
_BY_TORCH = AttentionChoice("sdpa", "sdpa")
SERVED, LAUNCHED = "as served", "no CUDA graph"


@dataclass(frozen=True)
class Ablation:
    """The seconds of a step in the form ``name``, and in the form ``base``, which differs in that one thing."""

    name: str
    step_s: float
    base: str
    base_s: float


@dataclass(frozen=True)
class SeparateLinear(Linear):
    """Query, key and value in a product each. The next operation gets one tensor, which an earlier call computed."""

    earlier: dict[torch.Size, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape not in self.earlier:
            self.earlier[x.shape] = super().__call__(x)
        for weight, bias in zip(self.weight.chunk(3), self.bias.chunk(3), strict=True):
            torch.nn.functional.linear(x, weight, bias)
        return self.earlier[x.shape]


class UnsharedForward(Forward):
    """A forward that computes the first block's beginning for each of two prompts."""

    def begin(self, block: Block, tokens: Tensor, modulation: Modulation, rotation: Rotation) -> Tensor:
        super().begin(block, tokens.clone(), modulation, rotation)
        return super().begin(block, tokens, modulation, rotation)


@dataclass(frozen=True)
class ReadRequest:
    """A request with what its steps need in memory of its own, so that forms in turns do not compute it again."""

    prepared: PreparedRequest
    expanded: ExpandedRequest


class SampleStep:
    """A step in the middle of a video, from noise, which any form can compute."""

    def __init__(self, engine: WanEngine, checkpoint: Checkpoint, request: GenerationRequest) -> None:
        parts = engine.parts
        self.transformer: WanTransformer = parts.transformer
        self.request = request
        self._checkpoint = checkpoint
        self._latents = make_noise(request, parts)
        config = checkpoint.transformer
        given = self._latents.new_zeros(1, config.in_channels - config.out_channels, *self._latents.shape[2:])
        # The noisy latents with channels of given frames, as far as the model has some.
        self._input = torch.cat([self._latents, given], dim=1)
        self._images = None
        if checkpoint.image_encoder is not None:
            width = checkpoint.image_encoder.hidden_size
            self._images = torch.randn(1, checkpoint.num_image_keys, width, device=parts.device)
        prompts = [request.prompt] + ([request.negative_prompt] if request.guidance_scale > 1.0 else [])
        self.states = [encode_text(parts, prompt) for prompt in prompts]
        self._solver = make_solver(checkpoint.solver, request, parts.device)
        self._index = len(self._solver.schedule.times) // 2
        for index in range(self._index):
            self._solver.step(self._latents, self._latents, index)
        self.own = self.read(self.states)

    def served(self) -> Tensor:
        """Compute the step as the engine does."""
        return self._solve(self.transformer.velocities(self.own.prepared, self._input, self._index))

    def run(self, forward: Forward, request: ReadRequest | None = None) -> Tensor:
        """Compute the step by this ``forward``, whose kernels are launched one by one."""
        return self._solve(self.velocities(forward, request or self.own))

    def velocities(self, forward: Forward, request: ReadRequest) -> Tensor:
        """The velocities (b, c, f, h, w) of this ``forward``."""
        network, prepared, expanded = self.transformer.network, request.prepared, request.expanded
        modulation = modulate(network, *prepared.times.rows(self._index), prepared.num_clean)
        return forward.velocities(self._input.to(network.dtype), modulation, expanded.rotation, expanded.text)

    def read(self, states: list[Tensor]) -> ReadRequest:
        """Compute what depends on prompts and times alone, as the engine does before and in the first step."""
        network = self.transformer.network
        prepared = self.transformer.prepare(
            states, self._solver.schedule.timesteps, self._latents, has_clean_frame=False, images=self._images
        )
        text = room_for(network, prepared.prompts)
        read_prompts(network, prepared.prompts, text)
        return ReadRequest(prepared, ExpandedRequest(text, rotation_of(network, prepared.grid)))

    def solve_by_diffusers(self) -> Callable[[Tensor], object]:
        """A function that finishes a step by diffusers' solver, which counts its steps itself."""
        theirs = make_scheduler(self._checkpoint, self.request)
        count = 0

        def solve(velocities: Tensor) -> object:
            nonlocal count
            if count % self.request.num_inference_steps == 0:
                theirs.set_timesteps(self.request.num_inference_steps, device=self._latents.device)
            timestep = theirs.timesteps[count % self.request.num_inference_steps]
            count += 1
            guided = guide(velocities, self.request.guidance_scale)
            return theirs.step(guided, timestep, self._latents, return_dict=False)

        return solve

    def forward(
        self,
        network: Network | None = None,
        operations: BlockOperations | None = None,
        attention: Attention | None = None,
        kind: type[Forward] = Forward,
    ) -> Forward:
        """The transformer's own forward, with the given parts in place of its own."""
        own = self.transformer
        return kind(network or own.network, operations or own.operations, attention or own.forward.attention)

    def _solve(self, velocities: Tensor) -> Tensor:
        return self._solver.step(guide(velocities, self.request.guidance_scale), self._latents, self._index)


@torch.inference_mode()
def ablate(
    engine: WanEngine, checkpoint: Checkpoint, request: GenerationRequest, gauge: Gauge, runs: int
) -> list[Ablation]:
    """The medians of ``runs`` rounds over all forms, after one round that does not count."""
    forms = _forms(SampleStep(engine, checkpoint, request))
    rounds = [[gauge.time(step) for step in forms.values()] for _ in range(runs + 1)][1:]
    medians = {name: statistics.median(times) for name, times in zip(forms, zip(*rounds, strict=True), strict=True)}
    base = LAUNCHED if LAUNCHED in medians else SERVED
    bases = {name: SERVED if name == LAUNCHED else base for name in medians if name != SERVED}
    return [Ablation(name, medians[name], other, medians[other]) for name, other in bases.items()]


def _forms(sample: SampleStep) -> dict[str, Form]:
    """The forms by their names: each replaces one thing, and the last one all of them."""
    own, solve, is_guided = sample.forward(), sample.solve_by_diffusers(), len(sample.states) > 1
    split, unshared = _split(sample.transformer.network), sample.forward(kind=UnsharedForward)
    filled = [_fill(states) for states in sample.states]
    long = sample.read(filled)
    plain = _operations(sample, _ALL_PARTS)
    undone = sample.forward(split, plain, _BY_TORCH, UnsharedForward if is_guided else Forward)
    return {
        SERVED: sample.served,
        **({LAUNCHED: lambda: sample.run(own)} if sample.transformer.has_graphs else {}),
        **{name: partial(sample.run, sample.forward(attention=kernel)) for name, kernel in _attentions(sample)},
        **{name: partial(sample.run, sample.forward(operations=one)) for name, one in _each_plain(sample)},
        "query, key and value in a product each": lambda: sample.run(sample.forward(split)),
        "all 512 text tokens attended to": lambda: sample.run(own, long),
        "prompts and time read in each step": lambda: sample.run(own, sample.read(sample.states)),
        **({"the first block begun for each prompt": lambda: sample.run(unshared)} if is_guided else {}),
        "diffusers' solver": lambda: solve(sample.velocities(own, sample.own)),
        "all of these": lambda: solve(sample.velocities(undone, sample.read(filled))),
    }


def _attentions(sample: SampleStep) -> Iterator[tuple[str, Attention]]:
    """The exact kernels that run on this device, without the served one."""
    network, served = sample.transformer.network, sample.transformer.forward.attention
    num_tokens, width = math.prod(sample.own.prepared.grid), network.width // network.num_heads
    for kernel, name in _KERNEL_NAMES.items():
        if isinstance(served, AttentionChoice) and served.at(num_tokens) == kernel:
            continue
        try:
            choice = choose_attention(kernel, network.device, network.dtype, network.num_heads, width)
        except ConfigError as exc:
            log.info("%s is not measured: %s", name, exc.message)
            continue
        yield name, choice
    if network.device.type == "cuda" and network.dtype in (torch.bfloat16, torch.float16):
        yield "FlashAttention 2", _flash2


def _flash2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _BY_TORCH(query, key, value)


def _each_plain(sample: SampleStep) -> Iterator[tuple[str, BlockOperations]]:
    """The fused operations with one idea at a time in torch; nothing where all of them are torch's."""
    if not isinstance(sample.transformer.operations, TorchBlockOperations):
        for name, parts in _PARTS.items():
            yield name, _operations(sample, parts)


def _operations(sample: SampleStep, plain_parts: Sequence[str]) -> BlockOperations:
    """The transformer's own operations, with these parts in torch."""
    network, own = sample.transformer.network, sample.transformer.operations
    plain = TorchBlockOperations(network.num_heads, network.eps)
    parts = {name: getattr(plain if name in plain_parts else own, name) for name in _ALL_PARTS}
    return cast(BlockOperations, SimpleNamespace(**parts))


def _split(network: Network) -> Network:
    earlier: dict[torch.Size, Tensor] = {}
    layers = (cast(Linear, block.qkv) for block in network.blocks)
    separate = [SeparateLinear(layer.weight, layer.bias, earlier) for layer in layers]
    blocks = (replace(block, qkv=qkv) for block, qkv in zip(network.blocks, separate, strict=True))
    return replace(network, blocks=tuple(blocks))


def _fill(states: Tensor) -> Tensor:
    """Text states (1, tokens, t) with noise where they are zeros, so that all 512 tokens are attended to."""
    is_used = (states != 0).any(dim=-1, keepdim=True)
    return torch.where(is_used, states, torch.randn_like(states))
