"""Weights that our reader brings are those that diffusers and transformers load, bit for bit, also from a copy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.engines.wan import tensors, weights_cache
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.engines.wan.loading import Components, load, load_transformers
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.text_encoder import ALIASES
from kinema.engines.wan.tokenizer import Tokenizer
from kinema.errors import ConfigError
from tests.integration.wan.random_checkpoints import save_ti2v, save_two_experts, save_wan21

CPU = Placement(torch.device("cpu"))
SAVERS: dict[str, Callable[[Path], Path]] = {"wan21": save_wan21, "two-experts": save_two_experts, "ti2v": save_ti2v}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """In float32, with a folder for copies, of which none is too small."""
    monkeypatch.setattr(weights_cache, "_LEAST_SAVING_BYTES", 1)
    return replace(inspect(str(save_wan21(tmp_path / "model"))), cache=tmp_path / "cache")


def copies(checkpoint: Checkpoint) -> list[Path]:
    assert checkpoint.cache is not None
    return sorted(checkpoint.cache.glob("*"))


def numbers(parts: Components) -> dict[str, Tensor]:
    """Of every weight."""
    components = {
        "text_encoder": parts.text_encoder.weights,
        "transformer": parts.transformer.tensors,
        "transformer_2": {} if parts.transformer_2 is None else parts.transformer_2.tensors,
        "vae": parts.vae.weights,
    }
    return named(components)


def named(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{component}.{name}": tensor for component, own in components.items() for name, tensor in own.items()}


def theirs(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    def transformer(name: str) -> Any:
        return WanTransformer3DModel.from_pretrained(str(checkpoint.path), subfolder=name, dtype=dtype)

    path = str(checkpoint.path)
    text_encoder = UMT5EncoderModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype).state_dict()
    del text_encoder[ALIASES["shared.weight"]]
    return named(
        {
            "text_encoder": text_encoder,
            "transformer": transformer("transformer").state_dict(),
            "transformer_2": transformer("transformer_2").state_dict() if checkpoint.has_two_experts else {},
            "vae": AutoencoderKLWan.from_pretrained(path, subfolder="vae", dtype=torch.float32).state_dict(),
        }
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("style", ["wan21", "two-experts", "ti2v", "tiny-wan"])
def test_weights_are_those_of_the_libraries(style: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, types and bits of every component of every style, and of the bundled model."""
    checkpoint = inspect(str(SAVERS[style](tmp_path / style)) if style in SAVERS else style)
    assert_same(numbers(load(checkpoint, CPU, dtype)), theirs(checkpoint, dtype))


def test_shards_and_small_pieces(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component in many files, each tensor read in pieces that do not divide it."""
    from diffusers import WanTransformer3DModel

    expected = theirs(checkpoint, torch.bfloat16)
    folder = checkpoint.path / "transformer"
    whole = WanTransformer3DModel.from_pretrained(str(folder))
    shutil.rmtree(folder)
    whole.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 40)
    assert_same(numbers(load(checkpoint, CPU, torch.bfloat16)), expected)


def test_transformers_alone(tmp_path: Path) -> None:
    """The experts that another rank loads are those of the whole."""
    checkpoint = inspect(str(save_two_experts(tmp_path)))
    first, second = load_transformers(checkpoint, CPU.device, torch.bfloat16)
    parts = load(checkpoint, CPU, torch.bfloat16)
    for alone, whole in ((first, parts.transformer), (second, parts.transformer_2)):
        assert_same(alone.tensors, whole.tensors)


def test_a_copy_has_the_same_weights(checkpoint: Checkpoint) -> None:
    """The first load makes one per component that gets smaller, which the second reads in place of the checkpoint."""
    expected = numbers(load(checkpoint, CPU, torch.bfloat16))
    found = copies(checkpoint)
    assert [path.name.split(".")[1] for path in found] == ["text_encoder", "transformer"]
    made = [path.stat().st_mtime_ns for path in found]
    assert_same(numbers(load(checkpoint, CPU, torch.bfloat16)), expected)
    assert [path.stat().st_mtime_ns for path in copies(checkpoint)] == made


def test_a_copy_is_what_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checkpoint's own large files no tensor is read when there are copies."""
    load(checkpoint, CPU, torch.bfloat16)
    read: set[str] = set()
    read_exactly = tensors._read_exactly

    def note(path: Path, into: memoryview, start: int) -> None:
        read.add(path.parent.name)
        read_exactly(path, into, start)

    monkeypatch.setattr(tensors, "_read_exactly", note)
    load(checkpoint, CPU, torch.bfloat16)
    assert read == {"cache", "vae"}


def test_no_copy_where_nothing_gets_smaller(checkpoint: Checkpoint) -> None:
    """A model that runs in the type of its files, or a checkpoint without a folder for copies, leaves none."""
    load(checkpoint, CPU, torch.float32)
    load(replace(checkpoint, cache=None), CPU, torch.bfloat16)
    assert copies(checkpoint) == []


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-101] ^= 4
    path.write_bytes(content)


