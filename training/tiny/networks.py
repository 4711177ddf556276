"""The three networks of the tiny checkpoint: classes of diffusers and transformers, small, with careful first weights.

This module knows sizes and initial weights; the training forwards are in `fast`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 16
MASK_CHANNELS = 4  # one for each frame of a latent frame
TEXT_DIM = 128
VAE_CONFIG = {
    "base_dim": 16,
    "decoder_base_dim": 24,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],  # diffusers' spelling
    "in_channels": 12,  # 2 x 2 pixels of 3 colours, as in Wan 2.2's autoencoder
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 256,
}
# Shape, colour and background are given to it, so a quarter of the weights is enough.
IMAGE_TRANSFORMER_CONFIG = TRANSFORMER_CONFIG | {
    "num_attention_heads": 5,
    "in_channels": LATENT_CHANNELS + MASK_CHANNELS + LATENT_CHANNELS,
    "freq_dim": 64,
    "ffn_dim": 416,
    "num_layers": 4,
}
TEXT_ENCODER_CONFIG = {
    "d_model": TEXT_DIM,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "use_cache": False,
}


def make_vae() -> AutoencoderKLWan:
    """An autoencoder whose signal keeps its size through every convolution; diffusers' default loses two thirds."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv1.weight.data *= 1.6  # what SiLU takes away
            module.conv2.weight.data *= 0.8  # half a step beside the shortcut
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            _start_as_copy(module.time_conv)
    return vae


def _start_as_copy(conv: nn.Conv3d) -> None:
    """Let a convolution over time begin by handing on its latest frame (twice, where it doubles them)."""
    conv.weight.data *= 0.3
    channels = conv.in_channels
    for start in range(0, conv.out_channels, channels):
        conv.weight.data[start : start + channels, :, -1, 0, 0] += torch.eye(channels)


def make_transformer(config: dict[str, Any] = TRANSFORMER_CONFIG) -> WanTransformer3DModel:
    """A denoiser that begins by predicting nothing, its blocks half open."""
    transformer = WanTransformer3DModel(**config)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(("to_out.0", "ffn.net.2")):
            module.weight.data *= 0.5
    nn.init.xavier_uniform_(transformer.patch_embedding.weight.data.flatten(1))
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocabulary_size, dtype="float32", **TEXT_ENCODER_CONFIG)
    encoder = UMT5EncoderModel(config)
    nn.init.normal_(encoder.shared.weight)
    return encoder.train()
