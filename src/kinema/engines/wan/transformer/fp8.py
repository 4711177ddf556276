"""Linear layers whose weights are e4m3 numbers: half the memory of bfloat16, and an error that is measured.

``Fp8Linear`` also multiplies in e4m3, at twice the rate of bfloat16. A CPU multiplies the same numbers in float32
(``fp8_operations.py``), so that what the mode does to a video can be seen without a GPU. ``StoredLinear`` multiplies in
the type of its input, on any device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kinema.engines.wan.transformer.fp8_operations import Fp8Operations, ScaledRows, TorchFp8Operations, quantise
from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# What the blocks' large layers multiply: numbers of the weights' own type, or e4m3.
Linears = Literal["dtype", "fp8"]
# How large layers are kept: in the weights' own type, or in e4m3, from which a weight is restored for each product.
WeightsDtype = Literal["dtype", "fp8"]

# The sides of a matrix are multiples of it, as the units that multiply want them.
_SIDE = 16
# In units of the result: what a product may differ from the reference by, which rounds to bfloat16 too.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Fp8Linear:
    """A layer: ``weight`` (out, in) e4m3 times ``scales`` (1, out) float32, and ``bias`` (out,) in the type of the
    result.

    ``operations`` are those of the weight's device.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor
    operations: Fp8Operations

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, operations: Fp8Operations) -> Self:
        """A layer with ``weight`` (out, in), which is quantised here."""
        scaled = operations.quantise(weight)
        return cls(scaled.values, scaled.scales.t().contiguous(), bias, operations)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's result (.., out) for ``x`` (.., in)."""
        rows = self.operations.quantise(_rows(x))
        return self.operations.multiply(rows, self.weight, self.scales, self.bias).view(*x.shape[:-1], -1)

    def after_gelu(self, x: Tensor) -> Tensor:
        """The layer's result (.., out) for GELU of ``x`` (.., in), in its tanh form."""
        rows = self.operations.quantise_gelu(_rows(x))
        return self.operations.multiply(rows, self.weight, self.scales, self.bias).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class StoredLinear:
    """A layer that is kept in e4m3 and multiplies like a ``Linear``: ``rows`` (out, in), and ``bias`` (out,) in the
    type of the product."""

    rows: ScaledRows
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Self:
        """A layer with ``weight`` (out, in), which is quantised here."""
        return cls(quantise(weight), bias)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in the bias's type, restored anew each time."""
        return self.rows.restored(self.bias.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's result (.., out) for ``x`` (.., in)."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


def choose_fp8_operations(device: torch.device) -> Fp8Operations:
    """The kernels on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TorchFp8Operations()
    from kinema.engines.wan.transformer.fp8_kernels import TritonFp8Operations  # noqa: PLC0415 - Triton needs CUDA

    return TritonFp8Operations()


def check_linears(linears: Linears, device: torch.device, dtype: torch.dtype, width: int, ffn_width: int) -> None:
    """Raises ConfigError when a model whose layers have these widths cannot be multiplied like this on this device."""
    if linears == "dtype":
        return
    reason = _why_not(device, dtype, width, ffn_width)
    if reason is not None:
        raise ConfigError(f"engine.wan.linears = 'fp8' cannot be used here: {reason}")
    if device.type == "cpu":
        log.info("fp8 linears on a CPU: the numbers of a GPU's, at no gain in time")


def _why_not(device: torch.device, dtype: torch.dtype, width: int, ffn_width: int) -> str | None:
    """Why e4m3 cannot be multiplied here, and what would be accepted; None when it can."""
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
    """Why this torch has no right product for this GPU; None when it has."""
    rows, weight = (torch.randn(size, 64, device=device, dtype=torch.bfloat16) for size in (48, 32))
    layer, torchs = Fp8Linear.of(weight, weight[:, 0].contiguous(), choose_fp8_operations(device)), TorchFp8Operations()
    try:
        made, exact = layer(rows), torchs.multiply(torchs.quantise(rows), layer.weight, layer.scales, layer.bias)
    except RuntimeError as exc:
        return " ".join(str(exc).split())[:200]
    error = ((made.float() - exact.float()).norm() / exact.float().norm()).item()
    return None if error <= _TOLERANCE else f"its error is {error:.3f} on this GPU; {_TOLERANCE} at most would do"


def _rows(x: Tensor) -> Tensor:
    """``x`` (.., n) as a contiguous matrix (rows, n)."""
    return x.reshape(-1, x.shape[-1]).contiguous()
