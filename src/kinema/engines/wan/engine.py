"""The wan engine: a request in, a generator of steps and frames out. Read ``generate`` first."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.engines.base import (
    NO_INPUTS,
    Frames,
    Inputs,
    Output,
    StageReport,
    Step,
    UInt8Array,
    check_inputs,
    report_nothing,
)
from kinema.engines.failures import meaning_of
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.conditioning import Conditioning, PromptCache, encode_frames, encode_given, encode_images
from kinema.engines.wan.decode import decode, first_choice, make_decoder
from kinema.engines.wan.denoise import denoise, make_cache, make_noise, noise_ahead
from kinema.engines.wan.device_memory import DeviceMemory, bytes_of, check_bound, open_memory
from kinema.engines.wan.fingerprint import facts_of
from kinema.engines.wan.kernels_ahead import KernelsAhead
from kinema.engines.wan.launch_ahead import LaunchAhead
from kinema.engines.wan.loading import (
    Components,
    LoadComponents,
    LoadTransformers,
    choose_device,
    choose_dtype,
    does_not_fit,
    leave_cores,
    load,
    load_transformers,
    require_room,
)
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.lora.reading import Lora, LoraReader, reader_of
from kinema.engines.wan.outbox import Outbox
from kinema.engines.wan.placement import OffloadSetting, Placement, place
from kinema.engines.wan.preview import LatentPreview
from kinema.engines.wan.ranks.leader import Leader, RanksLoras, devices_of
from kinema.engines.wan.ranks.plan import Parallel, plan_of
from kinema.engines.wan.ranks.shard import shard_of, stream_of
from kinema.engines.wan.residents import IDLE_SHARE, Residents
from kinema.engines.wan.solvers.choice import make_solver
from kinema.engines.wan.solvers.solver import Solver
from kinema.engines.wan.state import Checkpointer
from kinema.engines.wan.step_cache import StepCache
from kinema.engines.wan.streaming import BlockStream
from kinema.engines.wan.text_graphs import PaddedTexts
from kinema.engines.wan.transformer.attention import (
    AttentionChoice,
    AttentionName,
    Kernel,
    choose_attention,
    load_kernel,
)
from kinema.engines.wan.transformer.block_warmup import compile_blocks
from kinema.engines.wan.transformer.forward import MAX_TOKENS_TOGETHER
from kinema.engines.wan.transformer.fp8 import Linears, WeightsDtype, check_linears
from kinema.engines.wan.transformer.model import WanTransformer
from kinema.engines.wan.transformer.shapes import shapes
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.engines.wan.vae.decoder_warmup import compile_decoder
from kinema.engines.wan.workspace import Workspaces
from kinema.errors import InvalidRequest
from kinema.manifest import EngineFacts
from kinema.request.capabilities import Capabilities
from kinema.request.memory import GuidanceMemory, Memory
from kinema.request.request import GenerationRequest

log = logging.getLogger(__name__)


class _Stages:
    """The stages of a load: each is reported when it begins, and timed."""

    def __init__(self, report: StageReport) -> None:
        self.report = report
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.report(name, None)
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def log(self) -> None:
        """One line with all of them, so that the slow one is seen."""
        log.info("start: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._seconds.items()))


@dataclass(frozen=True, eq=False)
class ReadLoras:
    """The LoRAs of a request for each transformer, by its name, which stay in memory as long as this object does."""

    refs: Mapping[str, Sequence[LoraRef]]
    own: Sequence[Lora]
    others: RanksLoras | None = None


class WanEngine:
    """Runs one Wan checkpoint on one device, or on ``gpus`` devices from ``device`` on, which share each video as
    ``parallel`` says.

    On CUDA its tensors, and those of each other rank, take ``memory_gb`` of a device at most, by default what is free.
    ``checkpoint.inspect`` finds a checkpoint by its name. ``loras`` is a folder, or the library of one. ``load`` reads
    the checkpoint's weights by ``load_components``, by default from its files, and the other ranks read theirs by
    ``load_others``. ``launches_ahead`` says whether steps may be launched before those before them are done, by default
    where they are recorded, on one GPU (see ``launch_ahead.py``). Raises ConfigError when the devices cannot be used,
    or when the model cannot be split like this.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        dtype: str = "auto",
        *,
        vae_dtype: str = "auto",
        attention: AttentionName = "auto",
        linears: Linears = "dtype",
        offload: OffloadSetting = "auto",
        weights_dtype: WeightsDtype = "dtype",
        has_step_cache: bool = False,
        has_graphs: bool = True,
        launches_ahead: bool | None = None,
        gpus: int = 1,
        parallel: Parallel = "auto",
        memory_gb: float | None = None,
        loras: Path | LoraLibrary | None = None,
        load_components: LoadComponents | None = None,
        load_others: LoadTransformers = load_transformers,
    ) -> None:
        self._checkpoint = checkpoint
        self._capabilities = checkpoint.capabilities()
        if isinstance(loras, Path):
            loras = LoraLibrary(loras, {name: shapes(config) for name, config in checkpoint.transformers.items()})
        self.loras = loras
        self._device = choose_device(device)
        self._plan = plan_of(gpus, parallel, checkpoint, offload)
        self._devices = devices_of(self._device, gpus)
        check_bound(memory_gb, self._device)
        self._memory_gb = memory_gb
        self._device_memory: DeviceMemory | None = None
        self._residents: Residents | None = None
        # What videos take of the device; None where there is no allocator to ask.
        self._workspaces: Workspaces | None = None
        self._own: Sequence[WanTransformer] = ()
        # Where blocks compute that lie elsewhere.
        self._stream: BlockStream | None = None
        self._dtype = choose_dtype(dtype, self._device)
        self._vae_dtype = vae_dtype
        self._attention_name = attention
        self._linears: Linears = linears
        self._weights_dtype: WeightsDtype = weights_dtype
        self._has_step_cache = has_step_cache
        self._offload = offload
        self._placement = Placement(self._device)
        self._has_graphs = has_graphs and self._device.type == "cuda"
        self._launches_ahead = launches_ahead
        self._ahead = LaunchAhead(is_possible=False)
        self._leader: Leader | None = None
        self._load_components = load_components
        self._load_others = load_others
        self._parts: Components | None = None
        self._decoder: VaeDecoder | None = None
        self._reader: LoraReader | None = None
        self._prompts: PromptCache | None = None
        self._outbox = Outbox()
        self._facts: EngineFacts | None = None
        # Made, and fitted to the VAE, when somebody first asks for a preview.
        self._preview: LatentPreview | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities if self.loras is None else self.loras.added_to(self._capabilities)

    @property
    def device(self) -> str:
        if self._plan is None:
            return str(self._device)
        return f"{', '.join(map(str, self._devices))} ({self._plan.parallel})"

    @property
    def is_lost(self) -> bool:
        return self._leader is not None and self._leader.is_lost

    @property
    def memory(self) -> Memory | None:
        return None if (workspaces := self._workspaces) is None else workspaces.known

    @property
    def loras_in_memory(self) -> Sequence[str]:
        return () if (reader := self._reader) is None else reader.digests

    @property
    def leader(self) -> Leader | None:
        """What commands the other ranks; None with a single GPU."""
        return self._leader

    @property
    def facts(self) -> EngineFacts:
        assert self._facts is not None, "load() was not called"
        return self._facts

    def load(self, report: StageReport = report_nothing) -> None:
        if self._parts is not None:
            return
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # of this thread, which also generates
        leave_cores(self._device)
        stages = _Stages(report)
        ahead: KernelsAhead | None = None
        try:
            self._check_linears()
            self._take_memory()
            ahead = self._compile_ahead() if self._device.type == "cuda" else None
            with stages.stage("choosing attention"):
                attention = self._choose_attention()
            self._load(attention, ahead, stages)
            stages.log()
        except BaseException as exc:
            if ahead is not None:  # an interpreter that ends while threads are in CUDA aborts
                ahead.wait()
            limit = None if self._device_memory is None else self._device_memory.limit_bytes
            self.close()
            if isinstance(exc, torch.OutOfMemoryError):  # behind the weights: their decoder, for instance
                raise does_not_fit(self._checkpoint, self._placement, self._dtype, limit) from exc
            raise

    def _take_memory(self) -> None:
        """Bound what this process takes of the device, and choose what stays in the host's memory. Raises ConfigError
        when the weights do not fit."""
        self._device_memory = memory = open_memory(self._device, self._memory_gb)
        limit_bytes = None if memory is None else memory.limit_bytes
        num_parts = 1 if self._plan is None else self._plan.num_parts
        self._placement = place(self._offload, self._checkpoint, self._device, self._dtype, limit_bytes, num_parts)
        # Blocks that come and go are not where a recorded step would read them.
        self._has_graphs = self._has_graphs and not self._placement.has_blocks_offloaded and num_parts == 1
        if self._launches_ahead is None:
            self._launches_ahead = self._has_graphs and self._plan is None
        self._ahead = LaunchAhead(is_possible=self._launches_ahead)
        if limit_bytes is not None:
            require_room(self._checkpoint, self._placement, self._dtype, limit_bytes)

    def _load(self, attention: AttentionChoice, ahead: KernelsAhead | None, stages: _Stages) -> None:
        if self._plan is not None:  # the other ranks read their weights meanwhile
            self._leader = Leader(
                self._plan,
                self._checkpoint,
                self._devices,
                self._dtype,
                attention,
                self._linears,
                self._weights_dtype,
                offload=self._placement.offload,
                has_graphs=self._has_graphs,
                memory_gb=self._memory_gb,
                load=self._load_others,
            )
        load_components = self._load_components or partial(load, report=stages.report)
        with stages.stage("reading weights"):
            parts = load_components(self._checkpoint, self._placement, self._dtype)
            if self._weights_dtype == "fp8":
                parts.text_encoder.quantise(self._device)
            if self._placement.has_text_offloaded:
                parts.text_encoder.keep_in_host(BlockStream(self._device, is_kept=False))
                if parts.image_encoder is not None:
                    parts.image_encoder.keep_in_host(BlockStream(self._device, is_kept=False))
            if self._device.type == "cuda":
                has_graphs = self._has_graphs and not self._placement.has_text_offloaded
                parts.texts = PaddedTexts(parts.text_encoder, has_graphs=has_graphs)
            self._build_transformers(parts, attention)
        if ahead is not None:
            with stages.stage("compiling kernels"):
                ahead.wait()
        with stages.stage("trying out the decoder"):
            limit = math.inf if self._device_memory is None else self._device_memory.limit_bytes
            decoder = make_decoder(
                self._vae_dtype,
                parts.vae,
                is_recorded=self._has_graphs,
                max_idle_bytes=IDLE_SHARE * limit,
            )
            parts.vae.drop_decoder()  # the other has its weights in its own layout
        self._facts = facts_of(
            self._checkpoint,
            self._device,
            self._dtype,
            decoder.weights.dtype,
            attention,
            self._linears,
            self._weights_dtype,
            self._plan,
            has_step_cache=self._has_step_cache,
        )
        self._parts, self._decoder = parts, decoder
        self._prompts = prompts = PromptCache(parts, self._capabilities.preset.negative_prompt)
        self._residents = residents = self._list_residents(parts, decoder, prompts)
        if self._device_memory is not None:
            self._workspaces = Workspaces(
                self._device_memory, residents, self._guidance(), self._checkpoint.geometry, self._passing_bytes
            )

    def _list_residents(self, parts: Components, decoder: VaeDecoder, prompts: PromptCache) -> Residents:
        """What lies on the device between two turns. What only saves time leaves, in this order; weights stay."""
        own, residents = self._own, Residents(self._device_memory)
        residents.add("graphs", self._graph_bytes, self._drop_graphs)
        residents.add("decoder", lambda: decoder.idle_bytes, decoder.drop_idle)
        residents.add(
            "prompts", lambda: prompts.size_bytes + sum(one.prompt_bytes for one in own), partial(_forget, prompts, own)
        )
        residents.add("loras", lambda: sum(one.adapter_bytes for one in own), partial(_drop_adapters, own))
        if (stream := self._stream) is not None:
            residents.add("streamed blocks", lambda: stream.num_bytes, stream.drop)
        residents.add("text encoder", lambda: parts.text_encoder.device_bytes)
        if (encoder := parts.image_encoder) is not None:
            residents.add("image encoder", lambda: encoder.device_bytes)
        for name, one in zip(self._checkpoint.transformers, own, strict=True):
            residents.add(name, partial(getattr, one, "weight_bytes"))
        residents.add("vae", lambda: bytes_of(parts.vae.weights, decoder.weights))
        return residents

    def _compile_ahead(self) -> KernelsAhead:
        """Begin to compile the kernels that a first video needs."""
        config, device = self._checkpoint, self._device
        # Attention in e4m3 has kernels of ours. The exact kinds have none, whichever is chosen meanwhile.
        kernel: Kernel = "fa3-fp8" if self._attention_name == "fa3-fp8" else "sdpa"

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return load_kernel(kernel)(query, key, value)

        decoder = partial(compile_decoder, config.vae, device, first_choice(self._vae_dtype, device))
        blocks = partial(compile_blocks, config.transformer, device, self._dtype, attention, self._linears)
        return KernelsAhead(device, [decoder, blocks])

    def _build_transformers(self, parts: Components, attention: AttentionChoice) -> None:
        """Put the transformers that compute in place of the weights that were read."""
        pool = self._new_pool()
        modules = [module for module in (parts.transformer, parts.transformer_2) if module is not None]
        shard = shard_of(self._placement, rank=0)
        self._stream = stream_of(self._placement, shard)
        how = self._linears, self._weights_dtype, self._stream
        self._reader = reader = reader_of(self._checkpoint)
        self._own = own = [
            WanTransformer(module, attention, pool, *how, partial(reader.deltas, name=name))
            for name, module in zip(self._checkpoint.transformers, modules, strict=True)
        ]
        built = own if self._leader is None else self._leader.join(own, self._device_memory, shard)
        parts.transformer, parts.transformer_2 = built[0], built[1] if len(built) > 1 else None

    def _new_pool(self) -> Any:  # noqa: ANN401 - torch has no type for it
        """Memory for the graphs of both experts, which run one after the other."""
        return torch.cuda.graph_pool_handle() if self._has_graphs else None

    def make_room(self) -> None:
        if self._residents is not None:
            self._residents.make_room()
            self._note_memory()
        if self._leader is not None:
            self._leader.make_room()

    def _note_memory(self) -> None:
        if self._workspaces is not None:
            self._workspaces.note()

    def _passing_bytes(self) -> int:
        """Keys and values of prompts, LoRAs, and blocks that pass by."""
        streamed = 0 if self._stream is None else self._stream.num_bytes
        return streamed + sum(one.prompt_bytes + one.adapter_bytes for one in self._own)

    def _guidance(self) -> GuidanceMemory:
        if self._plan is not None and self._plan.mode_of(is_guided=True) == "cfg":
            return GuidanceMemory(tokens_together=0, passes_apart=1)  # each of two ranks has a branch
        config = self._checkpoint.transformer
        # What a branch that computes has of each token beside hidden states and the next addition, which both have:
        # see ``placement.bytes_wanted``.
        rows = max(6.0, 2 + config.ffn_dim / config.width)
        return GuidanceMemory(
            tokens_together=MAX_TOKENS_TOGETHER,
            passes_apart=(4 + rows) / (2 + rows),
        )

    @property
    def _texts(self) -> PaddedTexts | None:
        return None if self._parts is None else self._parts.texts

    def _graph_bytes(self) -> int:
        of_texts = 0 if self._texts is None else self._texts.graph_bytes
        return of_texts + sum(transformer.graph_bytes for transformer in self._own)

    def _drop_graphs(self) -> None:
        pool = self._new_pool()
        for transformer in self._own:
            transformer.drop_graphs(pool)
        if self._texts is not None:
            self._texts.drop_graphs()

    def close(self) -> None:
        self._parts = self._preview = self._decoder = self._prompts = self._residents = self._reader = None
        self._own, self._stream, self._workspaces = (), None, None
        if self._leader is not None:
            self._leader.close()
            self._leader = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self._device_memory is not None:
            self._device_memory.close()
            self._device_memory = None

    def read_loras(self, request: GenerationRequest) -> ReadLoras | None:
        """See ``engines/base.py``. Each rank reads them by itself, all at the same time."""
        if not request.loras:
            return None
        leader, reader, refs = self._leader, self._reader, self._loras_of(request)
        assert reader is not None, "load() was not called"
        files = list({(ref.digest, ref.path): ref for of_one in refs.values() for ref in of_one}.values())
        if leader is None or leader.mode_of(is_guided=request.guidance_scale > 1.0) is None:
            return ReadLoras(refs, [reader.read(ref) for ref in files])
        with leader.reading(files) as others:
            own = [reader.read(ref) for ref in files]
        return ReadLoras(refs, own, others)

    # As a decorator the mode is entered for each step and left at each yield; as a block it would stay on for
    # whatever else runs on the thread between two steps.
    @torch.inference_mode()
    def generate(
        self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None
    ) -> Generator[Output, None, None]:
        """See ``engines/base.py``."""
        try:
            with self._ahead.open():
                latents = yield from self.sample(request, inputs, resume)
                yield from self._decode(request, latents)
        except Exception as exc:
            if (meaning := meaning_of(exc)) is exc:
                raise
            raise meaning from exc
        finally:
            self._note_memory()

    @torch.inference_mode()
    def sample(
        self, request: GenerationRequest, inputs: Inputs = NO_INPUTS, resume: bytes | None = None
    ) -> Generator[Step, None, Tensor]:
        """The part of ``generate`` before decoding; returns the clean latents (1, c, f, h, w) float32."""
        check_inputs(inputs, self.capabilities)
        parts = self.parts
        noise = noise_ahead(request, parts) if resume is None else partial(make_noise, request, parts)
        conditioning = self._condition(request, inputs)
        solver, cache = self._plan_steps(request)  # while the device reads the prompt
        checkpointer = Checkpointer(self.facts, request)
        show, ahead = self._show, self._ahead
        steps = denoise(parts, solver, request, conditioning, cache, checkpointer, show, noise, ahead, resume)
        del noise  # while steps are yielded, nothing but the solver needs it
        if self._workspaces is not None:  # a film that is edited is encoded in the first turn
            steps = self._workspaces.watch_steps(request, steps, skips_first=inputs.film is not None)
        return (yield from steps)

    def _decode(self, request: GenerationRequest, latents: Tensor) -> Iterator[Frames]:
        chunks = decode(self.decoder, latents, self._outbox)
        self.decoder.drop_idle(but=(latents.shape[3], latents.shape[4]))
        if self._workspaces is None or self.decoder.idle_bytes:  # what waits for it was measured when it was recorded
            return chunks
        return self._workspaces.watch_decode(request, chunks)

    def _loras_of(self, request: GenerationRequest) -> dict[str, list[LoraRef]]:
        """By the names of transformers. Raises InvalidRequest when a file is gone or another one."""
        if not request.loras:
            return {}
        if self.loras is None:
            raise InvalidRequest("this worker has no LoRAs (engine.wan.loras)", param="loras")
        return self.loras.refs(request.loras)

    def _plan_steps(self, request: GenerationRequest) -> tuple[Solver, StepCache]:
        solver = make_solver(self._checkpoint.solver, request, self.parts.device)
        return solver, make_cache(self.parts, solver, request, is_used=self._has_step_cache)

    def _choose_attention(self) -> AttentionChoice:
        config = self._checkpoint.transformer
        heads, width = config.num_attention_heads, config.attention_head_dim
        return choose_attention(self._attention_name, self._device, self._dtype, heads, width)

    def _check_linears(self) -> None:
        config = self._checkpoint.transformer
        width = config.num_attention_heads * config.attention_head_dim
        check_linears(self._linears, self._device, self._dtype, width, config.ffn_dim)

    def _show(self, latents: Tensor) -> UInt8Array:
        if self._preview is None:
            self._preview = LatentPreview(self.parts)
        return self._preview.picture(latents)

    @property
    def parts(self) -> Components:
        """The loaded components; ``load`` comes first."""
        assert self._parts is not None, "load() was not called"
        return self._parts

    @property
    def decoder(self) -> VaeDecoder:
        """The decoder of the loaded VAE; ``load`` comes first."""
        assert self._decoder is not None, "load() was not called"
        return self._decoder

    def _condition(self, request: GenerationRequest, inputs: Inputs) -> Conditioning:
        assert self._prompts is not None, "load() was not called"
        is_guided = request.guidance_scale > 1.0
        texts = Conditioning(
            positive=self._prompts.encode(request.prompt),
            negative=self._prompts.encode(request.negative_prompt) if is_guided else None,
            images=encode_images(self.parts, inputs),
            loras=inputs.loras.refs if isinstance(inputs.loras, ReadLoras) else self._loras_of(request),
        )
        if (film := inputs.film) is not None:
            return replace(texts, film=partial(encode_frames, self.parts, film))
        if (first := inputs.first_frame) is None:
            return texts
        if self._checkpoint.has_image_channels:
            given = encode_given(self.parts, request.num_frames, first, inputs.last_frame)
            return replace(texts, channels=given)
        return replace(texts, first_frame=encode_frames(self.parts, first[None]))


def _drop_adapters(transformers: Sequence[WanTransformer]) -> None:
    for transformer in transformers:
        transformer.drop_adapters()


def _forget(prompts: PromptCache, transformers: Sequence[WanTransformer]) -> None:
    prompts.clear()
    for transformer in transformers:
        transformer.drop_prompts()
