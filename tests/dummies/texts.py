"""Tiny tokenizers and text encoders of transformers, made of their configs."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    UMT5Config,
    UMT5EncoderModel,
)

# Four special tokens, then one for each byte.
PAD, EOS, BOS, UNK = range(4)
_SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
VOCABULARY = 300
WIDTH = 16
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"
)


def tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """One token for each byte, and an end."""
    letters = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    own = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
    made.chat_template = _CHAT
    return made


def byt5_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


def t5(width: int = WIDTH, vocabulary: int = VOCABULARY) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5(width, vocabulary))).eval()


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_t5(WIDTH, VOCABULARY))).eval()


def _t5(width: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
    }


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def clip(width: int = WIDTH) -> CLIPTextModel:
    return CLIPTextModel(_clip(width)).eval()


def clip_with_projection(width: int = WIDTH) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip(width)).eval()


def llama() -> LlamaModel:
    return LlamaModel(_llama()).eval()


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """One with the marks of HunyuanVideo's template and its sentences as tokens: of it all, 359 are read."""
    made = tokenizer()
    marks = ["<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    sentences = re.findall(r"\d\. .*?[.:](?=\d|<)", DEFAULT_PROMPT_TEMPLATE["template"])
    made.add_special_tokens({"additional_special_tokens": [*marks, *sentences]})
    return made


def llava() -> LlavaForConditionalGeneration:
    """It sees a picture of 48 pixels as 576 tokens, as many as the real one has."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
    )
    image = llava_tokenizer().convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=_llama(), image_token_index=image, pad_token_id=PAD, image_seq_length=576
    )
    return LlavaForConditionalGeneration(config).eval()


def _qwen_text() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 10000.0,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def qwen_text() -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen_text())).eval()


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma3() -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def t5_gemma2() -> T5Gemma2Encoder:
    """It sees pictures too, by the SigLIP within."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "dropout_rate": 0.0,  # which the class reads and its config lacks
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return T5Gemma2Encoder(config).eval()


def seeded(seed: int = 0) -> None:
    """Weights that are made next are those of this seed."""
    torch.manual_seed(seed)
