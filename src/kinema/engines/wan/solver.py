"""From one noise level to the next: UniPC (arXiv 2302.04867) of order 1 or 2, as diffusers 0.42.1 computes it.

All coefficients follow from the noise levels, so they are computed when the solver is made: a step is a few operations
on tensors, and no host waits for one. Noise levels and timesteps are diffusers' own, and on the CPU every bit of a step
equals diffusers'. ``configs.py: SolverConfig`` refuses every other solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinema.engines.wan.configs import SolverConfig
from kinema.errors import EngineFailed
from kinema.request.request import GenerationRequest

# Pure noise has no signal, whose logarithm no step could take.
_LEAST_SIGNAL = 1e-6


@dataclass(frozen=True)
class Coefficients:
    """The coefficients, float32 numbers, of one update: from the sample at one noise level to that at the next.

    ``sample`` multiplies the sample, ``predicted`` the clean latents that were predicted last, and ``change`` a
    weighted sum of the predictions' changes. In that sum the change between the two last predictions is divided by
    ``ratio`` and has the weight ``old``, which is None for order 1; the change to the prediction at the new level,
    which only a corrector has, has the weight ``new``.
    """

    sample: float
    predicted: float
    change: float
    ratio: float
    old: float | None
    new: float

    @property
    def are_finite(self) -> bool:
        """Whether an update by them gives numbers. An infinite ratio does: its change counts for nothing."""
        by_old = 0.0
        if self.old is not None:
            by_old = self.old / self.ratio if self.ratio else math.inf
        return all(map(math.isfinite, (self.sample, self.predicted, self.change, by_old, self.new)))


@dataclass(frozen=True)
class SolverStep:
    """One step: its noise level, the predictor of the next sample, and the corrector of this one, None at the first."""

    sigma: float
    predictor: Coefficients
    corrector: Coefficients | None


class Solver:
    """The solver of one generation.

    ``predicted`` are the clean latents (1, c, f, h, w) that its last steps predicted, the newest last; ``last_sample``
    are the latents from which the last step began, corrected. Raises EngineFailed when the settings make no sense
    together, so that a step would give no numbers.
    """

    def __init__(self, config: dict[str, Any], request: GenerationRequest, device: torch.device) -> None:
        own = SolverConfig.model_validate(config)
        sigmas, timesteps = noise_levels(own, request.flow_shift, request.num_inference_steps)
        self.begin = request.num_inference_steps - request.num_denoising_steps
        self.num_train_timesteps: int = own.num_train_timesteps
        times = timesteps[self.begin :]
        # The same whole numbers on the device, and where they can be read without waiting for it.
        self.times: list[int] = times.tolist()
        self.timesteps: Tensor = times.to(device)
        self._order: int = own.solver_order
        self._is_bh1 = own.solver_type == "bh1"
        self._is_lower_at_the_end: bool = own.lower_order_final
        self._sigmas: Tensor = sigmas
        self.steps = [self._step_at(index) for index in range(len(self.times))]
        self._check(request)
        self.predicted: list[Tensor] = []
        self.last_sample: Tensor | None = None

    def num_predicted_after(self, num_done: int) -> int:
        """How many predictions it remembers after so many steps."""
        return min(num_done, self._order)

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents with as much noise as the first step expects."""
        sigma = self._sigmas[self.begin].item()
        return (1 - self._sigmas[self.begin]).item() * clean + sigma * noise

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """The latents at the next noise level, float32; ``index`` counts this generation's steps from 0."""
        step = self.steps[index]
        predicted = latents - step.sigma * velocity
        if step.corrector is not None:
            assert self.last_sample is not None
            latents = self._update(step.corrector, self.last_sample, predicted)
        self.predicted = [*self.predicted, predicted][-self._order :]
        self.last_sample = latents
        return self._update(step.predictor, latents)

    def _check(self, request: GenerationRequest) -> None:
        for number, step in enumerate(self.steps, start=1):
            updates = [step.predictor] if step.corrector is None else [step.predictor, step.corrector]
            if not all(update.are_finite for update in updates):
                raise EngineFailed(
                    f"The solver's settings give values that are not finite at step {number} of {len(self.steps)}: the "
                    "model's scheduler_config.json makes no sense with "
                    f"num_inference_steps = {request.num_inference_steps} and flow_shift = {request.flow_shift:g}."
                )

    def _update(self, by: Coefficients, sample: Tensor, corrected_by: Tensor | None = None) -> Tensor:
        """The sample at the next level. The operations have diffusers' order, so that they round alike."""
        newest = self.predicted[-1]
        moved = by.sample * sample - by.predicted * newest
        changes: Tensor | None = None
        if by.old is not None:
            changes = by.old * ((self.predicted[-2] - newest) / by.ratio)
        if corrected_by is not None:
            change = by.new * (corrected_by - newest)
            changes = change if changes is None else changes + change
        return moved if changes is None else moved - by.change * changes

    def _step_at(self, index: int) -> SolverStep:
        at = self.begin + index
        corrector = self._coefficients(at, self._order_of(index - 1), is_corrector=True) if index > 0 else None
        predictor = self._coefficients(at + 1, self._order_of(index), is_corrector=False)
        return SolverStep(self._sigmas[at].item(), predictor, corrector)

    def _order_of(self, index: int) -> int:
        """The order of a step: it uses no more predictions than exist, and the last steps use fewer."""
        left = len(self.times) - index if self._is_lower_at_the_end else self._order
        return min(self._order, left, index + 1)

    def _coefficients(self, target: int, order: int, *, is_corrector: bool) -> Coefficients:
        """The coefficients of the update to the noise level ``target`` from the one before it."""
        alpha, sigma = 1 - self._sigmas[target], self._sigmas[target]
        last = self._log_ratio(target - 1)
        width = self._log_ratio(target) - last
        ratio = (self._log_ratio(target - 2) - last) / width if order > 1 else torch.ones(())
        growth = torch.expm1(-width)
        bend = -width if self._is_bh1 else growth
        old, new = (None, 0.5) if order == 1 else (0.5, 0.0)
        if order > 1 and is_corrector:
            old, new = self._corrector_weights(ratio, -width, bend)
        has_changes = order > 1 or is_corrector
        return Coefficients(
            sample=(sigma / self._sigmas[target - 1]).item(),
            predicted=(alpha * growth).item(),
            # The bend of the last step may be infinite, where nothing is multiplied by it.
            change=(alpha * bend).item() if has_changes else 0.0,
            ratio=ratio.item(),
            old=old,
            new=new,
        )

    @staticmethod
    def _corrector_weights(ratio: Tensor, width: Tensor, bend: Tensor) -> tuple[float, float]:
        """The weights ``old`` and ``new``. ``width`` is negative, as the paper's h is for predicted clean latents."""
        first = torch.expm1(width) / width - 1
        second = first / width - 1 / 2
        points = torch.stack([ratio, torch.ones(())])
        powers = torch.stack([torch.pow(points, 0), torch.pow(points, 1)])
        weights = torch.linalg.solve(powers, torch.stack([first * 1 / bend, second * 2 / bend]))
        return weights[0].item(), weights[1].item()

    def _log_ratio(self, at: int) -> Tensor:
        """The logarithm of the signal's share divided by the noise's, float32."""
        return torch.log(1 - self._sigmas[at]) - torch.log(self._sigmas[at])


def noise_levels(config: SolverConfig, flow_shift: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """The noise levels (steps + 1,) float32, the last of them where the last step ends, and the times (steps,) int64.

    diffusers' ``UniPCMultistepScheduler.set_timesteps`` computes the same for flow matching.
    """
    scale = config.num_train_timesteps
    sigmas = np.linspace(1, 1 / scale, num_steps + 1)[:-1]
    sigmas = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
    if config.shift_terminal:
        left = 1 - sigmas
        with np.errstate(invalid="ignore"):  # a single step has nothing to stretch, and is NaN
            sigmas = 1 - left / (left[-1] / (1 - config.shift_terminal))
    if abs(sigmas[0] - 1) < _LEAST_SIGNAL:
        sigmas[0] -= _LEAST_SIGNAL
    end = sigmas[-1] if config.final_sigmas_type == "sigma_min" else 0.0
    levels = np.concatenate([sigmas, [end]]).astype(np.float32)
    return torch.from_numpy(levels), torch.from_numpy(sigmas * scale).to(torch.int64)
