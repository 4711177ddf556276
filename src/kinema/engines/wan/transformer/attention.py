"""Self-attention: which kernel runs it, on this device and at this length.

Three are exact: FlashAttention 3 (the package fa3-fwd, Hopper only), cuDNN's, and whatever torch's
``scaled_dot_product_attention`` chooses. ``auto`` is FA3 on Hopper where the package is installed: it was the fastest
there at every length, so no start spends a second on measuring it. On other GPUs a start measures FA3 and cuDNN's
with a short and a long sequence, and chooses cuDNN's only where that is clearly faster, so that two starts on one kind
of device choose the same. A fourth kernel, FA3 in e4m3, is not exact and runs only where it is named.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kinema.engines.wan.transformer.fa3 import has_fa3, load_fa3
from kinema.engines.wan.transformer.fp8_attention import load_fp8_attention
from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# (query, key, value) -> out, (b, tokens, heads, head_dim) each; the first three may be views of one tensor.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Kernel = Literal["fa3", "cudnn", "sdpa", "fa3-fp8"]
AttentionName = Literal["auto", "fa3", "cudnn", "sdpa", "fa3-fp8"]
# The kernels of the package fa3-fwd.
_FA3_KERNELS: tuple[Kernel, ...] = ("fa3", "fa3-fp8")

# The compute capability of the GPUs that FA3 was written for: H100 and H200.
_HOPPER = (9, 0)
# Sequences of so many tokens or more are long.
LONG_TOKENS = 16_384
# The lengths that are measured: 832x480 with 17 and 81 frames.
_SHORT_SAMPLE, _LONG_SAMPLE = 7_800, 32_760
# By so much must the other kernel be faster.
_CLEARLY = 1.1
_NUM_TIMINGS = 5
# By how much of its result a kernel may be wrong for random numbers; e4m3 has three bits, and errors that cancel out.
_TOLERANCE, _TOLERANCE_FP8 = 0.02, 0.1


@dataclass(frozen=True)
class AttentionChoice:
    """The kernels of short and of long sequences."""

    short: Kernel
    long: Kernel

    def __post_init__(self) -> None:
        """Load both kernels, so that no call imports one. Raises ImportError where a package is missing."""
        for name in (self.short, self.long):
            load_kernel(name)

    @property
    def name(self) -> str:
        if self.short == self.long:
            return self.short
        return f"{self.short}, {self.long} from {LONG_TOKENS} tokens"

    def at(self, num_tokens: int) -> Kernel:
        """The kernel for so many tokens."""
        return self.short if num_tokens < LONG_TOKENS else self.long

    @property
    def has_fa3(self) -> bool:
        """Whether the package fa3-fwd computes."""
        return self.short in _FA3_KERNELS or self.long in _FA3_KERNELS

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return load_kernel(self.at(query.shape[1]))(query, key, value)


def choose_attention(
    name: AttentionName, device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> AttentionChoice:
    """The kernels for a setting; ``width`` is a head's. Raises ConfigError for a kernel that cannot run here."""
    if name == "sdpa":
        return AttentionChoice("sdpa", "sdpa")
    if name != "auto":
        reason = _why_not(name, device, dtype, width)
        if reason is not None:
            raise ConfigError(f"engine.wan.attention = {name!r} cannot be used here: {reason}")
        return AttentionChoice(name, name)
    if device.type != "cuda":
        return AttentionChoice("sdpa", "sdpa")
    chosen = _choose(device, dtype, heads, width)
    log.info("attention auto: chose %s", chosen.name)
    return chosen


def _choose(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> AttentionChoice:
    """FA3 on Hopper, else the fastest of the kernels that run here, else torch's own choice."""

    def usable(*kernels: Kernel) -> list[Kernel]:
        found: list[Kernel] = []
        for kernel in kernels:
            reason = _why_not(kernel, device, dtype, width)
            if reason is None:
                found.append(kernel)
            else:
                log.info("attention auto: not %s: %s", kernel, reason)
        return found or ["sdpa"]

    found = usable("fa3", "cudnn")
    if found[0] == "fa3" and torch.cuda.get_device_capability(device) == _HOPPER:
        return AttentionChoice("fa3", "fa3")
    short, long = (_fastest(found, tokens, device, dtype, heads, width) for tokens in (_SHORT_SAMPLE, _LONG_SAMPLE))
    return AttentionChoice(short, long)


def _fastest(
    kernels: list[Kernel], tokens: int, device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> Kernel:
    """The fastest kernel. The first one is expected to be it, and is kept unless another is clearly faster."""
    expected = kernels[0]
    if len(kernels) == 1:
        return expected
    sample = _sample(tokens, device, dtype, heads, width)
    times_ms = {kernel: _time_ms(load_kernel(kernel), sample) for kernel in kernels}
    log.info("attention auto: %d tokens, %d heads: %s ms", tokens, heads, _listed(times_ms))
    fastest = min(kernels, key=times_ms.__getitem__)
    return fastest if times_ms[expected] > _CLEARLY * times_ms[fastest] else expected


def _listed(times_ms: dict[Kernel, float]) -> str:
    return ", ".join(f"{kernel} {time:.2f}" for kernel, time in times_ms.items())


@torch.inference_mode()
def _time_ms(kernel: Attention, sample: tuple[Tensor, Tensor, Tensor]) -> float:
    kernel(*sample)
    times_ms: list[float] = []
    for _ in range(_NUM_TIMINGS):
        start, end = _event(), _event()
        start.record()
        kernel(*sample)
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _sample(
    tokens: int, device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, as views of one tensor like those of the blocks."""
    fused = torch.randn(1, tokens, 3, heads, width, device=device, dtype=dtype)
    query, key, value = fused.unbind(2)
    return query, key, value


def _why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernel cannot run here, found by running it; None when it can."""
    if device.type != "cuda":
        return f"it runs on CUDA alone, and the device is {device}"
    if kernel in _FA3_KERNELS and not has_fa3():
        return "the package fa3-fwd is missing"
    if kernel == "fa3-fp8" and dtype != torch.bfloat16:
        return f"it gives bfloat16, and engine.dtype is {str(dtype).removeprefix('torch.')}"
    try:
        sample = _sample(256, device, dtype, 2, width)
        made, exact = load_kernel(kernel)(*sample), _sdpa(*sample)
        if kernel == "fa3-fp8":
            error = ((made.float() - exact.float()).norm() / exact.float().norm()).item()
            return None if error <= _TOLERANCE_FP8 else f"its error is {error:.2f}, and {_TOLERANCE_FP8} is expected"
        is_close = torch.allclose(made, exact, rtol=_TOLERANCE, atol=_TOLERANCE)
    except (RuntimeError, ImportError, AttributeError, AssertionError) as exc:
        return " ".join(str(exc).split())[:200] or type(exc).__name__
    return None if is_close else "its results are not those of torch's own kernel"


@cache
def load_kernel(name: Kernel) -> Attention:
    """The kernel of this name; what it needs is imported once. Raises ImportError where its package is missing."""
    match name:
        case "fa3":
            return _load_fa3()
        case "fa3-fp8":
            return load_fp8_attention()
        case "cudnn":
            return _cudnn
        case "sdpa":
            return _sdpa


def _load_fa3() -> Attention:
    fa3 = load_fa3()
    return lambda query, key, value: fa3(query, key, value, None)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)
