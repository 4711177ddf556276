"""What a decode takes of a GPU, counted by the sizes of its tensors, without a GPU: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinema.bench.wan.architectures import ARCHITECTURES
from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.placement import DECODE_BYTES
from kinema.engines.wan.vae import stream
from kinema.engines.wan.vae.decoder_operations import Sum
from kinema.engines.wan.vae.stream import Stream
from kinema.engines.wan.vae.weights import decoder_shapes, extract_weights


class Counted(TorchDispatchMode):
    """Counts the memory of all tensors that were made within it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self._held = 0
        self._tensors: dict[int, int] = {}  # by their storage

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._tensors:
                    self._held += storage.nbytes()
                    self.largest = max(self.largest, self._held)
                self._tensors[storage._cdata] = self._tensors.get(storage._cdata, 0) + 1
                weakref.finalize(tensor, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, storage: int, size: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self._held -= size


class KernelsMemory:
    """``DecoderOperations`` that take the memory of the kernels, and compute nothing."""

    def convolve(self, window: Tensor, weight: Tensor) -> Tensor:
        _, _, frames, height, width = window.shape
        return window.new_empty((1, frames - 2, height, width, len(weight))).permute(0, 4, 1, 2, 3)

    def normalise(self, parts: Sum, gain: Tensor, out: Tensor, *, kept: Tensor | None, has_silu: bool = True) -> None:
        pass

    def normalise_pairs(self, parts: Sum, gain: Tensor, before: Tensor, out: Tensor, *, kept: Tensor | None) -> None:
        pass

    def store(self, parts: Sum, out: Tensor) -> None:
        pass

    def enlarge(self, parts: Sum, num_parts: int = 1) -> Tensor:
        frames, height, width, channels = parts.value.shape
        size = (num_parts * frames, 2 * height, 2 * width, channels // num_parts)
        return torch.empty(size, dtype=parts.dtype, device="meta")

    def gather(self, taps: Tensor, bias: Tensor) -> Tensor:
        return taps.new_empty((*taps.shape[:3], len(bias)), dtype=torch.float32)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(value)

    def to_planes(self, raw: Tensor, patch_size: int) -> Tensor:
        frames, height, width = raw.shape[0], raw.shape[1] * patch_size, raw.shape[2] * patch_size
        return raw.new_empty((frames, height * 3 // 2, width), dtype=torch.uint8)


def convolve_pictures(pictures: Tensor, weight: Tensor) -> Tensor:
    return pictures.new_empty((*pictures.shape[:3], len(weight)))


@pytest.mark.parametrize(
    ("architecture", "kind", "beside"), [("wan2.1-t2v-1.3b", "2.1", 0.18), ("wan2.2-ti2v-5b", "2.2", 0.30)]
)
def test_what_is_planned_is_what_the_tensors_take(
    architecture: str, kind: str, beside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a share ``beside`` them for convolutions and the gaps between blocks of memory, measured on an H200."""
    monkeypatch.setattr(stream, "_convolve_pictures", convolve_pictures)
    config = VaeConfig.model_validate(ARCHITECTURES[architecture].configs["vae/config.json"])
    nothing = {
        name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in decoder_shapes(config).items()
    }
    weights = extract_weights(config, nothing, torch.float16, has_pairs=True)
    height, width = 30, 52
    num_pixels = height * width * config.factors[0] ** 2
    with Counted() as counted:
        decoding = Stream(weights, KernelsMemory(), height, width)
        decoding.begin()
        for _ in range(3):
            decoded = decoding.step(decoding.new_latent())
        assert len(decoded.raw) == config.factors[1]
    assert counted.largest / num_pixels * (1 + beside) == pytest.approx(DECODE_BYTES[kind], rel=0.01)
