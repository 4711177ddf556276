"""What a LoRA changes of one module, and how a generation names a LoRA. Letters: r rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
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


# What the modules of one transformer get, by diffusers' names.
Deltas = Mapping[str, Delta]


@dataclass(frozen=True)
class LoraRef:
    """A LoRA of a generation on one transformer, ``strength`` times: plain data, which other processes of the host can
    read. ``path``, ``second`` and ``only`` are those of ``read_lora``, whose ``digest`` it has.
    """

    path: Path
    digest: str
    strength: float
    second: Path | None = None
    only: str | None = None

    def to_json(self) -> dict[str, Any]:
        """It as ``from_json`` reads it."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """One that another process sent."""
        second = values["second"]
        paths = {"path": Path(values["path"]), "second": None if second is None else Path(second)}
        return cls(**{**values, **paths})
