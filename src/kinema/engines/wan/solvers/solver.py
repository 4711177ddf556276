"""What the denoising loop needs of a solver, and what all solvers share: the noise levels of a generation.

A flow-matching model predicts the velocity from clean latents to noise. At the noise level ``sigma`` latents are
``(1 - sigma) * clean + sigma * noise``, so the clean latents are ``latents - sigma * velocity``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kinema.errors import EngineFailed
from kinema.request.request import GenerationRequest


@dataclass(frozen=True)
class Schedule:
    """The noise levels and times of the steps that one generation takes.

    ``levels`` (steps + 1,) float32 lie on the CPU; the last one is where the last step ends. ``timesteps`` (steps,) lie
    on the device, and ``times`` are the same numbers where they can be read without waiting for it.
    """

    levels: Tensor
    timesteps: Tensor
    times: tuple[float, ...]
    num_train_timesteps: int

    @classmethod
    def of(
        cls,
        levels: Tensor,
        timesteps: Tensor,
        request: GenerationRequest,
        num_train_timesteps: int,
        device: torch.device,
    ) -> Self:
        """The last part of the request's levels (steps + 1,) and timesteps (steps,): an edit begins in the middle. No
        host waits."""
        begin = request.num_inference_steps - request.num_denoising_steps
        own = timesteps[begin:]
        return cls(levels[begin:], own.to(device, non_blocking=True), tuple(own.tolist()), num_train_timesteps)

    @property
    def sigmas(self) -> list[float]:
        """The noise level at which each step begins."""
        sigmas: list[float] = self.levels[:-1].tolist()
        return sigmas

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents with as much noise as the first step expects."""
        sigma = self.levels[0]
        return (1 - sigma).item() * clean + sigma.item() * noise


class Solver(Protocol):
    """The solver of one generation.

    ``predicted`` are the clean latents (1, c, f, h, w) float32 that its last step predicted. ``is_smooth`` says whether
    a step goes on from the latents that it was given, with no new noise, so that velocities change little from one step
    to the next.
    """

    schedule: Schedule
    is_smooth: bool

    @property
    def predicted(self) -> Tensor:
        """See above; there is none before the first step."""

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """The latents at the next noise level, float32; ``index`` counts this generation's steps from 0."""

    def state(self) -> dict[str, Tensor]:
        """What the next step needs beside the latents, by name. No later step changes these tensors."""

    def state_names(self, num_done: int) -> list[str]:
        """The names in ``state`` after so many steps."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state with these names, tensors (1, c, f, h, w) float32 on the device of the latents."""


def starts_of(
    request: GenerationRequest, num_train_timesteps: int, dtype: npt.DTypeLike = np.float64
) -> npt.NDArray[np.floating] | None:
    """The noise levels (steps,) that the request lists, before they are shifted; None when it lists none."""
    if request.timesteps is None:
        return None
    return np.array([time / num_train_timesteps for time in request.timesteps]).astype(dtype)


def shift(sigmas: npt.NDArray[np.floating], flow_shift: float | None) -> npt.NDArray[np.floating]:
    """Noise levels, moved towards 1 by a shift above 1. None leaves them."""
    if flow_shift is None:
        return sigmas
    shifted: npt.NDArray[np.floating] = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
    return shifted


def stretch(sigmas: npt.NDArray[np.floating], end: float | None) -> npt.NDArray[np.floating]:
    """Noise levels, stretched so that the last one is ``end``, if there is one."""
    if not end:
        return sigmas
    left: npt.NDArray[np.floating] = 1 - sigmas
    with np.errstate(invalid="ignore"):  # a single step has nothing to stretch, and is NaN
        left /= left[-1] / (1 - end)
    return 1 - left


def require_finite(request: GenerationRequest, are_finite: Iterable[bool]) -> None:
    """Raises EngineFailed for the first step whose values are not finite."""
    for number, is_finite in enumerate(are_finite, start=1):
        if not is_finite:
            raise EngineFailed(
                f"The solver's settings give values that are not finite at step {number} of "
                f"{request.num_denoising_steps}: the model's scheduler_config.json makes no sense with "
                f"num_inference_steps = {request.num_inference_steps} and flow_shift = {request.flow_shift or 1:g}."
            )
