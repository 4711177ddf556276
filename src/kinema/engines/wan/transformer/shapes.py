"""What a transformer is made of, by the names of diffusers' files; known without torch."""

from __future__ import annotations

import math

from kinema.engines.wan.configs import TransformerConfig


def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight, as diffusers' files of a WanTransformer3DModel have them."""
    width, hidden = config.width, config.ffn_dim
    found: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 2, width)}

    def add(name: str, out: int, *inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, *inputs), (out,)

    add("patch_embedding", width, config.in_channels, *config.patch_size)
    add("condition_embedder.time_embedder.linear_1", width, config.freq_dim)
    add("condition_embedder.time_embedder.linear_2", width, width)
    add("condition_embedder.time_proj", 6 * width, width)
    add("condition_embedder.text_embedder.linear_1", width, config.text_dim)
    add("condition_embedder.text_embedder.linear_2", width, width)
    if config.image_dim is not None:
        found |= _image_shapes(config.image_dim, config)
    for block in (f"blocks.{index}" for index in range(config.num_layers)):
        if config.added_kv_proj_dim is not None:
            add(f"{block}.attn2.add_k_proj", width, config.added_kv_proj_dim)
            add(f"{block}.attn2.add_v_proj", width, config.added_kv_proj_dim)
            found[f"{block}.attn2.norm_added_k.weight"] = (width,)
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                add(f"{attention}.{name}", width, width)
            found[f"{attention}.norm_q.weight"] = found[f"{attention}.norm_k.weight"] = (width,)
        add(f"{block}.norm2", width)
        add(f"{block}.ffn.net.0.proj", hidden, width)
        add(f"{block}.ffn.net.2", width, hidden)
        found[f"{block}.scale_shift_table"] = (1, 6, width)
    add("proj_out", config.out_channels * math.prod(config.patch_size), width)
    return found


def _image_shapes(image_dim: int, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """What reads states of pictures."""
    embedder = "condition_embedder.image_embedder"
    found: dict[str, tuple[int, ...]] = {}
    if config.pos_embed_seq_len is not None:
        found[f"{embedder}.pos_embed"] = (1, config.pos_embed_seq_len, image_dim)
    for name, shape in {
        "norm1": (image_dim,),
        "ff.net.0.proj": (image_dim, image_dim),
        "ff.net.2": (config.width, image_dim),
        "norm2": (config.width,),
    }.items():
        found[f"{embedder}.{name}.weight"], found[f"{embedder}.{name}.bias"] = shape, shape[:1]
    return found
