"""What the denoiser is told of the prompt, and the scale of the latents.

Axis letters: b batch (always 1), c channels, f latent frames, h and w latent rows and columns, t text tokens, d text
width.
"""

from __future__ import annotations

import html
import re

import ftfy
import torch
from torch import Tensor

from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.weights import Components


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
