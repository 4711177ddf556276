"""What multiplies in a transformer: layers by their kinds, two with GELU between them, and layers with LoRAs.

Letters: r rank, n parts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinema.engines.wan.transformer.fp8 import Fp8Linear, StoredLinear


@dataclass(frozen=True)
class Linear:
    """A layer with ``weight`` (out, in) and ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


# A layer that multiplies in the type of its input. A ``StoredLinear`` makes its weight when it is asked for it.
PlainLinear = Linear | StoredLinear
# A layer and GELU of its result, in one.
GeluLinear = Callable[[Tensor, PlainLinear], Tensor]


@dataclass(frozen=True)
class FeedForward:
    """Two layers with GELU between them, which belongs to the first one's product."""

    up: PlainLinear
    down: PlainLinear

    def __call__(self, x: Tensor, gelu_linear: GeluLinear) -> Tensor:
        return self.down(gelu_linear(x, self.up))


@dataclass(frozen=True)
class Fp8FeedForward:
    """The same two layers in e4m3, where GELU belongs to the scaling of the second one's input."""

    up: Fp8Linear
    down: Fp8Linear

    def __call__(self, x: Tensor, gelu_linear: GeluLinear) -> Tensor:  # noqa: ARG002 - it is that of the other kind
        return self.down.after_gelu(self.up(x))


@dataclass(frozen=True)
class Change:
    """What LoRAs add to a layer's result. Each of its ``parts`` has its first column and that part's matrices: ``up``
    (out, r) of the low rank, and the change of the ``whole`` weight (out, in). ``down`` (n r, in) are those of all
    parts, one after the other, and ``bias`` is (all out,).
    """

    parts: tuple[tuple[int, Tensor | None, Tensor | None], ...] = ()
    down: Tensor | None = None
    bias: Tensor | None = None

    def add(self, result: Tensor, x: Tensor) -> Tensor:
        """``result`` (.., out) of the layer for ``x`` (.., in), to which the change is added in place."""
        rows, results = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        low = None if self.down is None else torch.nn.functional.linear(rows, self.down)
        used = 0
        for column, up, whole in self.parts:
            if up is not None and low is not None:
                own, used = low[:, used : used + up.shape[1]], used + up.shape[1]
                results[:, column : column + len(up)].addmm_(own, up.t())
            if whole is not None:
                results[:, column : column + len(whole)].addmm_(rows, whole.t())
        return result


@dataclass(frozen=True)
class AdaptedLinear:
    """A layer and what LoRAs add to it."""

    base: PlainLinear | Fp8Linear
    change: Change

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) of the layer itself."""
        return self.base.weight

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.change.bias
        base = self.base if bias is None else replace(self.base, bias=self.base.bias + bias)
        return self.change.add(base(x), x)


@dataclass(frozen=True)
class AdaptedFeedForward:
    """Two layers with GELU between them, which comes after what the LoRAs add to the first one."""

    up: PlainLinear | Fp8Linear | AdaptedLinear
    down: PlainLinear | Fp8Linear | AdaptedLinear

    def __call__(self, x: Tensor, gelu_linear: GeluLinear) -> Tensor:  # noqa: ARG002 - it is that of layers alone
        return self.down(torch.ops.aten.gelu_(self.up(x), approximate="tanh"))


# A layer of a block, or of what reads prompts.
Layer = PlainLinear | Fp8Linear | AdaptedLinear
