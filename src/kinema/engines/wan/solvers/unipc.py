"""UniPC (arXiv 2302.04867) of order 1 or 2, as diffusers 0.42.1 computes it.

All coefficients follow from the noise levels, so they are computed when the solver is made: a step is a few operations
on tensors, and no host waits for one. Noise levels and timesteps are diffusers' own, and on the CPU every bit of a step
equals diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kinema.engines.wan.configs import UniPCConfig
from kinema.engines.wan.solvers.solver import Schedule, require_finite, shift, starts_of, stretch
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

    @property
    def is_finite(self) -> bool:
        """Whether the step gives numbers."""
        return self.predictor.are_finite and (self.corrector is None or self.corrector.are_finite)


class UniPC:
    """The solver of one generation.

    It remembers the clean latents that its last steps predicted, and ``last_sample``, the latents from which the last
    step began, corrected. Raises EngineFailed when the settings make no sense together, so that a step would give no
    numbers.
    """

    is_smooth = True

    def __init__(self, config: UniPCConfig, request: GenerationRequest, device: torch.device) -> None:
        levels, timesteps = noise_levels(config, request)
        self.schedule = Schedule.of(levels, timesteps, request, config.num_train_timesteps, device)
        self._order: int = config.solver_order
        self._is_bh1 = config.solver_type == "bh1"
        self._is_lower_at_the_end: bool = config.lower_order_final
        self._sigmas: Tensor = self.schedule.levels
        self._steps = [self._step_at(index) for index in range(len(self.schedule.times))]
        require_finite(request, [step.is_finite for step in self._steps])
        # The newest last.
        self._predicted: list[Tensor] = []
        self._last_sample: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """See ``Solver``."""
        return self._predicted[-1]

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """See ``Solver``."""
        step = self._steps[index]
        predicted = latents - step.sigma * velocity
        if step.corrector is not None:
            assert self._last_sample is not None
            latents = self._update(step.corrector, self._last_sample, predicted)
        self._predicted = [*self._predicted, predicted][-self._order :]
        self._last_sample = latents
        return self._update(step.predictor, latents)

    def state(self) -> dict[str, Tensor]:
        """The last sample and the predictions, the newest last."""
        assert self._last_sample is not None, "no step was taken"
        return dict(zip(self._names(len(self._predicted)), [self._last_sample, *self._predicted], strict=True))

    def state_names(self, num_done: int) -> list[str]:
        """See ``Solver``."""
        return self._names(min(num_done, self._order))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Solver``."""
        self._last_sample, *self._predicted = (state[name] for name in self._names(len(state) - 1))

    @staticmethod
    def _names(num_predicted: int) -> list[str]:
        return ["last_sample", *(f"predicted.{i}" for i in range(num_predicted))]

    def _update(self, by: Coefficients, sample: Tensor, corrected_by: Tensor | None = None) -> Tensor:
        """The sample at the next level. The operations have diffusers' order, so that they round alike."""
        newest = self._predicted[-1]
        moved = by.sample * sample - by.predicted * newest
        changes: Tensor | None = None
        if by.old is not None:
            changes = by.old * ((self._predicted[-2] - newest) / by.ratio)
        if corrected_by is not None:
            change = by.new * (corrected_by - newest)
            changes = change if changes is None else changes + change
        return moved if changes is None else moved - by.change * changes

    def _step_at(self, index: int) -> SolverStep:
        corrector = self._coefficients(index, self._order_of(index - 1), is_corrector=True) if index > 0 else None
        predictor = self._coefficients(index + 1, self._order_of(index), is_corrector=False)
        return SolverStep(self._sigmas[index].item(), predictor, corrector)

    def _order_of(self, index: int) -> int:
        """The order of a step: it uses no more predictions than exist, and the last steps use fewer."""
        left = len(self.schedule.times) - index if self._is_lower_at_the_end else self._order
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


def noise_levels(config: UniPCConfig, request: GenerationRequest) -> tuple[Tensor, Tensor]:
    """The noise levels (steps + 1,) float32, the last of them where the last step ends, and the times (steps,) int64.

    diffusers' ``UniPCMultistepScheduler.set_timesteps`` computes the same for flow matching.
    """
    scale = config.num_train_timesteps
    starts = starts_of(request, scale)
    if starts is None:
        starts = np.linspace(1, 1 / scale, request.num_inference_steps + 1)[:-1]
    sigmas = stretch(shift(starts, request.flow_shift), config.shift_terminal)
    if abs(sigmas[0] - 1) < _LEAST_SIGNAL:
        sigmas[0] -= _LEAST_SIGNAL
    end = sigmas[-1] if config.final_sigmas_type == "sigma_min" else 0.0
    levels = np.concatenate([sigmas, [end]]).astype(np.float32)
    return torch.from_numpy(levels), torch.from_numpy(sigmas * scale).to(torch.int64)
