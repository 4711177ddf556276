"""Where a pipeline's weights lie and in which type, by the library's own means.

Both are hooks on the networks, which all videos share. They act within one forward, so videos may take turns.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kinema.engines.diffusers.families import DENOISERS
from kinema.engines.diffusers.pipeline_weights import Quantization
from kinema.errors import ConfigError

log = logging.getLogger(__name__)

Offload = Literal["none", "text", "blocks", "networks"]
OffloadSetting = Literal["auto"] | Offload
# The ways among which auto chooses. With networks, a turn of another video may have to wait for gigabytes.
_AUTOMATIC: tuple[Offload, ...] = ("none", "text", "blocks")
# The part of the memory that weights may take: a video needs the rest, and how much of it no pipeline says.
_SHARE_OF_WEIGHTS = 0.75


@dataclass(frozen=True)
class Savings:
    """What is done to take less of the device's memory: the settings of these names."""

    offload: OffloadSetting = "auto"
    weights: Literal["dtype", "fp8"] = "dtype"
    vae_tiling: bool = False
    quantization: Quantization | None = None

    @property
    def weights_dtype(self) -> str | None:
        """The numbers in which large layers are kept, where these are not those of the products."""
        return self.quantization or ("fp8" if self.weights == "fp8" else None)


def free_bytes_of(device: torch.device) -> int | None:
    """The memory of a CUDA device that nobody has; None for another device, whose memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def place(
    pipeline: Any,  # noqa: ANN401 - of diffusers
    device: torch.device,
    dtype: torch.dtype,
    savings: Savings,
    free_bytes: Callable[[torch.device], int | None] = free_bytes_of,
) -> Offload:
    """Put the pipeline on the device, but for what is offloaded. Returns what that is.

    Raises ConfigError for a saving that the pipeline has not, and for weights that do not fit.
    """
    networks: dict[str, Any] = {name: one for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    denoisers = {name: one for name, one in networks.items() if name in DENOISERS}
    if savings.weights == "fp8":
        for network in denoisers.values():
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if savings.vae_tiling:
        _tile(networks["vae"])
    # What bitsandbytes reads to the device stays there.
    setting: OffloadSetting = "none" if any(map(_is_placed, networks.values())) else savings.offload
    offload = _choose(networks, setting, free_bytes(device))
    offloaded = _offloaded(networks, offload)
    if offload == "networks":
        _offload_whole(networks, offloaded, device)
        return offload
    for name, network in networks.items():
        if name in offloaded:
            _offload(network, device, in_blocks=name in denoisers)
        elif not _is_placed(network):
            network.to(device)
    return offload


def _choose(networks: Mapping[str, nn.Module], setting: OffloadSetting, free: int | None) -> Offload:
    """The setting; for ``auto`` the first way in which weights leave a video its room, and the last one where none
    does. Raises ConfigError when not even the weights fit."""
    possible = list(_AUTOMATIC) if setting == "auto" else [setting]
    if free is None:
        return possible[0]
    wanted = {way: _bytes_on_device(networks, way) for way in possible}
    chosen = next((way for way in possible if wanted[way] <= _SHARE_OF_WEIGHTS * free), possible[-1])
    if wanted[chosen] > free:
        hint = "" if chosen == _AUTOMATIC[-1] else "; auto or blocks take less"
        raise ConfigError(
            f"engine.offload = {setting!r}: {wanted[chosen] / 1e9:.3g} GB of weights must lie on the device, and "
            f"{free / 1e9:.3g} GB of its memory are free{hint}"
        )
    if setting == "auto":
        log.info(
            "engine.offload = 'auto': chose %s; %.3g GB of weights lie on the device, of %.3g GB, and %.3g GB are free",
            *(chosen, wanted[chosen] / 1e9, sum(map(_size, networks.values())) / 1e9, free / 1e9),
        )
    return chosen


def _bytes_on_device(networks: Mapping[str, nn.Module], offload: Offload) -> int:
    """What lies there while the largest part that is offloaded computes, and the next one comes."""
    offloaded = _offloaded(networks, offload)
    held = sum(_size(network) for name, network in networks.items() if name not in offloaded)
    size = _size if offload == "networks" else _twice_the_largest_part
    return held + max((size(networks[name]) for name in offloaded), default=0)


def _twice_the_largest_part(network: nn.Module) -> int:
    """Of the bytes of its largest block, or of its largest tensor where that is more: embeddings are no blocks."""
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    blocks = (_size(block) for blocks in lists for block in blocks)
    tensors = map(_num_bytes, network.parameters())
    return 2 * max(itertools.chain(blocks, tensors), default=0)


def _size(network: nn.Module) -> int:
    return sum(map(_num_bytes, itertools.chain(network.parameters(), network.buffers())))


def _num_bytes(tensor: torch.Tensor) -> int:
    """Of the numbers that are kept: a tensor of torchao has the shape and the type of what it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_num_bytes(getattr(tensor, name)) for name in names)


