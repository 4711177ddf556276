"""What a LoRA changes of one module. Letters: r rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """What one module gets: its weight grows by ``up @ down + weight``, and its bias by ``bias``, each times the
    strength of the LoRA.

    ``down`` (r, in) and ``up`` (out, r) are both there or both None. The scale alpha / r is in ``up``. ``weight`` is
    (out, in), for a norm (width,) and for a table (1, 6, width) or (1, 2, width). ``bias`` is (out,). The inputs of
    ``patch_embedding`` are the values of a patch, in the order of its weight. All are on the CPU, in the file's type
    (float16, bfloat16 or float32); what was multiplied by a scale other than 1 is float32, and not rounded.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up, self.weight, self.bias) if tensor is not None]
