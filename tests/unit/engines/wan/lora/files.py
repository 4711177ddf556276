"""LoRA files of a small transformer, written without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from kinema.engines.wan.lora.fit import Shapes
from kinema.engines.wan.safetensors_header import ITEM_BYTES

WIDTH, HIDDEN, PATCH = 8, 16, (4, 1, 2, 2)
SHAPES: Shapes = {
    "scale_shift_table": (1, 2, WIDTH),
    "patch_embedding.weight": (WIDTH, *PATCH),
    "patch_embedding.bias": (WIDTH,),
    "condition_embedder.time_proj.weight": (6 * WIDTH, WIDTH),
    "condition_embedder.time_proj.bias": (6 * WIDTH,),
    "blocks.0.attn1.to_q.weight": (WIDTH, WIDTH),
    "blocks.0.attn1.to_q.bias": (WIDTH,),
    "blocks.0.attn1.norm_q.weight": (WIDTH,),
    "blocks.0.ffn.net.0.proj.weight": (HIDDEN, WIDTH),
    "blocks.0.ffn.net.0.proj.bias": (HIDDEN,),
    "blocks.0.norm2.weight": (WIDTH,),
    "blocks.0.norm2.bias": (WIDTH,),
    "blocks.0.scale_shift_table": (1, 6, WIDTH),
}
ONE = {"transformer": SHAPES}
TWO = {"transformer": SHAPES, "transformer_2": SHAPES}

QUERY = "diffusion_model.blocks.0.self_attn.q"
Tensors = Mapping[str, tuple[int, ...]]


def pair(module: str = QUERY, rank: int = 2, outs: int = WIDTH, ins: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """The shapes of the two matrices for a module."""
    return {f"{module}.lora_A.weight": (rank, ins), f"{module}.lora_B.weight": (outs, rank)}


def write_lora(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    dtype: str = "F32",
    others: Tensors | None = None,
) -> Path:
    """Write a file with zeros of these shapes; ``others`` are int64."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    end = 0
    kinds = [(name, shape, dtype) for name, shape in tensors.items()]
    kinds += [(name, shape, "I64") for name, shape in (others or {}).items()]
    for name, shape, kind in kinds:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path
