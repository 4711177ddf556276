"""The decoder's kernels, compiled for its config and its type without its weights; see ``kernels_ahead.py``."""

from __future__ import annotations

import torch

from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.kernels_ahead import compile_kernel
from kinema.engines.wan.vae.stream import Stream
from kinema.engines.wan.vae.weights import decoder_shapes, extract_weights, pairs_pay

# Latent rows and columns. No kernel is compiled for a size.
_SIZE = (8, 8)


def compile_decoder(config: VaeConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Ask for every kernel of a film's first latent frame and of the others."""
    from kinema.engines.wan.vae.decoder_kernels import (  # noqa: PLC0415 - Triton is there with CUDA only
        TritonDecoderOperations,
    )

    zeros = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in decoder_shapes(config).items()}
    weights = extract_weights(config, zeros, dtype, has_pairs=pairs_pay(device, dtype))
    stream = Stream(weights, TritonDecoderOperations(dtype, compile_kernel), *_SIZE)
    for is_first in (True, False):
        stream.compute(stream.new_latent(), is_first=is_first)
