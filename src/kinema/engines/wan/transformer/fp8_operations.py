"""What makes a matrix product out of e4m3 numbers, in torch; ``fp8_kernels.py`` does the same on CUDA.

e4m3 (arXiv 2209.05433) has three bits after the first and ends at 448. Each row of a matrix is scaled so that its
largest number is 448, and a product is scaled back when all is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# The largest number of a row is taken to be this at least, so that a row of zeros can be scaled.
SMALLEST = 1e-12


@dataclass(frozen=True)
class ScaledRows:
    """A matrix in e4m3: ``values`` (rows, n), each row multiplied by its own of ``scales`` (rows, 1) float32."""

    values: Tensor
    scales: Tensor

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, n) in this type, rounded once."""
        return self.values.to(dtype).mul_(self.scales)


def quantise(rows: Tensor) -> ScaledRows:
    """The matrix (rows, n) in e4m3: the same bits on every device."""
    largest = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST)
    # A tensor, since torch does not divide by a number on CUDA: it multiplies by the inverse.
    limit = torch.full_like(largest, LARGEST)
    return ScaledRows((rows * (limit / largest)).to(E4M3), largest / limit)


class Fp8Operations(Protocol):
    """The operations of layers in e4m3 on one device. Matrices are contiguous."""

    def quantise(self, rows: Tensor) -> ScaledRows:
        """The matrix (rows, n) in e4m3."""

    def quantise_gelu(self, rows: Tensor) -> ScaledRows:
        """GELU, in its tanh form, of the matrix (rows, n) in e4m3; it is not rounded before it is scaled."""

    def multiply(self, rows: ScaledRows, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        """The product (rows, out), plus ``bias`` (out,) and in its type; ``weight`` is (out, n) e4m3, its ``scales``
        are (1, out) float32.
        """


class TorchFp8Operations:
    """In float32 on any device, exactly and slowly: what the kernels are compared with."""

    def quantise(self, rows: Tensor) -> ScaledRows:
        return quantise(rows)

    def quantise_gelu(self, rows: Tensor) -> ScaledRows:
        return quantise(gelu(rows.float(), approximate="tanh"))

    def multiply(self, rows: ScaledRows, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        product = rows.values.float() @ weight.float().t()
        return (product * rows.scales * scales + bias.float()).to(bias.dtype)
