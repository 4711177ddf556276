"""The VAE of a checkpoint as it was read: its config, its weights by their names, and the encoder that computes.

The decoder has its weights in a layout of its own (``weights.py``), so those that were read are dropped then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinema.engines.wan.configs import VaeConfig
from kinema.engines.wan.vae.encoder import VaeEncoder, encoder_shapes
from kinema.engines.wan.vae.names import Spec
from kinema.engines.wan.vae.weights import decoder_shapes


def vae_shapes(config: VaeConfig) -> Spec:
    """The name and shape of every weight, as diffusers' files of an AutoencoderKLWan have them."""
    return {**encoder_shapes(config), **decoder_shapes(config)}


class Vae:
    """``weights`` has a tensor for each name in ``vae_shapes(config)``, all of one type on one device."""

    def __init__(self, config: VaeConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.encoder = VaeEncoder(config, weights)

    @property
    def dtype(self) -> torch.dtype:
        """The type that it encodes in."""
        return self.weights["quant_conv.weight"].dtype

    @property
    def device(self) -> torch.device:
        return self.weights["quant_conv.weight"].device

    def drop_decoder(self) -> None:
        """Free the weights of the decoder, which ``extract_weights`` has copied."""
        for name in decoder_shapes(self.config):
            del self.weights[name]