def write_nonsense(path: Path) -> None:
    path.write_bytes(b"nonsense")


def drop_sums(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, write_nonsense, drop_sums])
def test_a_damaged_copy_is_made_again(checkpoint: Checkpoint, damage: Callable[[Path], None]) -> None:
    """Its weights are never used: those of the checkpoint are, and the copy is whole afterwards."""
    expected = numbers(load(checkpoint, CPU, torch.bfloat16))
    path = copies(checkpoint)[1]
    whole = path.read_bytes()
    damage(path)
    assert_same(numbers(load(checkpoint, CPU, torch.bfloat16)), expected)
    assert path.read_bytes() == whole


def test_a_copy_that_goes_away_is_not_missed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when that happens while it is read."""
    expected = numbers(load(checkpoint, CPU, torch.bfloat16))
    read_exactly = tensors._read_exactly

    def remove_and_read(path: Path, into: memoryview, start: int) -> None:
        if path.parent.name == "cache":
            path.unlink(missing_ok=True)
        read_exactly(path, into, start)

    monkeypatch.setattr(tensors, "_read_exactly", remove_and_read)
    assert_same(numbers(load(checkpoint, CPU, torch.bfloat16)), expected)


def test_other_weights_have_another_copy(checkpoint: Checkpoint) -> None:
    """Weights that were changed in place are read, though the file is of the same size, and the old copy goes."""
    load(checkpoint, CPU, torch.bfloat16)
    old = copies(checkpoint)
    path = checkpoint.path / "transformer" / "diffusion_pytorch_model.safetensors"
    flip_a_bit(path)
    assert_same(numbers(load(checkpoint, CPU, torch.bfloat16)), theirs(checkpoint, torch.bfloat16))
    new = copies(checkpoint)
    assert len(new) == len(old) == 2
    assert new[0] == old[0]
    assert new[1] != old[1]


def test_a_folder_that_cannot_be_written_stops_nothing(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are read, and the log says why no copy was kept."""
    (tmp_path / "file").touch()
    load(replace(checkpoint, cache=tmp_path / "file" / "cache"), CPU, torch.bfloat16)
    assert "no copy of the weights was kept" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"), [(cut_off, "is cut off"), (write_nonsense, "is no safetensors file")], ids=["cut", "nonsense"]
)
def test_damaged_weights_are_refused(checkpoint: Checkpoint, damage: Callable[[Path], None], reason: str) -> None:
    """By one sentence that names the file."""
    damage(checkpoint.path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=f"diffusion_pytorch_model.safetensors {reason}"):
        load(checkpoint, CPU, torch.float32)


