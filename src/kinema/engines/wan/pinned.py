"""Memory of the host that a GPU reads by itself, at the full rate of its bus and beside what it computes.

torch rounds such memory up to a power of two, which for the blocks of a 14B model is 40 % more, and a piece for each
block could not be told apart in an error. So a large piece of plain memory is registered with CUDA as a whole.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kinema.errors import ConfigError


class HostMemory:
    """``data`` (n,) uint8 in the host's memory; after ``pin`` the GPU ``device`` can read it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.data = torch.empty(num_bytes, dtype=torch.uint8)
        self._device = device

    def pin(self) -> None:
        """Fix it in the host's memory, once it is written; nothing happens for a CPU. Raises ConfigError where the
        system does not give so much."""
        if self._device.type != "cuda":
            return
        address, size = self.data.data_ptr(), self.data.numel()
        code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))  # type: ignore[no-untyped-call]
        if code:
            raise ConfigError(
                f"the system does not let a GPU read {size / 1e9:.1f} GB of its memory (CUDA error {code}); give more "
                "memory, raise the limit of locked memory (ulimit -l), or set engine.offload = 'none'"
            )
        weakref.finalize(self, _release, address, self.data).atexit = False


def _release(address: int, _data: Tensor) -> None:
    """Called when nobody uses the memory any more; the tensor is kept until then."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
