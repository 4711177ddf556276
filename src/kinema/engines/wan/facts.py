"""What a video of the wan engine depends on besides its request: weights, code, libraries, device."""

from __future__ import annotations

from importlib.metadata import version

import diffusers
import torch
import transformers

from kinema.engines.hardware import cpu_name
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.digests import code_digest, weights_digest
from kinema.engines.wan.ranks.plan import Plan
from kinema.engines.wan.transformer.attention import AttentionChoice
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.manifest import EngineFacts


def facts_of(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    attention: AttentionChoice,
    linears: Linears,
    plan: Plan | None,
    *,
    has_step_cache: bool,
) -> EngineFacts:
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
        versions["triton"] = version("triton")
    if attention.has_fa3:
        versions["fa3-fwd"] = version("fa3-fwd")
    return EngineFacts(
        engine="wan",
        weights=weights_digest(checkpoint),
        dtype=_name(dtype),
        decode_dtype=_name(vae_dtype),
        device=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        threads=None if is_cuda else torch.get_num_threads(),
        gpus=None if plan is None else plan.num_ranks,
        parallel=None if plan is None else plan.parallel,
        attention=attention.name,
        linears=None if linears == "dtype" else linears,
        step_cache=has_step_cache or None,
        versions=versions,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
