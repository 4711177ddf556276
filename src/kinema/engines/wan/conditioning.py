"""What the denoiser is told of a request: its prompts as text states, its given frames or film as latents.

``encode_text``, ``encode_frames`` and ``encode_given`` compute what diffusers' pipelines compute; ``PromptCache`` keeps
the text states of recent prompts. Letters of the axes: b batch (always 1), c channels, m channels of a mask, f latent
frames, h and w latent rows and columns, t text tokens, d text width.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ftfy
import torch
from torch import Tensor

from kinema.engines.base import Inputs, UInt8Array
from kinema.engines.wan.device_memory import bytes_of
from kinema.engines.wan.loading import Components
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.vae.encoder import Memory

# Nobody has more prompts at once, and their states are small beside any weights, so these bounds do not ask for the
# limit of the device; who needs that memory gets it (``residents.py``).
MAX_ENTRIES = 64
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Conditioning:
    """What a generation is conditioned on.

    ``positive`` and ``negative`` are the text states (1, t, d) of both prompts; ``negative`` is None without guidance.
    A first frame that is given comes as its clean latents ``first_frame`` (1, c, 1, h, w), or, with a last frame if
    there is one, as ``channels`` (1, m + c, f, h, w) beside the noisy latents, by the kind of the model.
    ``film`` encodes a film that is edited to its clean latents (1, c, f, h, w): only the first step begins from them,
    so a generation that resumes does not call it. All three are None for text-to-video. ``images`` (1, t, i) are CLIP's
    states of the given frames, for a model that attends to them. ``loras`` are those for each transformer, by its name.
    """

    positive: Tensor
    negative: Tensor | None
    first_frame: Tensor | None = None
    channels: Tensor | None = None
    film: Callable[[], Tensor] | None = None
    images: Tensor | None = None
    loras: Mapping[str, Sequence[LoraRef]] = field(default_factory=dict)

    @property
    def texts(self) -> list[Tensor]:
        return [self.positive] if self.negative is None else [self.positive, self.negative]

    @property
    def encoded(self) -> list[Tensor]:
        """What the VAE made of given frames."""
        return [latents for latents in (self.first_frame, self.channels) if latents is not None]

    def keep_first(self, latents: Tensor) -> Tensor:
        """The latents (1, c, f, h, w) with the clean first frame, if there is one, in place of theirs."""
        if self.first_frame is None:
            return latents
        return torch.cat([self.first_frame, latents[:, :, 1:]], dim=2)

    def model_input(self, latents: Tensor) -> Tensor:
        """What the transformer reads (1, c or 2 c + m, f, h, w) where the noisy latents are (1, c, f, h, w)."""
        if self.channels is None:
            return self.keep_first(latents)
        return torch.cat([latents, self.channels], dim=1)


def encode_text(parts: Components, prompt: str) -> Tensor:
    """The text states (1, t, d) of a prompt's own tokens, 512 at most, in the text encoder's type. No host waits."""
    encode = parts.text_encoder if parts.texts is None else parts.texts
    return encode(parts.tokenizer.tokens(clean_prompt(prompt)))


def clean_prompt(text: str) -> str:
    """The prompt as diffusers' ``pipelines/wan/pipeline_wan.py: prompt_clean`` has it, so the tokens are the same."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class PromptCache:
    """The text states of recent prompts, so that a prompt which comes again costs nothing.

    It keeps the text encoder's own numbers, so a film is the same whether its prompt was found here or not. It keeps
    the digest of a prompt, never the prompt itself. ``pinned``, usually the preset's negative prompt, stays once it was
    encoded; the least recently used of the others go when there are more than ``max_entries`` of them, or when they
    take more than ``max_bytes`` of the device. It belongs to the thread that runs the text encoder.
    """

    def __init__(
        self, parts: Components, pinned: str, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._parts = parts
        self._pinned_key = _key(pinned)
        self._pinned: Tensor | None = None
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._max_entries = max_entries
        self._max_bytes = max_bytes

    @property
    def size_bytes(self) -> int:
        """The memory that the entries take on the device, without the pinned one."""
        return bytes_of(self._entries)

    def __len__(self) -> int:
        """The number of entries without the pinned one."""
        return len(self._entries)

    def encode(self, prompt: str) -> Tensor:
        """What ``encode_text`` returns for the prompt; the caller may change the tensor."""
        key = _key(prompt)
        states = self._pinned if key == self._pinned_key else self._entries.pop(key, None)
        if states is None:
            states = encode_text(self._parts, prompt)
        if key == self._pinned_key:
            self._pinned = states
        else:
            self._add(key, states)
        return states.clone()

    def clear(self) -> None:
        """Forget all prompts but the pinned one."""
        self._entries.clear()

    def _add(self, key: bytes, states: Tensor) -> None:
        self._entries[key] = states
        while len(self._entries) > self._max_entries or self.size_bytes > self._max_bytes:
            self._entries.popitem(last=False)


def _key(prompt: str) -> bytes:
    return hashlib.sha256(clean_prompt(prompt).encode("utf-8", "surrogatepass")).digest()


def encode_frames(parts: Components, frames: UInt8Array) -> Tensor:
    """Encode frames (4k+1, h, w, 3) uint8 to normalised latents (1, c, k+1, h, w) float32: the mode of their posterior.

    4 is the VAE's temporal factor: the first frame becomes one latent frame, each four later ones become another.
    diffusers' ``AutoencoderKLWan._encode`` runs the same loop, but wants all pixels on the device. Here four frames are
    on the device at a time.
    """
    encoder, memory = parts.vae.encoder, Memory()
    starts = [0, *range(1, len(frames), parts.vae.config.scale_factor_temporal)]
    hidden = [
        encoder.hidden(_pixels(parts, frames[start:stop]), memory)
        for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True)
    ]
    return _normalised(parts, hidden)


