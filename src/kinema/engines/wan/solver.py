"""From one noise level to the next: UniPC (arXiv 2302.04867) of order 1 or 2, as diffusers 0.42.1 computes it.

All that a step needs besides its tensors follows from the noise levels, so it is computed when the solver is made: a
step is a few operations that no host waits for. Noise levels and timesteps are diffusers' own, and on the CPU so is
every bit of a step. What a checkpoint's solver may be beyond that is refused in ``configs.py: SolverConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from kinema.request.request import GenerationRequest


@dataclass(frozen=True)
class Leap:
    """The coefficients of one update, each a float32 number: from the sample at one level to the one at the next.

    ``keeps`` goes with the sample, ``takes`` with the clean latents that were predicted last, ``bends`` with what the
    predictions' changes add. A change between the two last predictions is divided by ``ratio`` and weighs ``old``; the
    one to the prediction at the new level, which only a correction has, weighs ``new``. Of order 1 there is no ``old``.
    """

    keeps: float
    takes: float
    bends: float
    ratio: float
    old: float | None
    new: float


@dataclass(frozen=True)
class Level:
    """One step: its noise level, the prediction of the next sample, and the correction of this one when there is a step
    before.
    """

    sigma: float
    prediction: Leap
    correction: Leap | None


class Solver:
    """One generation's, from its first step on: ``predicted`` are the clean latents (1, c, f, h, w) of its last steps,
    the newest last, and ``last_sample`` is what the last step began from, corrected.
    """

    def __init__(self, config: dict[str, Any], request: GenerationRequest, device: torch.device) -> None:
        theirs = UniPCMultistepScheduler.from_config(config, flow_shift=request.flow_shift)
        theirs.set_timesteps(request.num_inference_steps)
        self.begin = request.num_inference_steps - request.num_denoising_steps
        self.num_train_timesteps: int = theirs.config.num_train_timesteps
        times = theirs.timesteps[self.begin :]
        # The same whole numbers on the device, and where they can be read without waiting for it.
        self.times: list[int] = times.tolist()
        self.timesteps: Tensor = times.to(device)
        self._order: int = theirs.config.solver_order
        self._is_bh1 = theirs.config.solver_type == "bh1"
        self._is_lower_at_the_end: bool = theirs.config.lower_order_final
        self._sigmas: Tensor = theirs.sigmas
        self.levels = [self._level(index) for index in range(len(self.times))]
        self.predicted: list[Tensor] = []
        self.last_sample: Tensor | None = None

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents as far under noise as the first step expects them."""
        sigma = self._sigmas[self.begin].item()
        return (1 - self._sigmas[self.begin]).item() * clean + sigma * noise

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """The latents at the next noise level, float32; ``index`` counts this generation's steps from 0."""
        level = self.levels[index]
        predicted = latents - level.sigma * velocity
        if level.correction is not None:
            assert self.last_sample is not None
            latents = self._leap(level.correction, self.last_sample, predicted)
        self.predicted = [*self.predicted, predicted][-self._order :]
        self.last_sample = latents
        return self._leap(level.prediction, latents)

    def _leap(self, leap: Leap, sample: Tensor, corrected_by: Tensor | None = None) -> Tensor:
        """In the order of diffusers' operations, so that they round alike."""
        newest = self.predicted[-1]
        moved = leap.keeps * sample - leap.takes * newest
        bent: Tensor | None = None
        if leap.old is not None:
            bent = leap.old * ((self.predicted[-2] - newest) / leap.ratio)
        if corrected_by is not None:
            change = leap.new * (corrected_by - newest)
            bent = change if bent is None else bent + change
        return moved if bent is None else moved - leap.bends * bent

    def _level(self, index: int) -> Level:
        at = self.begin + index
        correction = self._coefficients(at, self._order_of(index - 1), is_correction=True) if index > 0 else None
        prediction = self._coefficients(at + 1, self._order_of(index), is_correction=False)
        return Level(self._sigmas[at].item(), prediction, correction)

    def _order_of(self, index: int) -> int:
        """A step uses no more predictions than there are, and the last ones fewer."""
        left = len(self.times) - index if self._is_lower_at_the_end else self._order
        return min(self._order, left, index + 1)

    def _coefficients(self, target: int, order: int, *, is_correction: bool) -> Leap:
        """Of the update to the level ``target`` from the one before it."""
        alpha, sigma = 1 - self._sigmas[target], self._sigmas[target]
        last = self._log_ratio(target - 1)
        width = self._log_ratio(target) - last
        ratio = (self._log_ratio(target - 2) - last) / width if order > 1 else torch.ones(())
        growth = torch.expm1(-width)
        bend = -width if self._is_bh1 else growth
        old, new = (None, 0.5) if order == 1 else (0.5, 0.0)
        if order > 1 and is_correction:
            old, new = self._corrector_weights(ratio, -width, bend)
        return Leap(
            keeps=(sigma / self._sigmas[target - 1]).item(),
            takes=(alpha * growth).item(),
            bends=(alpha * bend).item(),
            ratio=ratio.item(),
            old=old,
            new=new,
        )

    @staticmethod
    def _corrector_weights(ratio: Tensor, width: Tensor, bend: Tensor) -> tuple[float, float]:
        """``width`` is negative here, as the paper's h is for predictions of clean latents."""
        first = torch.expm1(width) / width - 1
        second = first / width - 1 / 2
        points = torch.stack([ratio, torch.ones(())])
        powers = torch.stack([torch.pow(points, 0), torch.pow(points, 1)])
        weights = torch.linalg.solve(powers, torch.stack([first * 1 / bend, second * 2 / bend]))
        return weights[0].item(), weights[1].item()

    def _log_ratio(self, at: int) -> Tensor:
        """The logarithm of the signal's part over the noise's, float32."""
        return torch.log(1 - self._sigmas[at]) - torch.log(self._sigmas[at])