def _is_placed(network: nn.Module) -> bool:
    """Whether bitsandbytes has read it to the device, as it does with all networks."""
    return bool(getattr(network, "is_loaded_in_8bit", False) or getattr(network, "is_loaded_in_4bit", False))


def _tile(vae: Any) -> None:  # noqa: ANN401 - of diffusers
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as exc:
        raise ConfigError(
            f"engine.diffusers.vae_tiling: {type(vae).__name__} has no tiles; leave the setting out"
        ) from exc


def _offloaded(networks: Mapping[str, nn.Module], offload: Offload) -> set[str]:
    """The networks that lie in the host's memory. The parts that decode are small, and stay on the device."""
    if offload == "none":
        return set()
    encoders = {name for name in networks if name.startswith(("text_encoder", "image_encoder"))}
    return encoders if offload == "text" else encoders | {name for name in networks if name in DENOISERS}


def _offload_whole(networks: Mapping[str, nn.Module], offloaded: set[str], device: torch.device) -> None:
    """Let one of those that are offloaded lie on the device, while it computes, and none while the VAE does."""
    from kinema.engines.diffusers.whole_networks import OneAtATime  # noqa: PLC0415 - of the library, and seldom

    place = OneAtATime(device)
    for name, network in networks.items():
        if name in offloaded:
            place.add(network, by_parts=name not in DENOISERS)
        else:
            place.add_lasting(network, sends_away=name == "vae")


def _offload(network: nn.Module, device: torch.device, *, in_blocks: bool) -> None:
    """Bring a block of it to the device while it computes, or a layer: pipelines call parts of encoders by themselves.

    On a GPU the next one comes while this one computes.
    """
    from diffusers.hooks import apply_group_offloading  # noqa: PLC0415 - seconds, and seldom

    # It warns of each layer that a pipeline leaves out, by 20 kB of names where an encoder's part for pictures is one.
    logging.getLogger("diffusers.hooks.group_offloading").setLevel(logging.ERROR)
    size = {"offload_type": "block_level", "num_blocks_per_group": 1} if in_blocks else {"offload_type": "leaf_level"}
    projections = [] if in_blocks else _keep_projections(network, device)
    try:
        apply_group_offloading(
            network, onload_device=device, offload_device=torch.device("cpu"), use_stream=device.type == "cuda", **size
        )
    except ValueError as exc:
        raise ConfigError(f"engine.offload: {type(network).__name__} cannot be offloaded: {exc}") from exc
    for attention, projection in projections:
        attention.out_proj = projection


def _keep_projections(network: nn.Module, device: torch.device) -> list[tuple[nn.MultiheadAttention, Any]]:
    """Put the last layer of torch's own attention, with which SigLIP pools, on the device for good, and take it out of
    the network for now: the attention reads its weights and never calls it, so no hook would bring it."""
    attentions = [module for module in network.modules() if isinstance(module, nn.MultiheadAttention)]
    projections = [(one, one.out_proj.to(device)) for one in attentions]
    for attention in attentions:
        del attention.out_proj
    return projections
