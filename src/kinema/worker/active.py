"""A generation on the device: what is asked for, how it advances, leaves its memory and comes back, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from enum import Enum

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Note, Output, Step
from kinema.request.request import GenerationRequest
from kinema.worker.costs import CostModel, Done
from kinema.worker.scheduler import Candidate


class EndReason(Enum):
    """How a generation left the device."""

    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    # The device thread stopped, or lost its device, before the generation was done.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a generation on the device, with the engine's exception when it failed, which holds no tensors.

    ``device_s`` is the time of all its turns together.
    """

    reason: EndReason
    error: Exception | None = None
    device_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Admit:
    """Requests a generation. ``on_end`` is called exactly once, after the last ``on_output``.

    When the generation will continue elsewhere, ``on_leave`` gets its present step before it is closed here. All three
    are called on the device thread and must return soon. ``inputs`` and ``resume`` are as in ``Engine.generate``,
    ``tenant`` and ``deadline_at`` as in a task.
    """

    key: int
    request: GenerationRequest
    on_output: Callable[[Output], None]
    on_end: Callable[[Ended], None]
    inputs: Inputs = NO_INPUTS
    resume: bytes | None = None
    on_leave: Callable[[Step], None] | None = None
    tenant: str = ""
    deadline_at: float | None = None


@dataclass(slots=True)
class Active:
    """A generation on the device thread.

    While it is parked, ``outputs`` is None, ``parked`` is its checkpoint, and it holds no memory of the device.
    """

    admit: Admit
    outputs: Generator[Output, None, None] | None
    # The checkpoint from which it continues, when ``outputs`` is None.
    parked: bytes | None = None
    last_turn: int = 0
    # Its latest output; None before the first one and while it is advanced.
    last_output: Output | None = None
    # Its latest step, from which the frames are decoded again when memory runs out meanwhile.
    last_step: Step | None = None
    notes: list[Note] = field(default_factory=list)
    done: Done = field(default_factory=Done)
    device_s: float = 0.0

    @property
    def holds_memory(self) -> bool:
        """Whether it has latents that it can leave and come back to."""
        return self.outputs is not None and self.last_step is not None and self.last_step.checkpoint is not None

    def advance(self, generate: Callable[[Admit, bytes | None], Generator[Output, None, None]]) -> Output:
        """The next output that was not there before. Raises as the engine does, and StopIteration at the end."""
        if self.outputs is None:
            self.outputs = generate(self.admit, self.parked)
        while self._is_repeated(output := next(self.outputs)):
            pass
        self.last_output = output
        if isinstance(output, Step):
            self.last_step = output
        if isinstance(output, Note):
            self.notes.append(output)
        return output

    def _is_repeated(self, output: Output) -> bool:
        """Whether it was given before memory ran out while the frames were decoded."""
        if isinstance(output, Note):
            return output in self.notes
        return isinstance(output, Frames) and output.index <= self.done.chunks

    def go_back(self) -> bool:
        """Free its memory, also after a failure, and continue after its latest step, or where it began. False when it
        cannot. Outputs that come again are not given again.
        """
        if self.last_step is None:
            self._leave_for(self.admit.resume)
            return True
        if self.last_step.checkpoint is None:
            return False
        checkpoint = self.last_step.checkpoint()
        self._leave_for(checkpoint)
        # The step itself refers to the latents, so it is not kept.
        self.last_step = Step(self.last_step.index, self.last_step.total, lambda: checkpoint)
        self.last_output = self.last_step
        return True

    def _leave_for(self, checkpoint: bytes | None) -> None:
        if self.outputs is not None:
            self.outputs.close()
        self.outputs, self.parked = None, checkpoint
        self.done = replace(self.done, is_begun=False)

    def candidate(self, costs: CostModel) -> Candidate:
        """The values that the scheduler needs."""
        request = self.admit.request
        return Candidate(
            key=self.admit.key,
            remaining_s=costs.remaining_s(request, self.done),
            next_turn_s=costs.next_turn_s(request, self.done),
            last_turn=self.last_turn,
            is_decoding=self.done.is_begun and self.done.steps >= request.num_denoising_steps,
            tenant=self.admit.tenant,
            priority=request.priority,
            deadline_at=self.admit.deadline_at,
        )
