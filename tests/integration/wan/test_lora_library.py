"""A folder of LoRAs beside an engine: what it lists is what it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.lora.reading import read_lora
from kinema.engines.wan.transformer.shapes import shapes
from kinema.errors import InvalidRequest
from tests.serving import until
from tests.unit.engines.wan.lora.files import pair, write_lora

CHECKPOINT = inspect("tiny-wan")
SHAPES = {name: shapes(config) for name, config in CHECKPOINT.transformers.items()}
TINY = pair("blocks.0.attn1.to_q", outs=256, ins=256)


async def test_an_engine_lists_the_files_that_it_can_read(tmp_path: Path) -> None:
    """Those of now, loaded or not; the digest is that of the bytes that are read. Without a folder there is none."""
    engine = WanEngine(CHECKPOINT, device="cpu", loras=tmp_path)
    assert engine.loras is not None
    assert engine.capabilities == CHECKPOINT.capabilities()
    write_lora(tmp_path / "paper.safetensors", TINY)
    write_lora(tmp_path / "other.safetensors", pair("blocks.0.attn1.to_q", outs=8, ins=8))
    await until(lambda: [info.name for info in engine.capabilities.loras] == ["paper"])
    (info,) = engine.capabilities.loras
    lora = engine.loras.file(info.name, info.digest)
    assert read_lora(lora.path, SHAPES, only=lora.only, second=lora.second).digest == info.digest
    with pytest.raises(InvalidRequest, match=r"the LoRA other cannot be used: .* is for another model"):
        engine.loras.file("other", info.digest)
    plain = WanEngine(CHECKPOINT, device="cpu")
    assert (plain.loras, plain.capabilities.loras) == (None, ())


def test_two_files_have_one_digest(tmp_path: Path) -> None:
    """Whoever makes it."""
    two = {"transformer": SHAPES["transformer"], "transformer_2": SHAPES["transformer"]}
    high, low = (write_lora(tmp_path / f"{name}.safetensors", TINY, {"of": name}) for name in ("high", "low"))
    (tmp_path / "high.json").write_text(json.dumps({"second": "low.safetensors"}), encoding="utf-8")
    engine = WanEngine(CHECKPOINT, device="cpu", loras=tmp_path)
    assert engine.loras is not None
    read = read_lora(high, two, second=low)
    # This model has one expert, so it refuses the pair; a library of a model with two has it.
    assert list(engine.loras.names()) == []
    (info,) = LoraLibrary(tmp_path, two).described(["high"])
    assert (info.digest, info.is_for, info.size_bytes) == (read.digest, "both", read.size_bytes)
