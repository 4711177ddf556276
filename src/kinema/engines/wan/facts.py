"""What a video of the wan engine depends on besides its request: weights, code, libraries, device."""

from __future__ import annotations

import diffusers
import torch
import transformers
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from kinema.engines.hardware import cpu_name
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.digests import code_digest, weights_digest
from kinema.manifest import EngineFacts


def facts_of(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> EngineFacts:
    """Reads a part of the weights, for their digest. Raises OSError."""
    is_cuda = device.type == "cuda"
    versions = {
        "wan engine": code_digest(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if is_cuda:
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return EngineFacts(
        engine="wan",
        weights=weights_digest(checkpoint),
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        threads=None if is_cuda else torch.get_num_threads(),
        attention=f"diffusers {_AttentionBackendRegistry.get_active_backend()[0].value}",
        versions=versions,
    )