WEIGHTS = {
    "transformer": ("diffusion_pytorch_model.safetensors", "proj_out.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    "text_encoder": ("model.safetensors", "encoder.final_layer_norm.weight"),
}


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_of_another_model_are_refused(
    component: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing tensor, one of another shape or type, and those without a place are named, before memory is taken."""
    monkeypatch.setattr(torch, "empty", lambda *_shape, **_how: pytest.fail("memory was taken"))
    file, name = WEIGHTS[component]
    path = checkpoint.path / component / file
    found = load_file(path)
    tensor = found[name]

    def refuses(tensors: dict[str, Tensor], sentence: str) -> None:
        save_file(tensors, path)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            load(checkpoint, CPU, torch.float32)

    cut, shape = tensor[:1].clone(), list(tensor.shape)
    refuses({**found, name: cut}, f"{component}: {name} has the shape {list(cut.shape)} and not {shape}")
    refuses({**found, name: tensor.to(torch.int8)}, f"{component}: {name} is of torch.int8; weights are floating-point")
    more = {f"lora.{number}": cut for number in range(7)}
    refuses(
        {**found, **{name: one.clone() for name, one in more.items()}},
        f"{component} has the tensor lora.0, lora.1, lora.2 and 4 more, which its config.json has no place for",
    )
    refuses({key: value for key, value in found.items() if key != name}, f"{component} has no tensor {name}")


def test_a_config_that_asks_for_more_than_the_files_have_takes_no_memory(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a terabyte that a config names, nothing is allocated."""
    monkeypatch.setattr(torch, "empty", lambda *_shape, **_how: pytest.fail("memory was taken"))
    path = checkpoint.path / "transformer" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "num_layers": 1000, "ffn_dim": 2**20}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"transformer has no tensor blocks\.2\..* and \d+ more"):
        load(inspect(str(checkpoint.path)), CPU, torch.float32)


def test_a_tensor_that_two_shards_have_is_refused(checkpoint: Checkpoint) -> None:
    """Nobody knows which one is meant."""
    folder = checkpoint.path / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    found = load_file(whole)
    whole.unlink()
    save_file(found, folder / "part-1.safetensors")
    save_file({"proj_out.bias": found["proj_out.bias"]}, folder / "part-2.safetensors")
    places = {**dict.fromkeys(found, "part-1.safetensors"), "proj_out.bias": "part-2.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"transformer has proj_out\.bias in two files"):
        load(checkpoint, CPU, torch.float32)


def test_a_vae_that_makes_another_size_than_it_says_is_refused(checkpoint: Checkpoint) -> None:
    """Its videos would come out half as large."""
    path = checkpoint.path / "vae" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "scale_factor_spatial": 16}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"are \(16, 4\), and its layers make \(8, 4\)"):
        load(inspect(str(checkpoint.path)), CPU, torch.float32)


def test_code_of_a_tokenizers_own_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers converts a tokenizer, too: here it would be run with a yes on the terminal."""
    ran = tmp_path / "ran"
    (tmp_path / "tokenizer").mkdir()
    code = f"open({str(ran)!r}, 'w').close()\nclass Own:\n    pass\n"
    (tmp_path / "tokenizer" / "code.py").write_text(code, encoding="utf-8")
    config = {"auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_question: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        Tokenizer.load(tmp_path / "tokenizer")
    assert not ran.exists()


def test_a_video_needs_neither_library_nor_a_compiler() -> None:
    """Each of them costs seconds of a start; a video from text and one from a picture go without."""
    code = (
        "import sys, numpy as np; from kinema.engines.base import Inputs; "
        "from kinema.engines.registry import create_engine; "
        "from kinema.request.options import GenerationOptions; from kinema.request.resolve import resolve; "
        "from kinema.settings import EngineSettings; "
        "engine = create_engine(EngineSettings(device='cpu')); engine.load(); "
        "few = {'size': '64x64', 'num_frames': 5, 'num_inference_steps': 2}; "
        "request = resolve(GenerationOptions(prompt='a red circle', **few), engine.capabilities).request; "
        "assert list(engine.generate(request)); "
        "assert list(engine.generate(request, Inputs(np.zeros((64, 64, 3), np.uint8)))); "
        "heavy = ('diffusers', 'transformers', 'torch._dynamo', 'torch._inductor', 'sympy', 'scipy', 'networkx'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
