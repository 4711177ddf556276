"""Small Wan checkpoints with random weights, in the diffusers layout, one per published style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "circle",
    "moving",
    "right",
    "on",
    "the",
    "black",
    "sky",
    "blurry",
    "bad",
]
Z_DIM = 4
# Channels that say which frames are given: one for each frame of a latent frame.
_MASKS = 4
# What CLIP says of a picture: so many states of this width.
_IMAGE_KEYS, _IMAGE_DIM = 5, 16


def save_wan21(folder: Path) -> Path:
    """The style of Wan 2.1 T2V: one timestep for all tokens, VAE without patches."""
    return _save(folder, expand_timesteps=False)


def save_two_experts(folder: Path) -> Path:
    """The style of Wan 2.2 A14B: two transformers with a boundary between them."""
    return _save(folder, expand_timesteps=False, boundary_ratio=0.875)


def save_ti2v(folder: Path) -> Path:
    """The style of Wan 2.2 TI2V: a timestep per token, VAE with 2x2 patches and residual shortcuts."""
    return _save(folder, expand_timesteps=True)


def with_scheduler(origin: Path, folder: Path, scheduler: SchedulerMixin) -> Path:
    """The checkpoint with another scheduler of diffusers."""
    folder.mkdir()
    for part in origin.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    (folder / "model_index.json").unlink()
    index = json.loads((origin / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def save_i2v22(folder: Path) -> Path:
    """The style of Wan 2.2 I2V A14B: two experts that read given frames in channels of their own."""
    return _save(folder, expand_timesteps=False, boundary_ratio=0.9, has_image_channels=True)


def save_i2v(folder: Path) -> Path:
    """The same with one transformer."""
    return _save(folder, expand_timesteps=False, has_image_channels=True)


def save_i2v21(folder: Path) -> Path:
    """The style of Wan 2.1 I2V: it also attends to what CLIP sees in the first frame."""
    return _save(folder, expand_timesteps=False, has_image_channels=True, num_pictures=1)


def save_flf2v(folder: Path) -> Path:
    """The style of Wan 2.1 FLF2V: what CLIP sees in the first and in the last frame has positions."""
    return _save(folder, expand_timesteps=False, has_image_channels=True, num_pictures=2)


def _save(
    folder: Path,
    *,
    expand_timesteps: bool,
    boundary_ratio: float | None = None,
    has_image_channels: bool = False,
    num_pictures: int = 0,
) -> Path:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    torch.manual_seed(7)
    in_channels = _MASKS + 2 * Z_DIM if has_image_channels else Z_DIM
    pipeline = (WanImageToVideoPipeline if has_image_channels else WanPipeline)(
        tokenizer=_tokenizer(),
        text_encoder=_text_encoder(),
        vae=make_vae(is_patched=expand_timesteps),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=_transformer(in_channels, num_pictures),
        transformer_2=_transformer(in_channels) if boundary_ratio is not None else None,
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        **(_image_parts() if num_pictures else {}),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _text_encoder() -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval()


def _image_parts() -> dict[str, object]:
    """CLIP's vision tower and its processor, for pictures of 28x28."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=_IMAGE_DIM,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    encoder = CLIPVisionModel(config).eval()
    for parameter in encoder.parameters():  # so that pictures differ by more than they do at the start of a training
        parameter.data += 0.3 * torch.randn_like(parameter)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": encoder, "image_processor": processor}


def _transformer(in_channels: int, num_pictures: int = 0) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=Z_DIM,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
        image_dim=_IMAGE_DIM if num_pictures else None,
        added_kv_proj_dim=24 if num_pictures else None,
        pos_embed_seq_len=2 * _IMAGE_KEYS if num_pictures == 2 else None,
    ).eval()
    # So that given frames are seen by more than at the start of a training.
    transformer.patch_embedding.weight.data[:, Z_DIM:] *= 20
    return transformer


def make_vae(*, is_patched: bool) -> AutoencoderKLWan:
    """Wan 2.1's in small, or Wan 2.2's."""
    from diffusers import AutoencoderKLWan

    common = {
        "base_dim": 8,
        "z_dim": Z_DIM,
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.8, 1.2, 1.0],
    }
    if is_patched:
        extra = {
            "dim_mult": [1, 2, 2],
            "temperal_downsample": [True, True],
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "is_residual": True,
        }
    else:
        extra = {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [False, True, True]}
    return AutoencoderKLWan(**common, **extra).eval()
