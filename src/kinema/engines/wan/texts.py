"""Prompts that were encoded lately: a prompt that comes again costs nothing, and neither does the usual negative one.

What is kept are the encoder's own numbers, so a film is the same whether its prompt was found here or not. The prompt
itself is not kept, its digest is; and no entry stays when newer ones need its room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

from kinema.engines.wan.conditioning import clean_prompt, encode_states, fill_up
from kinema.engines.wan.weights import Components

MAX_ENTRIES = 64
MAX_BYTES = 64 * 2**20


class Texts:
    """Of one text encoder; belongs to the thread that runs it. ``pinned`` is kept once it was encoded."""

    def __init__(
        self, parts: Components, pinned: str, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._parts = parts
        self._pinned_key = _key(pinned)
        self._pinned: Tensor | None = None
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._max_entries = max_entries
        self._max_bytes = max_bytes

    @property
    def size_bytes(self) -> int:
        """Of all that is kept besides the pinned one, on the device."""
        return sum(_size(states) for states in self._kept.values())

    def __len__(self) -> int:
        """How many are kept besides the pinned one."""
        return len(self._kept)

    def read(self, prompt: str) -> Tensor:
        """As ``conditioning.encode_text``; the tensor is the caller's own."""
        key = _key(prompt)
        states = self._pinned if key == self._pinned_key else self._kept.pop(key, None)
        if states is None:
            states = encode_states(self._parts, prompt)
        if key == self._pinned_key:
            self._pinned = states
        else:
            self._keep(key, states)
        return fill_up(states)

    def _keep(self, key: bytes, states: Tensor) -> None:
        self._kept[key] = states
        while len(self._kept) > self._max_entries or self.size_bytes > self._max_bytes:
            self._kept.popitem(last=False)


def _key(prompt: str) -> bytes:
    return hashlib.sha256(clean_prompt(prompt).encode("utf-8", "surrogatepass")).digest()


def _size(states: Tensor) -> int:
    return states.numel() * states.element_size()
