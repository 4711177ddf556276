"""Where a pipeline's weights lie and in which type, by the library's own means.

Both are hooks on the networks, which all videos share. They act within one forward, so videos may take turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kinema.errors import ConfigError

# What the pipelines call the networks that denoise; the second is for the other half of the noise levels.
_DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Savings:
    """What is done to take less of the device's memory: the settings of these names."""

    offload: Literal["auto", "none", "text", "blocks"] = "auto"
    weights: Literal["dtype", "fp8"] = "dtype"
    vae_tiling: bool = False


def place(pipeline: Any, device: torch.device, dtype: torch.dtype, savings: Savings) -> None:  # noqa: ANN401 - of diffusers
    """Put the pipeline on the device, but for what is offloaded. Raises ConfigError for a saving that it has not."""
    networks: dict[str, Any] = {name: one for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    denoisers = {name: one for name, one in networks.items() if name in _DENOISERS}
    if savings.weights == "fp8":
        for network in denoisers.values():
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if savings.vae_tiling:
        _tile(networks["vae"])
    offloaded = _offloaded(networks, denoisers, savings)
    for name, network in networks.items():
        if name in offloaded:
            _offload(network, device, in_blocks=name in denoisers)
        else:
            network.to(device)


def _tile(vae: Any) -> None:  # noqa: ANN401 - of diffusers
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as exc:
        raise ConfigError(
            f"engine.diffusers.vae_tiling: {type(vae).__name__} has no tiles; leave the setting out"
        ) from exc


def _offloaded(networks: Iterable[str], denoisers: Iterable[str], savings: Savings) -> set[str]:
    """The networks that lie in the host's memory. The parts that decode are small, and stay on the device."""
    if savings.offload in ("auto", "none"):
        return set()
    encoders = {name for name in networks if name.startswith(("text_encoder", "image_encoder"))}
    return encoders if savings.offload == "text" else {*encoders, *denoisers}


def _offload(network: nn.Module, device: torch.device, *, in_blocks: bool) -> None:
    """Bring a block of it to the device while it computes, or a layer: pipelines call parts of encoders by themselves.

    On a GPU the next one comes while this one computes.
    """
    from diffusers.hooks import apply_group_offloading  # noqa: PLC0415 - seconds, and seldom

    size = {"offload_type": "block_level", "num_blocks_per_group": 1} if in_blocks else {"offload_type": "leaf_level"}
    try:
        apply_group_offloading(
            network, onload_device=device, offload_device=torch.device("cpu"), use_stream=device.type == "cuda", **size
        )
    except ValueError as exc:
        raise ConfigError(f"engine.offload: {type(network).__name__} cannot be offloaded: {exc}") from exc
