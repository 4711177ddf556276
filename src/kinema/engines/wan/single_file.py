"""A transformer in a file of its own: what its tensors are called here, and which network they are. Needs no torch.

Such files are safetensors or GGUF. Their names are diffusers' or Wan's own, which ComfyUI uses too, also behind a
prefix. FP8 files have a scale beside each weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kinema.engines.wan.configs import TransformerConfig, quoted, validated
from kinema.engines.wan.safetensors_header import DamagedFile, Header
from kinema.engines.wan.weight_files import GGUF, header_of, refuse_pickle
from kinema.errors import ConfigError

Shape = tuple[int, ...]

# A name that ends so has the scale of the weight with the same beginning.
SCALES = (".scale_weight", ".weight_scale")
# What such files have besides: scales of inputs, which are for products in FP8, and marks of the format.
_MARKS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_IMAGE_POSITIONS = "condition_embedder.image_embedder.pos_embed"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Wan's own names and those of diffusers, outside of the blocks and in each of them (diffusers,
# loaders/single_file_utils.py: convert_wan_transformer_to_diffusers, which has all but the positions of two pictures).
# The image's layers belong to image-to-video.
_OUTSIDE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": _IMAGE_POSITIONS,
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_IN_A_BLOCK = {
    **{f"self_attn.{own}": f"attn1.{theirs}" for own, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"))},
    **{f"cross_attn.{own}": f"attn2.{theirs}" for own, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"))},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    **{f"{own}.o": f"{theirs}.to_out.0" for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))},
    **{f"self_attn.norm_{part}": f"attn1.norm_{part}" for part in "qk"},
    **{f"cross_attn.norm_{part}": f"attn2.norm_{part}" for part in "qk"},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
# All published models have heads of this width.
_HEAD_DIM = 128
# Parts of names that only files of other libraries or kinds have.
_FOREIGN_NAMES = {
    ".absmax": "is quantised by bitsandbytes (nf4 or fp4)",
    ".quant_state.": "is quantised by bitsandbytes (nf4 or fp4)",
    ".wscales": "is quantised by nunchaku",
    ".smooth_factor": "is quantised by nunchaku",
    ".qzeros": "is quantised by AWQ or GPTQ",
    ".qweight": "is quantised by AWQ, GPTQ or nunchaku",
    ".weight_scale_2": "is quantised to FP4",
    ".lora_": "is a LoRA",
}


def names_of_file(names: Iterable[str]) -> dict[str, str]:
    """Diffusers' name of each tensor of a file; a name that is not known stays as it is."""
    plain = {name: _without_prefix(name) for name in names}
    if any(name.startswith("condition_embedder.") for name in plain.values()):
        return plain
    return {name: _name_of(own) for name, own in plain.items()}


def is_scale(name: str) -> bool:
    return name.endswith(SCALES)


def is_mark(name: str) -> bool:
    """Whether a tensor says something of an FP8 file that is not needed to read it."""
    return name.endswith(_MARKS)


def shape_of(name: str, shape: Shape) -> Shape:
    """The shape of the tensor with this name of diffusers. GGUF drops a first dimension of 1, which a table has."""
    return (1, *shape) if name.endswith(("scale_shift_table", _IMAGE_POSITIONS)) and len(shape) == 2 else shape


def read_transformer(path: Path, setting: str) -> dict[str, Shape]:
    """The shapes of a transformer file's weights by diffusers' names. ``setting`` is what names the file in errors.

    Raises ConfigError for a file that cannot be read, by what it is.
    """
    where = f"{setting} = {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{where}: no such file; give a .safetensors or {GGUF} file with a Wan transformer")
    refuse_pickle(path)
    try:
        header = header_of(path)
    except (OSError, DamagedFile) as exc:
        raise ConfigError(f"{where} cannot be read: {exc}") from exc
    if (reason := _foreign(header)) is not None:
        raise ConfigError(
            f"{where} {reason}, which this engine does not read; give bf16, fp16, fp32, scaled FP8 or GGUF weights"
        )
    names = names_of_file(name for name in header.entries if not (is_scale(name) or is_mark(name)))
    return {new: shape_of(new, header.entries[old].shape) for old, new in names.items()}


def config_of(shapes: Mapping[str, Shape], published: TransformerConfig | None, where: str) -> TransformerConfig:
    """The network of a file's tensors: ``published``, if they fit it, or what their shapes say.

    Raises ConfigError for a file that is no Wan transformer, and names each difference from ``published``. ``where``
    names the file.
    """
    found = _sizes(shapes, where)
    if published is None:
        if found["width"] % _HEAD_DIM:
            raise ConfigError(
                f"{where} has {found['width']} channels, which are not heads of {_HEAD_DIM}; give a model folder with "
                "its transformer's config.json"
            )
        values = {name: value for name, value in found.items() if name != "width"}
        heads = {"num_attention_heads": found["width"] // _HEAD_DIM, "attention_head_dim": _HEAD_DIM}
        return validated(TransformerConfig, {**values, **heads}, Path(where), "its shapes")
    said = {name: getattr(published, name) for name in found}
    if different := [f"{name} is {found[name]} and not {said[name]}" for name in found if found[name] != said[name]]:
        raise ConfigError(f"{where} does not fit the transformer's config.json: {', '.join(different)}")
    return published


def _sizes(shapes: Mapping[str, Shape], where: str) -> dict[str, Any]:
    """The values of the config that shapes decide, and ``width``. Raises ConfigError."""

    def sides(name: str, count: int) -> Shape:
        shape = shapes.get(name)
        if shape is None:
            raise ConfigError(f"{where} is no Wan transformer: it has no tensor {name}")
        if len(shape) != count or 0 in shape:
            raise ConfigError(f"{where}: {name} has the shape {list(shape)[:8]}, and needs {count} sides")
        return shape

    width, in_channels, *patch = sides("patch_embedding.weight", 5)
    states, keys = (
        shapes.get(name, ())
        for name in ("condition_embedder.image_embedder.norm1.weight", "blocks.0.attn2.add_k_proj.weight")
    )
    positions = shapes.get(_IMAGE_POSITIONS, ())
    return {
        "width": width,
        "num_layers": len({match[1] for match in map(_BLOCK.fullmatch, shapes) if match is not None}),
        "ffn_dim": sides("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "in_channels": in_channels,
        "out_channels": sides("proj_out.weight", 2)[0] // math.prod(patch),
        "patch_size": tuple(patch),
        "text_dim": sides("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": sides("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "image_dim": states[-1] if states else None,
        "added_kv_proj_dim": keys[-1] if keys else None,
        "pos_embed_seq_len": positions[1] if len(positions) == 3 else None,
    }


def _foreign(header: Header) -> str | None:
    """What a file is that this engine does not read; None when nothing says so."""
    if "quantization_config" in header.metadata:
        return f"is quantised: {quoted(header.metadata['quantization_config'])}"
    return next((kind for part, kind in _FOREIGN_NAMES.items() if any(part in name for name in header.entries)), None)


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _name_of(name: str) -> str:
    """Diffusers' name for one of Wan's own."""
    found = _BLOCK.fullmatch(name)
    table, start, inner = (_OUTSIDE, "", name) if found is None else (_IN_A_BLOCK, f"{found[1]}.", found[2])
    return next((start + new for new in _renamed(table, inner)), name)


def _renamed(table: Mapping[str, str], name: str) -> Iterator[str]:
    """The name whose layer the table has, or which it has as a whole."""
    layer, _, last = name.rpartition(".")
    if name in table:
        yield table[name]
    if layer in table:
        yield f"{table[layer]}.{last}"
