"""How the diffusers engine reads weights: quantised, from a file of their own, and compiled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Engine, UInt8Array
from kinema.engines.registry import create_engine
from kinema.errors import ConfigError
from kinema.settings import DiffusersSettings, EngineSettings
from tests.contract.engine import begin, frames_of, make_all

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "LTX-Video"
# The one layer of the dummy whose rows are whole blocks of Q8_0.
LAYER = "transformer_blocks.0.ff.net.2.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.dummies.pipelines import make

    folder = tmp_path_factory.mktemp("model")
    make(NAME).save_pretrained(folder)
    (folder / "kinema.json").write_text(json.dumps({"size": "96x64", "num_frames": 9}))
    return folder


def loaded(folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> Engine:
    more = {"name": "diffusers", "model": str(folder), "device": "cpu", **(engine or {})}
    made = create_engine(EngineSettings(**more, diffusers=DiffusersSettings(**settings)))
    made.load()
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> UInt8Array:
    """The frames that the folder makes as it is."""
    return frames_of(make_all(loaded(folder)))


@pytest.mark.parametrize(("quantization", "offload"), [("torchao_int8", "blocks"), ("torchao_fp8", "text")])
def test_quantised_weights_make_nearly_the_same_video(
    quantization: str, offload: str, folder: Path, plain: UInt8Array
) -> None:
    """The manifest names them. With offload, and for two that take turns, the frames are the same bits."""
    engine = loaded(folder, quantization=quantization)
    made = frames_of(make_all(engine))
    assert engine.facts.weights_dtype == quantization
    assert 0 < np.abs(made.astype(int) - plain.astype(int)).mean() < 2
    saving = loaded(folder, quantization=quantization, engine={"offload": offload})
    both = [list(outputs) for outputs in zip(*zip(begin(saving), begin(saving, seed=4), strict=True), strict=True)]
    assert np.array_equal(frames_of(both[0]), made)


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = (folder / "transformer").glob("*.safetensors")
    return dict(load_file(file))


def test_a_transformer_in_a_file_of_its_own(folder: Path, plain: UInt8Array, tmp_path: Path) -> None:
    """It makes the folder's bits, and no weights need lie in the folder; the manifest tells another file."""
    from safetensors.torch import save_file

    tensors = tensors_of(folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    moved = file.rename(tmp_path / "ltx.safetensors")
    try:
        engine = loaded(folder, transformer=moved)
        tensors["proj_in.bias"] += 1
        save_file(tensors, tmp_path / "other.safetensors")
        other = loaded(folder, transformer=tmp_path / "other.safetensors")
    finally:
        moved.rename(file)
    assert np.array_equal(frames_of(make_all(engine)), plain)
    assert engine.facts.weights != other.facts.weights
    assert not np.array_equal(frames_of(make_all(other)), plain)


def test_a_file_is_read_in_the_types_of_a_folder(tmp_path: Path) -> None:
    """Wan keeps the embedding of its times and others in float32 beside bfloat16. Frames are the same bits."""
    from tests.dummies.pipelines import make

    make("Wan").save_pretrained(tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    engines = [loaded(tmp_path, engine={"dtype": "bfloat16"}, **more) for more in ({}, {"transformer": file})]
    made = [frames_of(make_all(engine, num_frames=1, num_inference_steps=2)) for engine in engines]
    assert np.array_equal(made[0], made[1])


def test_a_gguf_file_is_what_its_blocks_stand_for(folder: Path, tmp_path: Path) -> None:
    """Bit for bit, in float32; the library restores a block in the type of its scale, which is float16."""
    import gguf
    import torch
    from safetensors.torch import save_file

    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = tensors_of(folder)
    blocks = gguf.quants.quantize(tensors[LAYER].numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "ltx.gguf", "ltxv")
    for name, tensor in tensors.items():
        if name == LAYER:
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors[LAYER] = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).half().float()
    save_file(tensors, tmp_path / "restored.safetensors")
    made, restored = (
        frames_of(make_all(loaded(folder, transformer=tmp_path / name)))
        for name in ("ltx.gguf", "restored.safetensors")
    )
    assert np.array_equal(made, restored)


def _without_one(tensors: dict[str, Any]) -> None:
    del tensors["proj_out.bias"]


def _with_another_shape(tensors: dict[str, Any]) -> None:
    tensors["proj_in.bias"] = tensors["proj_in.bias"][:3].clone()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without_one, "is not the LTXVideoTransformer3DModel of .*: it lacks some of its weights"),
        (_with_another_shape, r"is not the LTXVideoTransformer3DModel of .*: .*proj_in\.bias expected shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], sentence: str, folder: Path, tmp_path: Path
) -> None:
    """When the model is loaded, with the setting's name."""
    from safetensors.torch import save_file

    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, tmp_path / "ltx.safetensors")
    with pytest.raises(ConfigError, match=rf"engine\.diffusers\.transformer = '.*' {sentence}"):
        loaded(folder, transformer=tmp_path / "ltx.safetensors")


