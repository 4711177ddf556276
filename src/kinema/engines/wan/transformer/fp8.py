"""Linear layers that multiply e4m3 numbers: twice the rate of bfloat16, half the memory, and an error that is measured.

e4m3 (arXiv 2209.05433) has three bits after the first and ends at 448. Each row of a weight and each token of an input
is scaled so that its largest number is 448, and a product is scaled back once all is added up. On a CPU the same
numbers are multiplied in float32, exactly and slowly, so that what the mode does to a video can be seen without a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# What the blocks' large layers multiply: numbers of the weights' own type, or e4m3.
Linears = Literal["dtype", "fp8"]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# The largest number of a row is taken to be this at least, so that a row of zeros can be scaled.
SMALLEST = 1e-12
# The products' units take matrices whose sides are multiples of it.
_SIDE = 16
# The tensor cores may add up in a little less than float32: a product is 1.2 to 1.3 times as fast on an H100, and its
# error, 0.027 by the rounding to e4m3, grows by less than 0.0001; by up to 0.005 where the terms of a sum are alike.
_FAST_SUMS = True
# In units of the result: what a product may differ from the reference by, which rounds to bfloat16 too.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Scaled:
    """``values`` (rows, n) e4m3, each row times its own of ``scales`` (rows, 1) float32."""

    values: Tensor
    scales: Tensor

    def restored(self) -> Tensor:
        """In float32."""
        return self.values.float() * self.scales


@dataclass(frozen=True)
class Fp8Linear:
    """``weight`` (out, in) e4m3 times ``scales`` (1, out) float32, and ``bias`` (out,) in the type of the result."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Self:
        """Of a layer's ``weight`` (out, in)."""
        scaled = quantise(weight)
        return cls(scaled.values, scaled.scales.t().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """(.., out) of (.., in)."""
        return self._multiply(quantise(_rows(x))).view(*x.shape[:-1], -1)

    def after_gelu(self, x: Tensor) -> Tensor:
        """The same of GELU of ``x``, in its tanh form, which is not rounded before it is scaled."""
        return self._multiply(quantise_gelu(_rows(x))).view(*x.shape[:-1], -1)

    def _multiply(self, rows: Scaled) -> Tensor:
        if rows.values.is_cuda:
            return torch._scaled_mm(
                rows.values,
                self.weight.t(),
                scale_a=rows.scales,
                scale_b=self.scales,
                bias=self.bias,
                out_dtype=self.bias.dtype,
                use_fast_accum=_FAST_SUMS,
            )
        return multiply_exactly(rows, self)


def multiply_exactly(rows: Scaled, layer: Fp8Linear) -> Tensor:
    """The product of both in float32, rounded once; on any device. What ``_scaled_mm`` is held against."""
    product = rows.values.float() @ layer.weight.float().t()
    return (product * rows.scales * layer.scales + layer.bias.float()).to(layer.bias.dtype)


def quantise(rows: Tensor) -> Scaled:
    """Of (rows, n), contiguous."""
    if rows.is_cuda:
        from kinema.engines.wan.transformer import fp8_kernels  # noqa: PLC0415 - Triton is for CUDA alone

        return Scaled(*fp8_kernels.scale_rows(rows, has_gelu=False))
    return quantise_plainly(rows)


def quantise_gelu(rows: Tensor) -> Scaled:
    """Of GELU of (rows, n), contiguous."""
    if rows.is_cuda:
        from kinema.engines.wan.transformer import fp8_kernels  # noqa: PLC0415 - the same

        return Scaled(*fp8_kernels.scale_rows(rows, has_gelu=True))
    return quantise_plainly(gelu(rows.float(), approximate="tanh"))


def quantise_plainly(rows: Tensor) -> Scaled:
    """In torch, on any device."""
    x = rows.float()
    largest = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    return Scaled((x * (LARGEST / largest)).to(E4M3), largest / LARGEST)


def check_linears(linears: Linears, device: torch.device, dtype: torch.dtype, width: int, ffn_width: int) -> None:
    """Raises ConfigError when the layers of such a model cannot be multiplied like this here."""
    if linears == "dtype":
        return
    reason = _why_not(device, dtype, width, ffn_width)
    if reason is not None:
        raise ConfigError(f"engine.linears = 'fp8' cannot be used here: {reason}")
    if device.type == "cpu":
        log.info("fp8 linears on a CPU: the numbers of a GPU's, at no gain in time")


def _why_not(device: torch.device, dtype: torch.dtype, width: int, ffn_width: int) -> str | None:
    """What would be accepted in place of what is given."""
    if width % _SIDE or ffn_width % _SIDE:
        return f"the model's layers have {width} and {ffn_width} channels; multiples of {_SIDE} would do"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the device is {device}; cuda or cpu would do"
    if dtype != torch.bfloat16:
        return f"engine.dtype is {str(dtype).removeprefix('torch.')}; on cuda bfloat16 would do"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; sm_89 or newer would do"
    return _try_out(device)


@torch.inference_mode()
def _try_out(device: torch.device) -> str | None:
    """Whether this torch has the product for this GPU, and it is right."""
    rows, weight = (torch.randn(size, 64, device=device, dtype=torch.bfloat16) for size in (48, 32))
    layer = Fp8Linear.of(weight, weight[:, 0].contiguous())
    try:
        made, exact = layer(rows), multiply_exactly(quantise_plainly(rows), layer)
    except RuntimeError as exc:
        return " ".join(str(exc).split())[:200]
    error = ((made.float() - exact.float()).norm() / exact.float().norm()).item()
    return None if error <= _TOLERANCE else f"its error is {error:.3f} on this GPU; {_TOLERANCE} at most would do"


def _rows(x: Tensor) -> Tensor:
    """(rows, n), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
