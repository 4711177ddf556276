"""A device's clock and memory, its highest rates, and the time of the parts of a video alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kinema.engines.hardware import cpu_name
from kinema.engines.wan.conditioning import clean_prompt, encode_text
from kinema.engines.wan.decode import decode
from kinema.engines.wan.denoise import make_noise
from kinema.engines.wan.device_memory import forget_highest, highest
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.outbox import Outbox
from kinema.request.request import GenerationRequest

# The side of the matrices: large enough that a device is as fast as it gets.
_SIDE = {"cuda": 8192, "cpu": 1024}
_WARM_UPS, _TIMINGS = 3, 7


@dataclass(frozen=True)
class Ceilings:
    """The highest rates of the device in this process, in FLOP/s: of one product of two matrices, ``side`` x ``side``,
    and of self-attention over ``num_tokens`` by the kernel that the engine uses."""

    products: float
    side: int
    attention: float
    num_tokens: int
    kernel: str


class Gauge:
    """One device's clock and memory."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._is_cuda else cpu_name()

    def now(self) -> float:
        """Seconds on a clock, once the device has done all that it was given."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def time(self, work: Callable[[], object]) -> float:
        """Seconds from an idle device to one that has done the work."""
        started = self.now()
        work()
        return self.now() - started

    def forget_peak(self) -> None:
        """Free what is not in use, so that the next peak counts only what follows."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            forget_highest(self._device)

    def peak_bytes(self) -> int | None:
        """The most memory of the device that this process held, the pools of graphs included; None on the CPU."""
        return highest(self._device).held if self._is_cuda else None


def count_text_tokens(engine: WanEngine, prompt: str) -> int:
    """The number of tokens that the text encoder gets for this prompt."""
    return len(engine.parts.tokenizer.tokens(clean_prompt(prompt)))


@torch.inference_mode()
def measure_ceilings(engine: WanEngine, num_tokens: int, heads: int, width: int) -> Ceilings:
    """Medians of several timings, in the type of the engine's weights; ``width`` is that of one attention head."""
    device, dtype = engine.parts.device, getattr(torch, engine.facts.dtype)
    gauge = Gauge(engine.device)
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products_s = _median_s(gauge, lambda: left @ right)
    attention = engine.parts.transformer.forward.attention
    query, key, value = torch.randn(1, num_tokens, 3, heads, width, device=device, dtype=dtype).unbind(2)
    attention_s = _median_s(gauge, lambda: attention(query, key, value))
    return Ceilings(
        products=2 * side**3 / products_s,
        side=side,
        attention=4 * num_tokens**2 * heads * width / attention_s,
        num_tokens=num_tokens,
        kernel=engine.facts.attention or "",
    )


@torch.inference_mode()
def time_text(engine: WanEngine, prompts: list[str], gauge: Gauge) -> float:
    """Seconds that the text encoder takes for these prompts."""
    return _median_s(gauge, lambda: [encode_text(engine.parts, prompt) for prompt in prompts])


@torch.inference_mode()
def time_decode(engine: WanEngine, request: GenerationRequest, gauge: Gauge, runs: int) -> float:
    """Seconds from a video's latents, here noise, to its last frames on the host; a first decode does not count."""
    latents, outbox = make_noise(request, engine.parts), Outbox()

    def decode_all() -> None:
        for _ in decode(engine.decoder, latents, outbox):
            pass

    decode_all()
    return statistics.median(gauge.time(decode_all) for _ in range(runs))


@torch.inference_mode()
def time_convert(engine: WanEngine, request: GenerationRequest, gauge: Gauge) -> float:
    """Seconds from the decoder's numbers to an encoder's planes on the host, for all pictures of a video.

    In a decode the device does this while the host handles the pictures before, so only a part of it is waited for.
    """
    weights, config, outbox = engine.decoder.weights, engine.parts.vae.config, Outbox()
    patch = weights.patch_size
    shape = (request.height // patch, request.width // patch, 3 * patch**2)
    raw = torch.randn((config.scale_factor_temporal, *shape), device=engine.parts.device)

    def send(pictures: Tensor) -> None:
        outbox.send(engine.decoder.operations.to_planes(pictures, patch), pictures.sum()).wait()

    first_s, later_s = (_median_s(gauge, partial(send, pictures)) for pictures in (raw[:1], raw))
    num_later: int = (request.num_frames - 1) // config.scale_factor_temporal
    return first_s + num_later * later_s


def _median_s(gauge: Gauge, work: Callable[[], object]) -> float:
    for _ in range(_WARM_UPS):
        work()
    return statistics.median(gauge.time(work) for _ in range(_TIMINGS))
