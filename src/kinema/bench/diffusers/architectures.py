"""The components of published pipelines, which are measured with random weights. Plain data: it loads no library.

Figures: the classes of diffusers 0.42.1, whose own defaults are the sizes of these checkpoints where nothing is given,
and the ``config.json`` files of the text encoders (Qwen2.5-VL 7B, Glyph-ByT5, Gemma 3 12B, UMT5-XXL).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kinema.bench.wan.architectures import ARCHITECTURES as WAN
from kinema.bench.wan.architectures import UMT5_XXL

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Component:
    """A class of the module ``library`` and its config; what the config leaves out are the class's defaults."""

    library: str
    kind: str
    config: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A pipeline of the row ``family`` of the table of families.

    ``tokenizers`` are the lengths of its tokenizers, by their names: the bundled model's has their place, since any
    token ids will do. One without a length reads bytes (ByT5).
    """

    family: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, int | None]


def _diffusers(kind: str, **config: Any) -> Component:  # noqa: ANN401 - JSON
    return Component("diffusers", kind, config)


def _transformers(kind: str, **config: Any) -> Component:  # noqa: ANN401 - JSON
    return Component("transformers", kind, config)


def _without_class(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


_UNIPC = _diffusers("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
_LTX_2 = "diffusers.pipelines.ltx2"
_QWEN_25_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1_000_000.0,
}
_GLYPH_BYT5 = {
    "vocab_size": 1510,
    "d_model": 1472,
    "d_kv": 64,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
_GEMMA_3_12B = {
    "text_config": {
        "vocab_size": 262_208,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 256,
}

ARCHITECTURES: dict[str, Architecture] = {
    # As small as it gets, to try the command.
    "tiny": Architecture(
        "Wan",
        {
            "transformer": _diffusers(
                "WanTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=12,
                ffn_dim=32,
                num_layers=1,
                text_dim=16,
            ),
            "vae": _diffusers("AutoencoderKLWan", base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            "scheduler": _UNIPC,
            "text_encoder": _transformers(
                "UMT5EncoderModel", vocab_size=4000, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
            ),
        },
        {"tokenizer": 512},
    ),
    "wan2.1-t2v-1.3b": Architecture(
        "Wan",
        {
            "transformer": _diffusers("WanTransformer3DModel", **_without_class(WAN["wan2.1-t2v-1.3b"].transformer)),
            "vae": _diffusers("AutoencoderKLWan", **_without_class(WAN["wan2.1-t2v-1.3b"].vae)),
            "scheduler": _UNIPC,
            "text_encoder": _transformers("UMT5EncoderModel", **UMT5_XXL),
        },
        {"tokenizer": 512},
    ),
    "hunyuanvideo-1.5": Architecture(
        "HunyuanVideo 1.5",
        {
            "transformer": _diffusers("HunyuanVideo15Transformer3DModel", task_type="t2v"),
            "vae": _diffusers("AutoencoderKLHunyuanVideo15"),
            "scheduler": _diffusers("FlowMatchEulerDiscreteScheduler", shift=5.0),
            "text_encoder": _transformers("Qwen2_5_VLTextModel", **_QWEN_25_7B),
            "text_encoder_2": _transformers("T5EncoderModel", **_GLYPH_BYT5),
            "guider": _diffusers("ClassifierFreeGuidance", guidance_scale=6.0),
        },
        {"tokenizer": 1108, "tokenizer_2": None},
    ),
    "ltx-2": Architecture(
        "LTX-2",
        {
            "transformer": _diffusers("LTX2VideoTransformer3DModel"),
            "connectors": Component(_LTX_2, "LTX2TextConnectors"),
            "vae": _diffusers("AutoencoderKLLTX2Video", spatial_compression_ratio=32, temporal_compression_ratio=8),
            "audio_vae": _diffusers("AutoencoderKLLTX2Audio"),
            "vocoder": Component(_LTX_2, "LTX2Vocoder"),
            "scheduler": _diffusers("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
            "text_encoder": _transformers("Gemma3ForConditionalGeneration", **_GEMMA_3_12B),
        },
        {"tokenizer": 1024},
    ),
}
