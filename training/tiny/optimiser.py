"""Muon for matrices, AdamW for the rest, and a running average of the weights.

Muon: https://kellerjordan.github.io/posts/muon/ - momentum made orthogonal by five Newton-Schulz steps.
Matrices of one shape are treated in one batch, so that a step is a few dozen launches and not a few thousand.
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(stack: Tensor) -> Tensor:
    """Move the singular values of (n, rows, columns) matrices, rows <= columns, close to one."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic of the post above
    x = stack.bfloat16() if stack.is_cuda else stack.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(stack.dtype)


class Muon:
    """Nesterov momentum, orthogonalised; convolution kernels count as matrices of (outputs, everything else)."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            rows, columns = parameter.flatten(1).shape
            self.groups[(min(rows, columns), max(rows, columns))].append(parameter)
        self.momentum = momentum
        self.buffers = {shape: [torch.zeros_like(p) for p in group] for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            gradients = [p.grad for p in group if p.grad is not None]
            buffers = self.buffers[shape]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, buffers, self.momentum)
            matrices = [g.flatten(1) if g.flatten(1).shape == shape else g.flatten(1).mT for g in ahead]
            updates = orthogonalise(torch.stack(matrices)).unbind(0)
            for parameter, turned in zip(group, updates, strict=True):
                rows, columns = parameter.flatten(1).shape
                update = turned if (rows, columns) == shape else turned.mT
                parameter.sub_(update.reshape(parameter.shape), alpha=lr * math.sqrt(max(1.0, rows / columns)))

    def state_dict(self) -> dict[tuple[int, int], list[Tensor]]:
        return self.buffers

    def load_state_dict(self, state: dict[tuple[int, int], list[Tensor]]) -> None:
        for shape, buffers in state.items():
            torch._foreach_copy_(self.buffers[shape], buffers)


class Optimiser:
    """Both optimisers over some modules; `is_matrix` names the parameters that Muon takes."""

    def __init__(self, modules: dict[str, nn.Module], matrices: set[str], adam_lr: float, muon_lr: float) -> None:
        named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        assert matrices <= named.keys(), sorted(matrices - named.keys())[:3]
        self.parameters = list(named.values())
        self.muon = Muon(p for n, p in named.items() if n in matrices)
        others = [p for n, p in named.items() if n not in matrices]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda)
        self.adam_lr, self.muon_lr = adam_lr, muon_lr
        self.averages = [p.detach().clone() for p in self.parameters]

    def step(self, lr_scale: float, average_decay: float) -> None:
        """One step at a share of the full learning rates, then the running average; never waits for the device."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * lr_scale
        self.adam.step()
        self.muon.step(self.muon_lr * lr_scale)
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - average_decay)
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange the weights and their running averages, in place."""
        current = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.detach() for p in self.parameters], self.averages)
        torch._foreach_copy_(self.averages, current)

    def state_dict(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict(), "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        torch._foreach_copy_(self.averages, state["averages"])


def learning_rate_share(progress: float, warm_up: float) -> float:
    """Linear warm-up over the first steps (warm_up in [0, 1]), then half a cosine over the time given."""
    return min(1.0, warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def average_decay(step: int, longest: float) -> float:
    """The average forgets the first weights quickly and later ones slowly."""
    return min(longest, (1 + step) / (10 + step))
