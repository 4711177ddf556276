"""Networks that come to the device whole, one at a time: diffusers' model offload, for videos that take turns.

The library's own hooks send a network away when the next one of the same pipeline call is used. Here another video may
have its turn in between, so whichever network is used sends away the one that is there, whose video it may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn

# An object and the name of its attribute that holds a tensor: a parameter and ``data``, or a tensor of torchao and the
# name of one of the tensors that it consists of.
_Place = tuple[Any, str]


class OneAtATime:
    """Lets one of some networks lie on the device, where the others are in the host's memory.

    All calls come from the thread that has the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._present: nn.Module | None = None
        self._left_behind: list[tuple[_Place, Tensor]] = []

    @property
    def present(self) -> nn.Module | None:
        """The one that is on the device."""
        return self._present

    def add(self, network: nn.Module, *, by_parts: bool) -> None:
        """Let it come when it is called, or also when a part of it is, as pipelines do with encoders ``by_parts``."""
        if any(hasattr(tensor, "__tensor_flatten__") for tensor in network.parameters()):
            network.to(self._device)  # such a tensor names one device for ever
            self._present = network
        self.bring(network)  # what does not fit is known from the start
        self.send_away()
        add_hook_to_module(network, _Coming(self, network, self._device))

        def before(_part: nn.Module, _inputs: object) -> None:
            self.bring(network)

        for part in network.modules() if by_parts else ():
            if part is not network:
                part.register_forward_pre_hook(before)

    def add_lasting(self, network: nn.Module, *, sends_away: bool) -> None:
        """Put it on the device for good. The others leave before it computes, if it ``sends_away``."""
        network.to(self._device)
        add_hook_to_module(network, _Coming(self, None, self._device) if sends_away else _Staying(self._device))

    def bring(self, network: nn.Module) -> bool:
        """Let this network alone be on the device. Returns whether it came now. Raises torch's error when there is no
        room for it."""
        if self._present is network:
            return False
        self.send_away()
        self._present = network
        try:
            for owner, name in _places(network):
                there = getattr(owner, name)
                if there.device.type != self._device.type:
                    kept = self._pinned(there)
                    setattr(owner, name, kept.to(self._device, non_blocking=True))
                    self._left_behind.append(((owner, name), kept))
        except BaseException:
            self.send_away()
            raise
        return True

    def send_away(self) -> None:
        """Let none be on the device. Weights do not change, so those in the host's memory are still right."""
        if self._present is None:
            return
        for (owner, name), kept in self._left_behind:
            setattr(owner, name, kept)
        self._left_behind.clear()
        for owner, name in _places(self._present):  # those of LoRAs that came since
            setattr(owner, name, getattr(owner, name).to("cpu"))
        self._present = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" and not tensor.is_pinned() else tensor


class _Staying(ModelHook):  # type: ignore[misc]  # the library is untyped
    """Says where a network computes, from which a pipeline takes the device of its own tensors."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


class _Coming(_Staying):
    """Brings a network before it computes, or sends all away: before ``forward``, and before what a VAE does."""

    def __init__(self, place: OneAtATime, network: nn.Module | None, device: torch.device) -> None:
        super().__init__(device)
        self._place = place
        self._network = network

    def pre_forward(self, _module: nn.Module, *args: object, **words: object) -> tuple[Any, Any]:
        if self._network is None:
            self._place.send_away()
        elif self._place.bring(self._network):  # its caller may have asked where it was
            return send_to_device(args, self.execution_device), send_to_device(words, self.execution_device)
        return args, words


def _places(network: nn.Module) -> Iterator[_Place]:
    tensors: Iterable[Tensor] = itertools.chain(network.parameters(), network.buffers())
    return itertools.chain.from_iterable(map(_places_of, tensors))


def _places_of(tensor: Tensor) -> Iterator[_Place]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor, "data"
        return
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if hasattr(inner, "__tensor_flatten__"):
            yield from _places_of(inner)
        else:
            yield tensor, name
