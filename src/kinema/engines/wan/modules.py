"""A checkpoint's networks as modules of diffusers and transformers: built without weights, then given their memory.

Built on torch's meta device, they cost no memory and no random numbers; then each weight gets its place, in the type
that diffusers or transformers would load it in. Where its numbers come from is for ``weights.py`` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from kinema.engines.wan.checkpoint import weight_files
from kinema.engines.wan.tensors import DamagedFile, Stored, list_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blank:
    """A module and the memory of its weights, by their names in the file, which is still without content."""

    component: str
    module: Any
    targets: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.targets.values())


def blank_text_encoder(root: Path, device: torch.device, dtype: torch.dtype) -> Blank:
    """UMT5's encoder, all of it in this type."""
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_json_file(root / "text_encoder" / "config.json"))
    return _placed("text_encoder", module, device, dtype)


def blank_transformer(root: Path, component: str, device: torch.device, dtype: torch.dtype) -> Blank:
    """``transformer`` or ``transformer_2``; what diffusers keeps in float32 is float32 here too."""
    config = WanTransformer3DModel.load_config(str(root), subfolder=component)
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(config)
    # Its tables are no weights: they are computed, which a meta device does not do.
    made = module.config
    module.rope = type(module.rope)(made.attention_head_dim, made.patch_size, made.rope_max_seq_len).to(device)
    return _placed(component, module, device, dtype)


def blank_vae(root: Path, device: torch.device) -> Blank:
    """In float32, as it is published."""
    config = AutoencoderKLWan.load_config(str(root), subfolder="vae")
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(config)
    return _placed("vae", module, device, torch.float32)


def stored_tensors(root: Path, component: str) -> dict[str, Stored]:
    """All that the component's files have. Raises DamagedFile."""
    found: dict[str, Stored] = {}
    for path in weight_files(root, component):
        found.update(list_tensors(path)[0])
    return found


def match(blank: Blank, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The stored tensor of each target. Raises DamagedFile when one is missing or has another shape."""
    found: dict[str, Stored] = {}
    for name, target in blank.targets.items():
        source = next((stored[alias] for alias in _aliases(blank.module, name) if alias in stored), None)
        if source is None:
            raise DamagedFile(f"{blank.component} has no tensor {name}")
        if source.shape != tuple(target.shape):
            raise DamagedFile(
                f"{blank.component}: {name} has the shape {list(source.shape)} and not {list(target.shape)}"
            )
        found[name] = source
    known = {alias for name in blank.targets for alias in _aliases(blank.module, name)}
    if unknown := sorted(set(stored) - known):
        log.info("%s: %d tensors of the files are not used, for instance %s", blank.component, len(unknown), unknown[0])
    return found


def _placed(component: str, module: Any, device: torch.device, dtype: torch.dtype) -> Blank:  # noqa: ANN401
    """Every parameter where it will be; those that are one stay one."""
    targets: dict[str, Tensor] = {}
    tied = _tied(module)
    for name, parameter in list(module.named_parameters()):
        if name in tied:
            continue
        target = torch.empty(parameter.shape, device=device, dtype=_kept_dtype(module, name, dtype))
        targets[name] = target
        for alias in _aliases(module, name):
            owner, _, own_name = alias.rpartition(".")
            setattr(module.get_submodule(owner), own_name, torch.nn.Parameter(target, requires_grad=False))
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    assert not left, f"no memory for {left}"
    return Blank(component, module.eval(), targets)


def _kept_dtype(module: Any, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """diffusers keeps what is named in such a list in float32; transformers does so for float16 alone."""
    kept = module._keep_in_fp32_modules or [] if isinstance(module, WanTransformer3DModel) else []
    return torch.float32 if any(part in kept for part in name.split(".")) else dtype


def _aliases(module: Any, name: str) -> list[str]:  # noqa: ANN401
    """The names of one weight, its own first: an embedding that is used in two places has two."""
    return [name, *(alias for alias, source in _tied(module).items() if source == name)]


def _tied(module: Any) -> dict[str, str]:  # noqa: ANN401
    """From each other name of a weight to its own; diffusers' modules have none."""
    return getattr(module, "_tied_weights_keys", None) or {}


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers()
