"""What the denoiser is told of a request: prompts as text states, a first frame or a film as latents.

Prompts that were encoded lately cost nothing when they come again, and neither does the usual negative one. What is
kept are the encoder's own numbers, so a film is the same whether its prompt was found here or not. The prompt itself is
not kept, its digest is; and no entry stays when newer ones need its room.

diffusers' ``AutoencoderKLWan._encode`` runs the same loop over the same causal caches as ``encode_frames`` but keeps
the caches on the module and wants all pixels on the device; here they belong to the call, and four frames are on the
device at a time.

Axis letters: b batch (always 1), c channels, f latent frames, h and w latent rows and columns, t text tokens, d text
width.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import OrderedDict

import ftfy
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor

from kinema.engines.base import UInt8Array
from kinema.engines.wan.loading import Components
from kinema.engines.wan.presets import MAX_TEXT_TOKENS

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
        """As ``encode_text``; the tensor is the caller's own."""
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


def clean_prompt(text: str) -> str:
    """As diffusers' ``pipelines/wan/pipeline_wan.py: prompt_clean`` does, so that the tokens are the same."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def encode_text(parts: Components, prompt: str) -> Tensor:
    """(1, 512, d) in the text encoder's type, zeros after the prompt's own tokens; they are attended to."""
    return fill_up(encode_states(parts, prompt))


def encode_states(parts: Components, prompt: str) -> Tensor:
    """(1, t, d) of the prompt's own tokens, 512 at most.

    The encoder runs at the prompt's true length: masked padding contributes nothing to the other tokens.
    """
    ids = parts.tokenizer(
        clean_prompt(prompt), max_length=MAX_TEXT_TOKENS, truncation=True, add_special_tokens=True, return_tensors="pt"
    ).input_ids.to(parts.device)
    states: Tensor = parts.text_encoder(ids, torch.ones_like(ids)).last_hidden_state
    return states


def fill_up(states: Tensor) -> Tensor:
    """A copy (1, 512, d) with zeros after the prompt's own tokens."""
    return torch.nn.functional.pad(states, (0, 0, 0, MAX_TEXT_TOKENS - states.shape[1]))


def latent_statistics(parts: Components) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (1, c, 1, 1, 1) float32 each, from its config."""
    config = parts.vae.config
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=parts.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def encode_frames(parts: Components, frames: UInt8Array) -> Tensor:
    """Frames (4k+1, h, w, 3) uint8 as normalised latents (1, c, k+1, h, w) float32: the mode of their posterior.

    4 is the VAE's temporal factor. The first frame gives one latent frame, each four later ones another.
    """
    vae = parts.vae
    factor = vae.config.scale_factor_temporal
    cache: list[Tensor | str | None] = [None] * vae._cached_conv_counts["encoder"]
    starts = [0, *range(1, len(frames), factor)]
    hidden = [
        vae.encoder(_pixels(parts, frames[start:stop]), feat_cache=cache, feat_idx=[0])
        for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True)
    ]
    mode: Tensor = vae.quant_conv(torch.cat(hidden, dim=2)).chunk(2, dim=1)[0]
    mean, std = latent_statistics(parts)
    return (mode.float() - mean) / std


def _pixels(parts: Components, frames: UInt8Array) -> Tensor:
    """(1, 3, f, h, w) in [-1, 1], or what the VAE makes of it when it works on patches."""
    scaled = torch.from_numpy(frames).to(parts.device, parts.vae.dtype).permute(3, 0, 1, 2)[None] / 255.0
    pixels = 2.0 * scaled - 1.0
    patch_size = parts.vae.config.patch_size
    return pixels if patch_size is None else patchify(pixels, patch_size=patch_size)
