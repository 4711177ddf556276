"""What a transformer is given beside the latents: positions, times and prompts, none of which changes with the step.

``Rotation``: a token's position, as angles by which its queries and keys are rotated (arXiv 2104.09864).
``Modulation``: a step's time, as scales, shifts and gates of every block, in float32. Tokens of a given first frame
have the time 0 and all others the step's, so there are two rows at most, and a token's place says which one it has.
``Prompts`` are text states, and ``Text`` is the keys and values that every block makes of them: up to a hundred times
as large, so a request keeps the former. Prompts are padded to 512 tokens with zeros, which are attended to like the
others. Zeros have equal keys and values, so one of them stands for all, with the logarithm of their number added to its
logit: the softmax is the same. A model that also attends to pictures has their states beside those of the prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.transformer.network import Network, Reader


@dataclass(frozen=True)
class Rotation:
    """``cosines`` and ``sines`` (tokens, head_dim / 2) float32, one for each pair of neighbouring channels."""

    cosines: Tensor
    sines: Tensor

    def shard(self, start: int, stop: int) -> Rotation:
        """The rotation of the tokens from ``start`` to ``stop`` alone."""
        return Rotation(self.cosines[start:stop], self.sines[start:stop])


def rotation_of(network: Network, grid: tuple[int, int, int]) -> Rotation:
    """The rotation of all tokens; ``grid`` counts them along the three axes."""
    return Rotation(_broadcast(network.cosines, network.axes, grid), _broadcast(network.sines, network.axes, grid))


def _broadcast(table: Tensor, axes: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    parts = []
    for axis, part in enumerate(torch.split(table, list(axes), dim=1)):
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        parts.append(part[: grid[axis]].view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)


@dataclass(frozen=True)
class Times:
    """The times of a request: ``projected`` (6, times, d) float32 and ``embedded`` (times, d).

    There is one for each step; when a first frame is given, the time 0 stands before each of them.
    """

    projected: Tensor
    embedded: Tensor
    has_clean: bool

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """The rows of one step: ``projected`` (6, rows, d) and ``embedded`` (rows, d), the row of time 0 first."""
        if not self.has_clean:
            return self.projected[:, index : index + 1], self.embedded[index : index + 1]
        both = slice(2 * index, 2 * index + 2)
        return self.projected[:, both], self.embedded[both]


@dataclass(frozen=True)
class Modulation:
    """The modulation of one step: ``blocks`` (layers, 6, rows, d) and ``head`` (2, rows, d), float32. The first
    ``num_clean`` tokens have the first row, the others the last.

    The six are shift, scale and gate of the self-attention, then of the feed-forward; the head has a shift and a scale.
    """

    blocks: Tensor
    head: Tensor
    num_clean: int

    def shard(self, start: int, stop: int) -> Modulation:
        """The modulation of the tokens from ``start`` to ``stop`` alone."""
        num_clean = min(max(self.num_clean - start, 0), stop - start)
        if num_clean == 0:  # the row of the others is the only one then
            return Modulation(self.blocks[:, :, -1:], self.head[:, -1:], 0)
        return replace(self, num_clean=num_clean)


def embed_times(network: Network, timesteps: Tensor, *, has_clean: bool) -> Times:
    """The times of a whole request, ``timesteps`` (steps,). Rounds where diffusers rounds."""
    if has_clean:
        timesteps = torch.stack([torch.zeros_like(timesteps), timesteps], dim=1).flatten()
    frequencies = _frequencies(timesteps, network.time_in.weight.shape[1])
    embedded = network.time_out(silu(network.time_in(frequencies.to(network.time_in.weight.dtype)))).to(network.dtype)
    projected = network.time_projection(silu(embedded)).float()
    return Times(projected.view(len(timesteps), 6, -1).transpose(0, 1).contiguous(), embedded, has_clean)


def _frequencies(timesteps: Tensor, count: int) -> Tensor:
    """(times, count) float32: cosines and sines of each time at frequencies from 1 down to a ten-thousandth."""
    half = count // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)[None]
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return pad(waves, (0, count % 2))


def modulate(network: Network, projected: Tensor, embedded: Tensor, num_clean: int) -> Modulation:
    """The modulation of one step, from its rows."""
    blocks = network.modulation[:, :, None] + projected
    return Modulation(blocks, network.head_modulation[:, None] + embedded, num_clean)


@dataclass(frozen=True)
class Prompts:
    """``b`` prompts as a request keeps them.

    ``states`` are the text states (keys, t) of each one's own tokens, with a row of zeros for its padding. ``bias`` and
    ``counts`` are those of the ``Text``. ``images`` are the states (image keys, i) of the pictures that all of them
    share, of which there can be ``max_image_keys``.
    """

    states: tuple[Tensor, ...]
    bias: Tensor
    counts: Tensor
    images: Tensor | None = None
    max_image_keys: int = 0

    def branch(self, index: int) -> Prompts:
        """One of the prompts alone, as views. It has as many keys as before, so its numbers are the same."""
        own = slice(index, index + 1)
        return replace(self, states=self.states[own], bias=self.bias[own], counts=self.counts[own])


@dataclass(frozen=True)
class Text:
    """``b`` prompts as the blocks attend to them.

    ``keys_values`` (layers, b, keys, 2 d) has keys before values. ``bias`` (b, 1, 1, keys) float32 is added to the
    logits; it is minus infinity where a prompt has fewer keys than the tensor. ``counts`` (b,) int32 are the prompts'
    numbers of keys. ``images`` has the keys and values of the pictures for each prompt, in the same memory for all.
    """

    keys_values: Tensor
    bias: Tensor
    counts: Tensor
    images: Text | None = None

    def first(self, size: int) -> Text:
        """The first prompts alone, as views."""
        return self._part(slice(size))

    def branch(self, index: int) -> Text:
        """One of the prompts alone, as views."""
        return self._part(slice(index, index + 1))

    def _part(self, own: slice) -> Text:
        images = None if self.images is None else self.images._part(own)
        return Text(self.keys_values[:, own], self.bias[own], self.counts[own], images)


def empty_text(network: Network, size: int, keys: int, image_keys: int = 0) -> Text:
    """A text with memory for ``size`` prompts of ``keys`` tokens, and for pictures of ``image_keys``, if any."""
    device = network.device
    shape = (len(network.blocks), size, keys, 2 * network.width)
    return Text(
        torch.zeros(shape, dtype=network.dtype, device=device),
        torch.full((size, 1, 1, keys), -math.inf, device=device),
        torch.zeros(size, dtype=torch.int32, device=device),
        _empty_images(network, image_keys).first(size) if image_keys else None,
    )


def _empty_images(network: Network, keys: int) -> Text:
    """Pictures for two prompts, which are views of the same memory."""
    device = network.device
    shape = (len(network.blocks), 1, keys, 2 * network.width)
    return Text(
        torch.zeros(shape, dtype=network.dtype, device=device).expand(-1, 2, -1, -1),
        torch.full((1, 1, 1, keys), -math.inf, device=device).expand(2, -1, -1, -1),
        torch.zeros(2, dtype=torch.int32, device=device),
    )


def pad_prompts(network: Network, texts: list[Tensor], images: Tensor | None = None) -> Prompts:
    """The prompts of text states (1, tokens, t), with the states (1, image keys, i) of pictures. No host waits."""
    states = tuple(_pad(text[0].to(network.dtype)) for text in texts)
    counts = [len(padded) for padded in states]
    bias = torch.full((len(states), 1, 1, max(counts)), -math.inf)
    for row, count in zip(bias, counts, strict=True):
        row[..., :count] = 0.0
        row[..., count - 1] = math.log(MAX_TEXT_TOKENS - count + 1)
    device, counted = network.device, torch.tensor(counts, dtype=torch.int32)
    prompts = Prompts(states, bias.to(device, non_blocking=True), counted.to(device, non_blocking=True))
    if images is None:
        return prompts
    max_keys = network.num_image_positions or images.shape[1]
    return replace(prompts, images=images[0].to(network.dtype), max_image_keys=max_keys)


def _pad(states: Tensor) -> Tensor:
    """States (tokens, t) and a row of zeros behind them, if a prompt can be longer."""
    return pad(states, (0, 0, 0, 1)) if len(states) < MAX_TEXT_TOKENS else states


def room_for(network: Network, prompts: Prompts) -> Text:
    """A text with memory for these prompts and no more."""
    num_images = 0 if prompts.images is None else len(prompts.images)
    return empty_text(network, len(prompts.states), prompts.bias.shape[-1], num_images)


def room_for_any(network: Network, prompts: Prompts) -> Text:
    """A text with memory for two prompts of any length, and for as many pictures as the model takes."""
    return empty_text(network, 2, MAX_TEXT_TOKENS, prompts.max_image_keys)


def read_prompts(network: Network, prompts: Prompts, text: Text) -> None:
    """Compute keys and values into a text of as many prompts, which may have more keys. No host waits."""
    hidden = [network.text_out(gelu(network.text_in(states), approximate="tanh")) for states in prompts.states]
    seen = None if network.images is None or prompts.images is None else network.images(prompts.images)
    for layer, readers in enumerate(network.readers):
        for index, of_prompt in enumerate(hidden):
            text.keys_values[layer, index, : len(of_prompt)] = _read(network, readers.text, of_prompt)
        if seen is not None and readers.images is not None and text.images is not None:
            text.images.keys_values[layer, 0, : len(seen)] = _read(network, readers.images, seen)
    text.bias.fill_(-math.inf)
    text.bias[..., : prompts.bias.shape[-1]].copy_(prompts.bias)
    text.counts.copy_(prompts.counts)
    if seen is not None and text.images is not None:
        text.images.bias[:1].fill_(-math.inf)
        text.images.bias[:1, ..., : len(seen)] = 0.0
        text.images.counts.fill_(len(seen))


def _read(network: Network, reader: Reader, hidden: Tensor) -> Tensor:
    """Keys and values (tokens, 2 d) of tokens (tokens, d)."""
    keys_values = reader.keys_values(hidden)
    keys = keys_values[:, : network.width]
    keys.copy_(torch.nn.functional.rms_norm(keys, keys.shape[1:], reader.norm, network.eps))
    return keys_values
