"""Tiny parts of diffusers that several kinds of checkpoints share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.dummies import texts


def flow_euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def flow_unipc(**config: Any) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, **config
    )


_VISION = {
    "hidden_size": texts.WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def clip_vision(image_size: int = 32, patch_size: int = 16) -> CLIPVisionModelWithProjection:
    size = {**_VISION, "image_size": image_size, "patch_size": patch_size}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**size, projection_dim=texts.WIDTH)).eval()


def clip_processor(side: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def siglip_vision() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**_VISION)).eval()


def siglip_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 32, "width": 32})


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def hunyuan_vae(channels: int = 4) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def wan_like(transformer: Any, scheduler: Any = None, **more: Any) -> dict[str, Any]:
    """The components of Wan and of what was made of it, with this transformer."""
    return {
        "tokenizer": texts.tokenizer(),
        "text_encoder": texts.umt5(),
        "vae": wan_vae(),
        "scheduler": flow_unipc(flow_shift=3.0) if scheduler is None else scheduler,
        "transformer": transformer,
        **more,
    }


def stand_in_for_torchvision() -> None:
    """Give the modules of Cosmos the three functions of torchvision that they use, where it is not installed."""
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict

    if hasattr(transformer_cosmos, "transforms"):
        return
    functional = SimpleNamespace(
        resize=lambda pixels, size, interpolation: torch.nn.functional.interpolate(pixels, size, mode=interpolation),
        to_tensor=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
    )
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    transformer_cosmos.transforms = controlnet_cosmos.transforms = transforms
    pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=transforms)


# The size of a transformer like Wan's.
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": texts.WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
