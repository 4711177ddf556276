"""A transformer's kernels, compiled for its config and its types without its weights; see ``kernels_ahead.py``."""

from __future__ import annotations

import torch

from kinema.engines.wan.configs import TransformerConfig
from kinema.engines.wan.kernels_ahead import compile_kernel
from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.embeddings import empty_text, modulate, rotation_of
from kinema.engines.wan.transformer.forward import Forward, grid_of
from kinema.engines.wan.transformer.fp8 import Linears
from kinema.engines.wan.transformer.network import TransformerWeights, dtype_of, extract_network
from kinema.engines.wan.transformer.shapes import shapes

# What stands between two blocks needs two of them; more have the same kernels.
_NUM_LAYERS = 2
# Rows and columns of tokens. Triton compiles one kernel for numbers of tokens that 16 divides, and one for others.
_GRIDS = ((4, 8), (4, 6))
# With the prompt and without it.
_NUM_TEXTS = 2


def compile_blocks(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, attention: Attention, linears: Linears
) -> None:
    """Ask for every kernel of a step that has no clean first frame."""
    from kinema.engines.wan.transformer.block_kernels import (  # noqa: PLC0415 - Triton is there with CUDA only
        TritonBlockOperations,
    )

    small = config.model_copy(update={"num_layers": _NUM_LAYERS})
    zeros = {
        name: torch.zeros(shape, dtype=dtype_of(name, dtype), device=device) for name, shape in shapes(small).items()
    }
    network = extract_network(TransformerWeights(small, zeros), linears)
    operations = TritonBlockOperations(network.num_heads, network.eps, compile_kernel)
    forward = Forward(network, operations, attention)
    text = empty_text(network, _NUM_TEXTS, MAX_TEXT_TOKENS)
    projected = torch.zeros(6, 1, network.width, device=device)
    modulation = modulate(network, projected, torch.zeros(1, network.width, dtype=dtype, device=device), 0)
    _, height, width = config.patch_size
    for rows, columns in _GRIDS:
        size = (1, config.in_channels, config.patch_size[0], rows * height, columns * width)
        latents = torch.zeros(size, dtype=dtype, device=device)
        forward.velocities(latents, modulation, rotation_of(network, grid_of(network, size)), text)
