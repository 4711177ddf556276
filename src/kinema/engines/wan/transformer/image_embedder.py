"""How a transformer reads the image states of an encoder, before its blocks make keys and values of them.

Layer norms, in float32, stand before and behind two layers with GELU between them. Letters: i width of image states, d
width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from kinema.engines.wan.transformer.layers import AdaptedLinear, Linear

# diffusers builds these norms with torch's own, whatever the ``eps`` of the rest.
_EPS = 1e-5


@dataclass(frozen=True)
class ImageEmbedder:
    """``norm_in`` (i,) and ``norm_out`` (d,) have float32 weights. A model that takes two pictures adds ``positions``
    (states, i) first, of which one picture alone has the first half; None in others.
    """

    positions: Tensor | None
    norm_in: Linear
    up: Linear | AdaptedLinear
    down: Linear | AdaptedLinear
    norm_out: Linear

    def __call__(self, states: Tensor) -> Tensor:
        """(states, d) of all pictures' states (states, i), in their type."""
        if self.positions is not None:
            states = states + self.positions[: len(states)]
        hidden = self.down(gelu(self.up(_norm(states, self.norm_in))))
        return _norm(hidden, self.norm_out)


def _norm(hidden: Tensor, affine: Linear) -> Tensor:
    return layer_norm(hidden.float(), hidden.shape[-1:], affine.weight, affine.bias, _EPS).to(hidden.dtype)
