"""The names of tensors in LoRA files, as trainers write them, and the modules of a Wan transformer that they mean.

A key is a prefix, a module and a kind: ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``. Modules have their names
of diffusers or of Wan's original code, with dots or (kohya, LyCORIS) with underscores, and some files mix them. So a
name is compared in one form (``normal``): with underscores, and diffusers' words. Two modules never have one form.

diffusers' converters for Wan read less: they drop changes of norms, of the modulation and of the patches, refuse an
``alpha`` outside of the blocks, take three of the prefixes, and want every layer of a block in a file of kohya's kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

# The two matrices, ``alpha``, and changes of a whole weight or bias. ``up_bias`` is a bias that counts as ``up`` does.
Kind = Literal["down", "up", "up_bias", "alpha", "weight", "bias"]

FIRST, SECOND = "transformer", "transformer_2"

# The format that a prefix is typical of, and the transformer that it names, if it does. A file of diffusers for one
# transformer says ``transformer.``, whichever it is for.
_PREFIXES: dict[str, tuple[str, str | None]] = {
    "base_model.model.": ("PEFT", None),
    "transformer.": ("diffusers", None),
    "transformer_1.": ("AI Toolkit", FIRST),
    "transformer_2.": ("diffusers", SECOND),
    "diffusion_model.": ("ComfyUI", None),
    "model.": ("ComfyUI", None),
    "pipe.dit.": ("DiffSynth", None),
    "pipe.dit2.": ("DiffSynth", SECOND),
    "lora_unet_": ("kohya", None),
    "lycoris_": ("LyCORIS", None),
}
_UNPREFIXED = "no prefix"

# A name of an adapter may stand between, as in ``lora_A.default.weight``.
_MATRIX = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.(weight|bias)")
_MATRICES: dict[tuple[str, str], Kind] = {
    ("lora_A", "weight"): "down",
    ("lora_down", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_up", "weight"): "up",
    ("lora_B", "bias"): "up_bias",
    ("lora_up", "bias"): "up_bias",
}
_CHANGE = re.compile(r"(.+)\.(alpha|diff|diff_b|diff_m|w_norm|b_norm)")
_CHANGES: dict[str, Kind] = {
    "alpha": "alpha",
    "diff": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff_m": "weight",
}

# What other kinds of adapters have in their keys.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "magnitude": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "Conv LoRA",
    "reshape_weight": "Control LoRA",
    "set_weight": "Control LoRA",
}

# From the names of Wan's original code to those of diffusers, both with underscores. Its norm3 is diffusers' norm2; the
# original norm2 has no weights.
_WORDS = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"(blocks_\d+)_self_attn_", r"\1_attn1_"),
        (r"(blocks_\d+)_cross_attn_", r"\1_attn2_"),
        (r"(_attn[12])_([qkv])$", r"\1_to_\2"),
        (r"(_attn[12])_o$", r"\1_to_out_0"),
        (r"(_attn2)_([kv])_img$", r"\1_add_\2_proj"),
        (r"(_attn2)_norm_k_img$", r"\1_norm_added_k"),
        (r"(blocks_\d+)_ffn_0$", r"\1_ffn_net_0_proj"),
        (r"(blocks_\d+)_ffn_2$", r"\1_ffn_net_2"),
        (r"(blocks_\d+)_norm3$", r"\1_norm2"),
        (r"(blocks_\d+)_modulation$", r"\1_scale_shift_table"),
        (r"^head_modulation$", "scale_shift_table"),
        (r"^head_head$", "proj_out"),
        (r"^(text|time)_embedding_0$", r"condition_embedder_\1_embedder_linear_1"),
        (r"^(text|time)_embedding_2$", r"condition_embedder_\1_embedder_linear_2"),
        (r"^time_projection_1$", "condition_embedder_time_proj"),
        (r"^img_emb_proj_0$", "condition_embedder_image_embedder_norm1"),
        (r"^img_emb_proj_1$", "condition_embedder_image_embedder_ff_net_0_proj"),
        (r"^img_emb_proj_3$", "condition_embedder_image_embedder_ff_net_2"),
        (r"^img_emb_proj_4$", "condition_embedder_image_embedder_norm2"),
        (r"^img_emb_emb_pos$", "condition_embedder_image_embedder_pos_embed"),
    )
)


@dataclass(frozen=True)
class Key:
    """What a key says: the module as the file names it, without prefix, and what the tensor is to it.

    ``component`` is the transformer that it names, None when it names none.
    """

    module: str
    kind: Kind
    component: str | None
    format: str


def parse_key(key: str) -> Key | None:
    """What the key of a LoRA says; None for any other key."""
    matrix, change = _MATRIX.fullmatch(key), _CHANGE.fullmatch(key)
    if matrix is not None:
        kind = _MATRICES.get((matrix[2], matrix[3]))
        name = matrix[1]
    elif change is not None:
        kind = _CHANGES[change[2]]
        name = f"{change[1]}.modulation" if change[2] == "diff_m" else change[1]
    else:
        return None
    if kind is None:
        return None
    module, component, format_ = _without_prefix(name)
    return Key(module, kind, component, format_)


def _without_prefix(name: str) -> tuple[str, str | None, str]:
    """The module, the transformer that its prefixes name, and the format of the first one."""
    component, format_ = None, None
    while prefix := next(filter(name.startswith, _PREFIXES), None):
        # Some files of kohya's kind have two underscores after the prefix.
        name = name.removeprefix(prefix).lstrip("_")
        component = _PREFIXES[prefix][1] or component
        format_ = format_ or _PREFIXES[prefix][0]
    return name, component, format_ or _UNPREFIXED


@lru_cache(maxsize=8192)
def normal(module: str) -> str:
    """The one form of a module's names."""
    name = module.replace(".", "_")
    for pattern, word in _WORDS:
        name = pattern.sub(word, name)
    return name


def other_kind_of(key: str) -> str | None:
    """The kind of adapter that is no plain LoRA and has such a key; None for all other keys."""
    return next((kind for mark, kind in _OTHER_KINDS.items() if f".{mark}" in key), None)
