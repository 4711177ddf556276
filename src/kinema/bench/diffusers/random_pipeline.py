"""A pipeline of a published size with random weights, drawn on the device: it takes seconds and no files.

A device takes the same time for them as for trained ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import AutoTokenizer, ByT5Tokenizer

from kinema.bench.diffusers.architectures import Architecture, Component
from kinema.bench.wan.random_weights import fill_tensors
from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.engines.wan.checkpoint import BUNDLED
from kinema.errors import ConfigError

# What decodes; the engine reads it in a type of its own.
_DECODERS = ("vae",)
# For text encoders that are asked in a conversation.
_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def family_named(name: str) -> Family:
    """The row of the table of families that has this name."""
    return next(family for family in FAMILIES if family.name == name)


def draw(architecture: Architecture, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:  # noqa: ANN401 - of diffusers
    """The pipeline on this device, in these types. Raises ConfigError when it does not fit into its memory."""
    made: dict[str, Any] = {name: _tokenizer(length) for name, length in architecture.tokenizers.items()}
    try:
        for name, component in architecture.components.items():
            made[name] = _draw(component, device, vae_dtype if name in _DECODERS else dtype)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(f"{architecture.family} does not fit into the memory of {device}") from exc
    pipeline = getattr(diffusers, family_named(architecture.family).pipelines[0])
    return pipeline(**made)


def _draw(component: Component, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401 - of two libraries
    kind = getattr(importlib.import_module(component.library), component.kind)
    if not issubclass(kind, nn.Module):
        return kind(**component.config)
    made = make_network(component, device, dtype)
    _keep_exact(made)
    fill_tensors(dict(made.named_parameters()), device)
    return made.eval().requires_grad_(False)


def make_network(component: Component, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The network of a component with the numbers that its class begins with."""
    kind = getattr(importlib.import_module(component.library), component.kind)
    with _made_on(device, dtype):
        is_config = component.library == "transformers"
        made: nn.Module = kind(kind.config_class(**component.config)) if is_config else kind(**component.config)
    return made


def _keep_exact(network: nn.Module) -> None:
    """Keep in float32 what the library keeps so when it reads weights of another type."""
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, module in network.named_modules():
        if exact & set(name.split(".")):
            module.float()
    for name, parameter in network.named_parameters():
        if exact & set(name.split(".")):
            parameter.data = parameter.data.float()


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Networks are made there and in this type. Tables that they compute at once are right, unlike on a meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer(length: int | None) -> Any:  # noqa: ANN401 - of transformers
    if length is None:
        return ByT5Tokenizer()
    folder = BUNDLED["tiny-wan"] / "tokenizer"
    made = AutoTokenizer.from_pretrained(str(folder), model_max_length=length, trust_remote_code=False)
    made.chat_template = _CHAT
    return made
