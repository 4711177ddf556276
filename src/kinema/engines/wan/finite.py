"""Values that are not finite: noticed where a step is waited for, and named after the part that gave them.

Damaged weights give NaN or infinity, and from then on every value of a video is one. The solver's part in a step is
looked at before the first one (``solvers/``), so here it is never to blame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.conditioning import Conditioning
from kinema.errors import EngineFailed, InvalidRequest, KinemaError


@dataclass(frozen=True)
class Arrival:
    """Latents that the device was asked for, as the host waits for them."""

    total: Tensor
    made: torch.cuda.Event | None

    def wait(self) -> bool:
        """Return when the latents are computed: whether all of them are finite.

        Without it the host would queue all steps at once: a cancel, or a generation that should go first, would wait
        for the last of them, and nobody would know what a step takes.
        """
        if self.made is not None:
            self.made.synchronize()
        return math.isfinite(self.total.item())


def expect(latents: Tensor) -> Arrival:
    """What to wait for until these latents are computed. The answer is on the host when the wait is over."""
    total = latents.sum()
    if not latents.is_cuda:
        return Arrival(total, None)
    total = torch.empty((), pin_memory=True).copy_(total, non_blocking=True)
    # A thread that waits for such an event sleeps, and leaves its core to others.
    made = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    made.record(torch.cuda.current_stream(latents.device))
    return Arrival(total, made)


def explain(conditioning: Conditioning, latents: Tensor, at: str, transformer: str) -> KinemaError:
    """Why a step from these latents gave latents that are not finite.

    ``at`` names the step, and ``transformer`` the folder of the one that computed it.
    """
    if not all(map(_is_finite, conditioning.texts)):
        part = "text encoder"
    elif conditioning.images is not None and not _is_finite(conditioning.images):
        part = "image encoder"
    # The latents of every step before were looked at, so these are not finite only where a film begins.
    elif not all(map(_is_finite, [latents, *conditioning.encoded])):
        part = "VAE's encoder"
    elif refs := conditioning.loras.get(transformer):
        names = ", ".join(ref.path.stem for ref in refs)
        return InvalidRequest(
            f"with the LoRAs of the request ({names}) the {transformer} gave values that are not finite, noticed at "
            f"{at}; give them less scale, or leave them out",
            param="loras",
        )
    else:
        part = transformer
    return EngineFailed(f"The {part} gave values that are not finite, noticed at {at}: its weights are damaged.")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