def test_a_variant_is_read_where_there_are_no_plain_files(folder: Path, plain: UInt8Array, tmp_path: Path) -> None:
    """In some or all of the networks; two variants are refused with their names."""
    copied = shutil.copytree(folder, tmp_path / "model")
    for name in ("transformer", "text_encoder"):
        (file,) = (copied / name).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".", ".fp16.")))
    assert np.array_equal(frames_of(make_all(loaded(copied))), plain)
    (file,) = (copied / "vae").glob("*.safetensors")
    file.rename(file.with_name(file.name.replace(".", ".bf16.")))
    with pytest.raises(ConfigError, match=r"fp16 and vae as bf16, without plain files; diffusers reads one variant"):
        loaded(copied)


@pytest.mark.parametrize(
    ("network", "tensor", "has_index"),
    [
        ("transformer", "proj_out.bias", False),
        ("transformer", "proj_out.bias", True),
        # The library reads what its files have, also without a line in the index.
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", False),
    ],
)
def test_a_folder_that_lacks_a_tensor_is_refused(network: str, tensor: str, has_index: bool, tmp_path: Path) -> None:
    """By its name, whether its file or its index has no such one; the library would draw random numbers."""
    from safetensors.torch import load_file, save_file

    from tests.dummies.pipelines import make

    make(NAME).save_pretrained(tmp_path, max_shard_size="30KB" if has_index else "1GB")
    folder = tmp_path / network
    if has_index:
        (file,) = folder.glob("*.index.json")
        index = json.loads(file.read_text())
        del index["weight_map"][tensor]
        file.write_text(json.dumps(index))
    else:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        # Others that the class does not know take no tensor's place.
        tensors |= {f"decoder.{name}": tensors[tensor].clone() for name in "abc"} if network == "text_encoder" else {}
        del tensors[tensor]
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{network} lacks some of its weights: '{re.escape(tensor)}'"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.safetensors", None, "no such file; give a .safetensors or .gguf file"),
        ("ltx.bin", b"", "is a pickle"),
        ("ltx.safetensors", b"<!doctype html>", "cannot be read: "),
        ("ltx.gguf", b"GGUF\3\0\0\0", "cannot be read: "),
    ],
)
def test_what_is_no_file_of_weights_is_refused_before_the_load(
    name: str, content: bytes | None, sentence: str, folder: Path, tmp_path: Path
) -> None:
    """By the same sentence from everything that looks at the model."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    settings = DiffusersSettings(transformer=tmp_path / name)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        create_engine(EngineSettings(name="diffusers", model=str(folder), device="cpu", diffusers=settings))


def test_the_blocks_that_a_transformer_repeats_are_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else; the manifest says so."""
    import torch

    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    assert loaded(folder, compile=True).facts.compiled
    assert set(compiled) == {"LTXVideoTransformerBlock"}


@pytest.mark.families
def test_inductor_makes_nearly_the_same_video(folder: Path, plain: UInt8Array) -> None:
    """By its kernels for this processor, with blocks that come and go too."""
    for offload in ("none", "blocks"):
        made = frames_of(make_all(loaded(folder, compile=True, engine={"offload": offload})))
        assert np.abs(made.astype(int) - plain.astype(int)).max() <= 2


@pytest.mark.parametrize(
    ("engine", "settings", "sentence"),
    [
        (
            {"weights": "fp8"},
            {"quantization": "torchao_int8"},
            "not with engine.weights = 'fp8'; leave one of them out",
        ),
        (
            {},
            {"quantization": "torchao_int8", "loras": Path()},
            "engine.diffusers.loras: not with engine.diffusers.quan",
        ),
        (
            {},
            {"quantization": "torchao_int8", "transformer": "x.safetensors"},
            "not with engine.diffusers.quantization",
        ),
        ({}, {"quantization": "bitsandbytes_4bit"}, "bitsandbytes"),
        (
            {"offload": "blocks"},
            {"quantization": "torchao_fp8", "compile": True},
            "engine.diffusers.compile: not with engine.diffusers.quantization = 'torchao_fp8'",
        ),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(
    engine: dict[str, Any], settings: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    """In one sentence each."""
    if "transformer" in settings:
        (file,) = (folder / "transformer").glob("*.safetensors")
        settings = {**settings, "transformer": file}
    if "loras" in settings:
        settings = {**settings, "loras": tmp_path}
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        loaded(folder, engine=engine, **settings)


def test_compiling_needs_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is looked for at the start, not at the first video."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"engine\.diffusers\.compile: there is no C\+\+ compiler here"):
        loaded(folder, compile=True)