def encode_given(parts: Components, num_frames: int, first: UInt8Array, last: UInt8Array | None) -> Tensor:
    """What image-to-video models read beside the noisy latents: channels (1, m + c, f, h, w) float32 of a film of
    ``num_frames``, whose ``first`` frame and maybe ``last`` one (h, w, 3) uint8 are given.

    The mask comes first. It has a channel for each frame of a latent frame, 1 where that is given; the first frame has
    a latent frame alone, and so all of its channels. Then come the latents of the film with all other frames grey.
    """
    num_masks = parts.vae.config.scale_factor_temporal
    latents = _normalised(parts, list(_encode_grey_film(parts, (num_frames - 1) // num_masks, first, last)))
    mask = latents.new_zeros(1, num_masks, *latents.shape[2:])
    mask[:, :, 0] = 1.0
    if last is not None:
        mask[:, -1, -1] = 1.0
    return torch.cat([mask, latents], dim=1)


def _encode_grey_film(
    parts: Components, num_later: int, first: UInt8Array, last: UInt8Array | None
) -> Iterator[Tensor]:
    """What the encoder leaves of a first frame and of each of ``num_later`` groups of frames, which are grey, but for a
    last frame at the end."""
    encoder, memory = parts.vae.encoder, Memory()
    begin = _pixels(parts, first[None])
    yield encoder.hidden(begin, memory)
    group = begin.new_zeros(*begin.shape[:2], parts.vae.config.scale_factor_temporal, *begin.shape[3:])
    yield from encoder.repeat(group, memory, num_later - (last is not None))
    if last is not None:
        group[:, :, -1:] = _pixels(parts, last[None])
        yield encoder.hidden(group, memory)


def _normalised(parts: Components, hidden: list[Tensor]) -> Tensor:
    """The normalised latents (1, c, f, h, w) float32 of what the encoder left of all frames."""
    mode = parts.vae.encoder.mode(torch.cat(hidden, dim=2))
    mean, std = latent_statistics(parts)
    return (mode.float() - mean) / std


def encode_images(parts: Components, inputs: Inputs) -> Tensor | None:
    """The states (1, t, i) of the first frame and, if there is one, of the last one; None for a model that does not
    attend to pictures."""
    if parts.image_encoder is None:
        return None
    return parts.image_encoder([one for one in (inputs.first_frame, inputs.last_frame) if one is not None])


def latent_statistics(parts: Components) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (1, c, 1, 1, 1) float32 each, from its config."""
    config = parts.vae.config
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=parts.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def _pixels(parts: Components, frames: UInt8Array) -> Tensor:
    """Pixels (1, 3, f, h, w) in [-1, 1]."""
    scaled = torch.from_numpy(frames).to(parts.device, parts.vae.dtype).permute(3, 0, 1, 2)[None] / 255.0
    return 2.0 * scaled - 1.0
