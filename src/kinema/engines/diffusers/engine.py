"""The diffusers engine: any video pipeline of the library behind our protocol. Read ``generate`` first.

A step of the pipeline is a turn, so videos interleave and a cancelled one ends at its next step. After its last step
the pipeline decodes in one turn. There are no checkpoints: the library hands none out, so a lost video begins again.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kinema.engines.base import (
    NO_INPUTS,
    Frames,
    Inputs,
    Note,
    Output,
    StageReport,
    Step,
    UInt8Array,
    check_inputs,
    report_nothing,
)
from kinema.engines.diffusers.call_arguments import arguments_of
from kinema.engines.diffusers.compiled import compile_blocks, refuse_moved_blocks
from kinema.engines.diffusers.memory import Offload, Savings, free_bytes_of, place
from kinema.engines.diffusers.model_folder import Model
from kinema.engines.diffusers.noise import GlobalNoise
from kinema.engines.diffusers.pipeline_weights import read_pipeline
from kinema.engines.diffusers.progress import Pause, converted, pipeline_of_one_video
from kinema.engines.diffusers.request_loras import Adapters, NoAdapters
from kinema.engines.diffusers.turns import in_turns
from kinema.engines.failures import meaning_of
from kinema.engines.hardware import cpu_name
from kinema.engines.wan.loading import choose_device, choose_dtype, leave_cores
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.errors import ConfigError, EngineFailed, InvalidRequest, KinemaError
from kinema.manifest import EngineFacts
from kinema.media.sound import Int16Array, Sound, sound_of_frames
from kinema.request.capabilities import Capabilities
from kinema.request.request import GenerationRequest

log = logging.getLogger(__name__)

_FRAMES_PER_CHUNK = 4
# A client reads the reason; the library's text sometimes has whole tables.
_MAX_REASON_CHARS = 500
# The largest number of 16 bits.
_LOUDEST = 32767
_VERSIONS = ("diffusers", "transformers", "tokenizers")

# Reads a model in these types, the second for its VAE.
LoadPipeline = Callable[[Model, torch.dtype, torch.dtype], Any]


class DiffusersEngine:
    """Runs one model on one device.

    ``model_folder.inspect`` finds a model by its name. ``load`` reads it by ``load_pipeline``, by default
    ``read_pipeline``, and ``free_bytes`` says
    how much memory a device has for it; None is as much as there is. Raises ConfigError when the device cannot be used.
    """

    def __init__(
        self,
        model: Model,
        device: str = "auto",
        dtype: str = "auto",
        *,
        vae_dtype: str = "auto",
        savings: Savings = Savings(),  # noqa: B008 - it is frozen
        is_compiled: bool = False,
        loras: LoraLibrary | None = None,
        load_pipeline: LoadPipeline | None = None,
        free_bytes: Callable[[torch.device], int | None] = free_bytes_of,
    ) -> None:
        self._model = model
        self._capabilities = model.capabilities()
        self._device = choose_device(device)
        self._dtype = choose_dtype(dtype, self._device)
        self._vae_dtype = self._choose_vae_dtype(vae_dtype)
        self._savings = savings
        self._is_compiled = is_compiled
        self._load_pipeline = load_pipeline or partial(read_pipeline, quantization=savings.quantization)
        self._free_bytes = free_bytes
        self._offload: Offload = "none"
        self._loras = loras
        self._adapters: Adapters | NoAdapters = NoAdapters()
        self._pipelines: dict[str, Any] = {}
        self._facts: EngineFacts | None = None
        self._sound_rate = 0

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities if self._loras is None else self._loras.added_to(self._capabilities)

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def facts(self) -> EngineFacts:
        assert self._facts is not None, "load() was not called"
        return self._facts

    @property
    def is_lost(self) -> bool:
        """Never true: all of it is in this process."""
        return False

    @property
    def offload(self) -> Offload:
        """What lies in the host's memory, once the model is loaded."""
        return self._offload

    @property
    def memory(self) -> None:
        """Nobody measures it: each pipeline of the library has its own."""

    @property
    def loras_in_memory(self) -> Sequence[str]:
        return self._adapters.digests

    def read_loras(self, request: GenerationRequest) -> object:
        """See ``engines/base.py``."""
        return self._adapters.read(request.loras) if request.loras else None

    def load(self, report: StageReport = report_nothing) -> None:
        leave_cores(self._device)
        report("importing diffusers", None)
        import diffusers  # noqa: PLC0415 - seconds

        _quieten()
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # bitsandbytes reads to the one of this thread
        report("reading weights", None)
        try:
            loaded = self._load_pipeline(self._model, self._dtype, self._vae_dtype)
            report("moving weights to the device", None)
            self._offload = place(loaded, self._device, self._dtype, self._savings, self._free_bytes)
            if self._is_compiled:
                refuse_moved_blocks(self._offload, self._savings.quantization)
                compile_blocks(loaded)
            weights = self._model.weights_digest()
        except (OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, DamagedFile) as exc:
            if (meaning := meaning_of(exc)) is not exc:
                raise meaning from exc
            raise ConfigError(f"diffusers cannot load {self._model.name}: {_sentence(exc)}") from exc
        family = self._model.family
        if family.has_sound:
            self._sound_rate = _rate_of(loaded)
        if family.is_tiled:
            loaded.vae.enable_tiling()
        named = {family.text, family.image, family.first_last, family.film, family.control, family.frames}
        for name in named - {None}:
            self._pipelines[str(name)] = converted(loaded, getattr(diffusers, str(name)))
        if self._loras is not None:
            self._adapters = Adapters(self._lora_pipeline(loaded), self._loras)
        self._facts = self._facts_of(loaded, weights)

    def make_room(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._pipelines.clear()
        self._adapters = NoAdapters()
        if self._offload != "none":
            gc.collect()  # networks and what moves them know each other
        self.make_room()

    def generate(
        self,
        request: GenerationRequest,
        inputs: Inputs = NO_INPUTS,
        resume: bytes | None = None,  # noqa: ARG002 - there are no checkpoints, so this is never one of ours
    ) -> Generator[Output, None, None]:
        """See ``engines/base.py``."""
        self._check(request, inputs)
        try:
            with self._adapters.held(request, inputs.loras):
                video, sound = yield from self._steps(request, inputs)
            yield from self._frames(request, video, sound)
        except KinemaError:
            raise
        except Exception as exc:
            if (meaning := meaning_of(exc)) is not exc:
                raise meaning from exc
            raise EngineFailed(f"diffusers made no video: {_sentence(exc)}") from exc

    def _check(self, request: GenerationRequest, inputs: Inputs) -> None:
        """Raises EngineFailed for a request that was not resolved against the capabilities, and InvalidRequest for what
        no pipeline of the library is given."""
        check_inputs(inputs, self._capabilities)
        if request.solver is not None or request.timesteps is not None:
            raise InvalidRequest("the diffusers engine runs the model's own solver with even steps, and no other")

    def _steps(self, request: GenerationRequest, inputs: Inputs) -> Generator[Step, None, tuple[Tensor, Sound | None]]:
        """The pipeline's call, a step a turn. Returns the video (f, c, h, w), from 0 to 1, and its sound."""
        noise, count = GlobalNoise(request.seed, self._device), _Count(self._num_loops(request))
        turns = in_turns(partial(self._call, request, inputs), "diffusers")
        try:
            while True:
                self._adapters.switch(request.loras)
                with noise:
                    length = next(turns)
                yield count.step(length)
        except StopIteration as end:
            return _video_of(end.value), self._sound_of(end.value)
        finally:
            turns.close()

    def _call(self, request: GenerationRequest, inputs: Inputs, pause: Pause) -> Any:  # noqa: ANN401 - of diffusers
        """Make the whole video, on a thread of its own."""
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # of this thread
        pipeline = self._pipelines[self._model.family.pipeline_for(inputs) or ""]
        own = pipeline_of_one_video(pipeline, pause, request.guidance_scale)
        accepted = inspect.signature(type(pipeline).__call__).parameters
        arguments = arguments_of(self._model.family, request, inputs, accepted)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return own(**arguments, generator=generator, output_type="pt")

    def _frames(self, request: GenerationRequest, video: Tensor, sound: Sound | None) -> Generator[Output, None, None]:
        made, asked = tuple(video.shape), (request.num_frames, 3, request.height, request.width)
        if made != asked:
            yield Note(f"the video has {_shape(made)}, not {_shape(asked)}")
        if self._model.family.has_sound and sound is None:
            yield Note("the video is silent: the model gave no sound")
        if not self._model.family.has_prompt:
            yield Note("the prompt was ignored: the model makes its videos from a picture alone")
        # The first frame alone and then four at a time, as the wan engine has them.
        starts = [0, *range(1, len(video), _FRAMES_PER_CHUNK)]
        for index, (start, stop) in enumerate(zip(starts, [*starts[1:], len(video)], strict=True), start=1):
            heard = None if sound is None else sound_of_frames(sound, start, stop, request.fps)
            yield Frames(_pixels(video[start:stop]), index, len(starts), heard)

    def _sound_of(self, output: Any) -> Sound | None:  # noqa: ANN401 - of diffusers
        """The sound of a pipeline's output, at the rate of the part that makes it; None for a silent model."""
        made = getattr(output, "audio", None) if self._model.family.has_sound else None
        return None if made is None else Sound(_samples(made[0]), self._sound_rate)

    def _lora_pipeline(self, loaded: Any) -> Any:  # noqa: ANN401 - of diffusers
        """The pipeline that reads LoRAs: that of the folder, or another one over the same parts. Raises ConfigError."""
        for pipeline in (loaded, *self._pipelines.values()):
            if hasattr(pipeline, "load_lora_weights"):
                return pipeline
        raise ConfigError(f"engine.diffusers.loras: {type(loaded).__name__} reads no LoRAs; leave the setting out")

    def _num_loops(self, request: GenerationRequest) -> int:
        return self._model.family.num_loops(request.num_frames)

    def _choose_vae_dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            return torch.float32 if self._model.family.is_vae_float32 else self._dtype
        return choose_dtype(name, self._device)

    def _facts_of(self, pipeline: Any, weights: str) -> EngineFacts:  # noqa: ANN401 - of diffusers
        is_cuda = self._device.type == "cuda"
        return EngineFacts(
            engine="diffusers",
            weights=weights,
            dtype=str(self._dtype).removeprefix("torch."),
            decode_dtype=str(self._vae_dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(self._device) if is_cuda else cpu_name(),
            threads=None if is_cuda else torch.get_num_threads(),
            attention="diffusers default",
            weights_dtype=self._savings.weights_dtype,
            vae_tiling=True if self._savings.vae_tiling else None,
            compiled=True if self._is_compiled else None,
            solver=type(pipeline.scheduler).__name__,
            versions={"torch": str(torch.__version__), **{name: version(name) for name in _VERSIONS}},
        )


class _Count:
    """Counts the steps of all loops, of which ``num_loops`` are expected."""

    def __init__(self, num_loops: int) -> None:
        self._left = num_loops
        self._done = self._in_loop = self._before = 0

    def step(self, length: int) -> Step:
        """The step that is done now, of a loop of this length."""
        self._done += 1
        self._in_loop += 1
        total = self._before + length * self._left
        if self._in_loop == length and self._left > 1:
            self._before, self._in_loop, self._left = self._done, 0, self._left - 1
        return Step(self._done, max(total, self._done))


def _quieten() -> None:
    """Draw no bars into the terminal: the load reports its own stages. Write no prompts into the log: the libraries
    quote what they cut off, and the request's ``warnings`` have said so."""
    import diffusers  # noqa: PLC0415 - the caller has imported it
    import transformers  # noqa: PLC0415 - the same

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_is_no_prompt)


def _is_no_prompt(record: logging.LogRecord) -> bool:
    return "your input was trun" not in str(record.msg)  # two of the library's pipelines have a typing error behind it


def frames_of(output: Any) -> Any:  # noqa: ANN401 - of diffusers
    """The frames of the one video of a pipeline's output, as they are; Cosmos 3 has no list of videos."""
    return output.frames[0] if hasattr(output, "frames") else output.video


def _video_of(output: Any) -> Tensor:  # noqa: ANN401 - of diffusers
    """The one video (f, c, h, w) of a pipeline's output. Raises EngineFailed when it is none."""
    video: Tensor = frames_of(output)
    if not torch.isfinite(video).all():
        raise EngineFailed("the model gave values that are not finite")
    return video


def _pixels(frames: Tensor) -> UInt8Array:
    """Frames (f, c, h, w) from 0 to 1 as (f, h, w, c) uint8."""
    pixels: UInt8Array = (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def _samples(waves: Tensor) -> Int16Array:
    """Waves (n,) or (channels, n) from -1 to 1 as samples (n, 2); one channel is heard on both sides."""
    if not torch.isfinite(waves).all():
        raise EngineFailed("the model gave sound that is not finite")
    left_right = waves.float().cpu().reshape(-1, waves.shape[-1])[:2].expand(2, -1)
    samples: Int16Array = (left_right.clamp(-1, 1) * _LOUDEST).round().to(torch.int16).T.contiguous().numpy()
    return samples


def _rate_of(pipeline: Any) -> int:  # noqa: ANN401 - of diffusers
    """Samples a second of what the pipeline's last part makes."""
    return int(getattr(pipeline.vocoder.config, "output_sampling_rate", 0) or pipeline.audio_vae.config.sample_rate)


def _shape(shape: tuple[int, ...]) -> str:
    num_frames, _, height, width = shape
    return f"{num_frames} frames of {width}x{height}"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON_CHARS] or type(error).__name__
