"""The configs of the published Wan models, which are measured with random weights. Plain data: it imports nothing else.

Figures: the ``config.json`` files of the checkpoints in the diffusers format. The mean and the deviation of each latent
channel belong to the weights, and are 0 and 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One model's configs; the text encoder is the same for all models. With a ``boundary_ratio`` the model has two
    experts of one shape."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    flow_shift: float
    has_token_times: bool = False
    boundary_ratio: float | None = None
    has_image_encoder: bool = False

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The JSON files of a checkpoint, by their place in its folder."""
        index = _INDEX | {"expand_timesteps": self.has_token_times, "boundary_ratio": self.boundary_ratio}
        if self.transformer["in_channels"] > self.transformer["out_channels"]:
            index["_class_name"] = "WanImageToVideoPipeline"
        others: dict[str, dict[str, Any]] = {}
        if self.boundary_ratio is not None:
            index["transformer_2"], others["transformer_2/config.json"] = index["transformer"], self.transformer
        if self.has_image_encoder:
            index |= _IMAGE_INDEX
            others |= {
                "image_encoder/config.json": CLIP_VIT_H,
                "image_processor/preprocessor_config.json": _CLIP_PICTURE,
            }
        return {
            **others,
            "model_index.json": index,
            "scheduler/scheduler_config.json": _SOLVER | {"flow_shift": self.flow_shift},
            "text_encoder/config.json": UMT5_XXL,
            "transformer/config.json": self.transformer,
            "vae/config.json": self.vae,
        }


_INDEX: dict[str, Any] = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_IMAGE_INDEX: dict[str, Any] = {
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}
_SOLVER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
UMT5_XXL: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 256384,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


CLIP_VIT_H: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
}
_CLIP_PICTURE: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 224},
}


def _transformer(
    *, heads: int, layers: int, ffn: int, channels: int, read: int | None = None, image_dim: int | None = None
) -> dict[str, Any]:
    """``read`` are the channels of its input, where these are more than those that it predicts; ``image_dim`` is the
    width of the states of pictures that it attends to."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None if image_dim is None else 128 * heads,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": ffn,
        "freq_dim": 256,
        "image_dim": image_dim,
        "in_channels": read or channels,
        "num_attention_heads": heads,
        "num_layers": layers,
        "out_channels": channels,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }


def _vae(z_dim: int, base_dim: int, **others: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": base_dim,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "latents_mean": [0.0] * z_dim,
        "latents_std": [1.0] * z_dim,
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": z_dim,
        **others,
    }


_VAE_21 = _vae(16, 96)
_VAE_22 = _vae(
    48,
    160,
    decoder_base_dim=256,
    in_channels=12,
    out_channels=12,
    is_residual=True,
    patch_size=2,
    scale_factor_spatial=16,
    scale_factor_temporal=4,
)
ARCHITECTURES = {
    "wan2.1-t2v-1.3b": Architecture(_transformer(heads=12, layers=30, ffn=8960, channels=16), _VAE_21, 3.0),
    "wan2.1-t2v-14b": Architecture(_transformer(heads=40, layers=40, ffn=13824, channels=16), _VAE_21, 3.0),
    "wan2.1-i2v-14b-480p": Architecture(
        _transformer(heads=40, layers=40, ffn=13824, channels=16, read=36, image_dim=CLIP_VIT_H["hidden_size"]),
        _VAE_21,
        3.0,
        has_image_encoder=True,
    ),
    "wan2.2-t2v-a14b": Architecture(
        _transformer(heads=40, layers=40, ffn=13824, channels=16), _VAE_21, 12.0, boundary_ratio=0.875
    ),
    "wan2.2-i2v-a14b": Architecture(
        _transformer(heads=40, layers=40, ffn=13824, channels=16, read=36), _VAE_21, 5.0, boundary_ratio=0.9
    ),
    "wan2.2-ti2v-5b": Architecture(
        _transformer(heads=24, layers=30, ffn=14336, channels=48), _VAE_22, 5.0, has_token_times=True
    ),
}
