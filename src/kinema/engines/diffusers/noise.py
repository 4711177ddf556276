"""torch's global random numbers, kept for each video: some pipelines draw from them beside their own generator."""

from __future__ import annotations

from types import TracebackType

import torch


class GlobalNoise:
    """The state of torch's global generators for one video, seeded by its request and in force within ``with``.

    Outside, they are as they were, so no video changes another one.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed: int | None = seed
        self._cuda = device if device.type == "cuda" else None
        self._own = self._others = self._state()

    def __enter__(self) -> None:
        self._others = self._state()
        if self._seed is None:
            self._set(self._own)
        else:
            torch.manual_seed(self._seed)
            self._seed = None

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._own = self._state()
        self._set(self._others)

    def _state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.get_rng_state(), None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def _set(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        cpu, cuda = state
        torch.set_rng_state(cpu)
        if self._cuda is not None and cuda is not None:
            torch.cuda.set_rng_state(cuda, self._cuda)
