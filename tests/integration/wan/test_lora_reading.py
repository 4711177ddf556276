"""A LoRA file in the format of each trainer gives the changes that were put into it, and those that diffusers reads."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.engines.wan.lora import reading
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.lora.fit import Shapes
from kinema.engines.wan.lora.header import open_header
from kinema.engines.wan.lora.reading import Delta, Lora, LoraReader, read_lora
from kinema.engines.wan.safetensors_header import Header
from kinema.engines.wan.tensors import write_tensors
from kinema.engines.wan.transformer.shapes import shapes as shapes_of
from kinema.errors import InvalidRequest

WIDTH = 12
# Long enough for a loaded machine; a test that waits this long has failed.
PATIENCE_S = 20.0
# diffusers' names of what has weights, and those of Wan's original code (Wan2.1: wan/modules/model.py).
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_BLOCK_LINEARS = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_BLOCK_NORMS = {
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
}
BLOCKS = {
    f"blocks.{index}.{ours}": f"blocks.{index}.{theirs}"
    for index in range(2)
    for ours, theirs in _BLOCK_LINEARS.items()
}
LINEARS = {
    **BLOCKS,
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
NORMS = {
    **{
        f"blocks.{index}.{ours}": f"blocks.{index}.{theirs}"
        for index in range(2)
        for ours, theirs in _BLOCK_NORMS.items()
    },
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}
TABLES = {"scale_shift_table": "head", **{f"blocks.{index}.scale_shift_table": f"blocks.{index}" for index in range(2)}}


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """Those of diffusers' image-to-video transformer, in small."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=6,
        out_channels=4,
        text_dim=10,
        freq_dim=8,
        ffn_dim=20,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=14,
        added_kv_proj_dim=WIDTH,
    )
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


Pairs = Mapping[str, tuple[Tensor, Tensor, float]]


def pairs_for(shapes: Shapes, modules: Mapping[str, str], dtype: torch.dtype = torch.float32) -> Pairs:
    """Random matrices of several ranks, and an alpha for each, which is not the rank."""
    torch.manual_seed(3)
    found = {}
    for index, module in enumerate(modules):
        outs, ins = shapes[f"{module}.weight"]
        rank = 1 + index % 3
        found[module] = (torch.randn(rank, ins).to(dtype), torch.randn(outs, rank).to(dtype), 0.7 * rank + index)
    return found


def read(tmp_path: Path, tensors: Mapping[str, Tensor], shapes: Shapes, **metadata: str) -> Lora:
    path = tmp_path / "lora.safetensors"
    write_tensors(path, tensors, metadata)
    return read_lora(path, {"transformer": shapes})


def change_of(delta: Delta) -> Tensor:
    return delta.up.double() @ delta.down.double()


def dotted(
    prefix: str, down: str, up: str, names: Mapping[str, str], *, has_alpha: bool
) -> Callable[[Pairs], dict[str, Tensor]]:
    """Keys with dots, under diffusers' names or the original ones."""

    def write(pairs: Pairs) -> dict[str, Tensor]:
        found = {}
        for module, (a, b, alpha) in pairs.items():
            name = f"{prefix}{names[module]}"
            found |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
            if has_alpha:
                found[f"{name}.alpha"] = torch.tensor(alpha)
        return found

    return write


def underscored(prefix: str, names: Mapping[str, str]) -> Callable[[Pairs], dict[str, Tensor]]:
    """As kohya's scripts do, and musubi-tuner."""
    return dotted(
        prefix, "lora_down", "lora_up", {ours: names[ours].replace(".", "_") for ours in names}, has_alpha=True
    )


SAME = {name: name for name in LINEARS}
# LyCORIS in AI Toolkit: original names of the attentions, diffusers' names in them.
MIXED = {name: name.replace("attn1", "self_attn").replace("attn2", "cross_attn") for name in LINEARS}
FORMATS: dict[str, tuple[str, bool, Callable[[Pairs], dict[str, Tensor]]]] = {
    "diffusers": ("diffusers", False, dotted("transformer.", "lora_A", "lora_B", SAME, has_alpha=False)),
    "diffusers, with alpha": ("diffusers", True, dotted("transformer.", "lora_A", "lora_B", SAME, has_alpha=True)),
    "an adapter alone": ("no prefix", False, dotted("", "lora_A", "lora_B", SAME, has_alpha=False)),
    "PEFT": ("PEFT", False, dotted("base_model.model.", "lora_A.default", "lora_B.default", SAME, has_alpha=False)),
    "PEFT, original names": ("PEFT", False, dotted("base_model.model.", "lora_A", "lora_B", LINEARS, has_alpha=False)),
    "ComfyUI": ("ComfyUI", False, dotted("diffusion_model.", "lora_A", "lora_B", LINEARS, has_alpha=False)),
    "ComfyUI, with alpha": ("ComfyUI", True, dotted("diffusion_model.", "lora_A", "lora_B", LINEARS, has_alpha=True)),
    "ComfyUI, as in a checkpoint": (
        "ComfyUI",
        False,
        dotted("model.diffusion_model.", "lora_A", "lora_B", LINEARS, has_alpha=False),
    ),
    "LightX2V": ("ComfyUI", False, dotted("diffusion_model.", "lora_down", "lora_up", LINEARS, has_alpha=False)),
    "DiffSynth": ("no prefix", False, dotted("", "lora_A.default", "lora_B.default", LINEARS, has_alpha=False)),
    "DiffSynth, of the pipeline": (
        "DiffSynth",
        False,
        dotted("pipe.dit.", "lora_A.default", "lora_B.default", LINEARS, has_alpha=False),
    ),
    "kohya": ("kohya", True, underscored("lora_unet_", LINEARS)),
    "VideoX-Fun": ("kohya", True, underscored("lora_unet__", LINEARS)),
    "LyCORIS": ("LyCORIS", True, underscored("lycoris_", MIXED)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_changes_that_it_was_made_of(name: str, shapes: Shapes, tmp_path: Path) -> None:
    """For every layer, whatever its rank and alpha; without an alpha the scale is 1."""
    format_, has_alpha, write = FORMATS[name]
    pairs = pairs_for(shapes, LINEARS)
    lora = read(tmp_path, write(pairs), shapes)
    assert (lora.facts.format, lora.facts.rank) == (format_, 3)
    deltas = lora.deltas["transformer"]
    assert set(deltas) == set(LINEARS)
    for module, (a, b, alpha) in pairs.items():
        scale = alpha / a.shape[0] if has_alpha else 1.0
        torch.testing.assert_close(change_of(deltas[module]), scale * (b.double() @ a.double()), rtol=1e-6, atol=1e-6)
        assert (deltas[module].weight, deltas[module].bias) == (None, None)


def by_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The change of the weight and of the bias for each module, as diffusers reads a file."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    state = WanLoraLoaderMixin.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    found = {}
    for module in {name.partition(".lora_")[0] for name in state}:
        down, up = state.get(f"{module}.lora_A.weight"), state.get(f"{module}.lora_B.weight")
        weight = None if down is None or up is None else up.double() @ down.double()
        found[module] = (weight, state.get(f"{module}.lora_B.bias"))
    return found


def biases(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.randn(shapes[f"{ours}.bias"]) for ours, name in LINEARS.items()}


@pytest.mark.parametrize("name", ["ComfyUI", "ComfyUI, with alpha", "kohya", "LightX2V", "diffusers", "head.diff"])
def test_diffusers_reads_the_same(name: str, shapes: Shapes, tmp_path: Path) -> None:
    """Where it reads the file: it takes alpha for the blocks alone, and a changed head if its bias changes too."""
    format_ = "ComfyUI" if name == "head.diff" else name
    pairs = pairs_for(shapes, BLOCKS if FORMATS[format_][1] else LINEARS)
    if name == "head.diff":
        pairs = {module: pair for module, pair in pairs.items() if module != "proj_out"}
    tensors = FORMATS[format_][2](pairs)
    if name in ("LightX2V", "head.diff"):
        tensors |= {f"diffusion_model.{module}.diff_b": bias for module, bias in biases(shapes).items()}
    if name == "head.diff":
        tensors["diffusion_model.head.head.diff"] = torch.randn(shapes["proj_out.weight"])
    deltas = read(tmp_path, tensors, shapes).deltas["transformer"]
    theirs = by_diffusers(tensors)
    assert set(deltas) == set(theirs)
    for module, (weight, bias) in theirs.items():
        delta = deltas[module]
        ours = change_of(delta) if delta.weight is None else delta.weight.double()
        torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-6)
        assert (delta.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(delta.bias, bias)


def test_whole_weights_biases_norms_and_modulation_are_read(shapes: Shapes, tmp_path: Path) -> None:
    """All that LightX2V's extractor writes, down to the patches: a file of it may change every weight."""
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for ours, theirs in {**LINEARS, **NORMS, "patch_embedding": "patch_embedding"}.items():
        tensors[f"diffusion_model.{theirs}.diff"] = torch.randn(shapes[f"{ours}.weight"])
        if f"{ours}.bias" in shapes:
            tensors[f"diffusion_model.{theirs}.diff_b"] = torch.randn(shapes[f"{ours}.bias"])
    for ours, theirs in TABLES.items():
        tensors[f"diffusion_model.{theirs}.diff_m"] = torch.randn(shapes[ours])
    deltas = read(tmp_path, tensors, shapes).deltas["transformer"]
    changed = {}
    for module, delta in deltas.items():
        changed[module if module in shapes else f"{module}.weight"] = delta.weight
        if delta.bias is not None:
            changed[f"{module}.bias"] = delta.bias
    assert set(changed) == set(shapes)
    assert deltas["patch_embedding"].weight.shape == (WIDTH, 24)
    changed["patch_embedding.weight"] = changed["patch_embedding.weight"].reshape(shapes["patch_embedding.weight"])
    values = {**LINEARS, **NORMS, "patch_embedding": "patch_embedding"}
    expected = {f"{ours}.weight": tensors[f"diffusion_model.{theirs}.diff"] for ours, theirs in values.items()}
    expected |= {
        f"{ours}.bias": tensors[f"diffusion_model.{theirs}.diff_b"]
        for ours, theirs in values.items()
        if f"{ours}.bias" in shapes
    }
    expected |= {ours: tensors[f"diffusion_model.{theirs}.diff_m"] for ours, theirs in TABLES.items()}
    assert all(torch.equal(changed[name], expected[name]) for name in shapes)


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_pair_for_the_patches_is_one_of_matrices(is_flat: bool, shapes: Shapes, tmp_path: Path) -> None:
    """The convolution that reads patches sees each value once, so its pair has the same product as two matrices."""
    kernel = torch.randn(2, *shapes["patch_embedding.weight"][1:])
    up = torch.randn(WIDTH, 2, 1, 1, 1)
    pair = (kernel.flatten(1), up.flatten(1)) if is_flat else (kernel, up)
    tensors = dict(zip(("patch_embedding.lora_A.weight", "patch_embedding.lora_B.weight"), pair, strict=True))
    delta = read(tmp_path, tensors, shapes).deltas["transformer"]["patch_embedding"]
    latents = torch.randn(1, 6, 1, 2, 2)
    expected = torch.nn.functional.conv3d(torch.nn.functional.conv3d(latents, kernel), up).flatten()
    torch.testing.assert_close(change_of(delta) @ latents.flatten().double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_costs_no_accuracy(dtype: torch.dtype, shapes: Shapes, tmp_path: Path) -> None:
    """Tensors keep the type of the file; what is multiplied by a scale is float32, which no 16 bits could hold."""
    pairs = pairs_for(shapes, BLOCKS, dtype)
    plain = read(tmp_path, FORMATS["ComfyUI"][2](pairs), shapes).deltas["transformer"]
    scaled = read(tmp_path, FORMATS["ComfyUI, with alpha"][2](pairs), shapes).deltas["transformer"]
    for module, (a, b, alpha) in pairs.items():
        for deltas in (plain, scaled):
            assert torch.equal(deltas[module].down, a)
            assert deltas[module].down.dtype == dtype
        assert torch.equal(plain[module].up, b)
        # The scale is a float32 in the file.
        scale = torch.tensor(alpha).item() / a.shape[0]
        assert torch.equal(scaled[module].up, b.float() * scale)


def test_the_bias_of_a_pair_is_scaled_with_it(shapes: Shapes, tmp_path: Path) -> None:
    """PEFT adds it to the product before the scale; a ``diff_b`` counts as it is."""
    name = "diffusion_model.blocks.0.self_attn.q"
    a, b, bias, more = torch.randn(2, WIDTH), torch.randn(WIDTH, 2), torch.randn(WIDTH), torch.randn(WIDTH)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": bias}
    tensors[f"{name}.alpha"] = torch.tensor(1)
    delta = read(tmp_path, tensors, shapes).deltas["transformer"]["blocks.0.attn1.to_q"]
    assert torch.equal(delta.bias, bias / 2)
    delta = read(tmp_path, {**tensors, f"{name}.diff_b": more}, shapes).deltas["transformer"]["blocks.0.attn1.to_q"]
    assert torch.equal(delta.bias, more + bias / 2)


def test_the_settings_in_the_metadata_give_the_scale(shapes: Shapes, tmp_path: Path) -> None:
    """Unless a tensor says another alpha."""
    pairs = pairs_for(shapes, BLOCKS)
    tensors = FORMATS["diffusers"][2](pairs)
    tensors["transformer.blocks.0.attn1.to_q.alpha"] = torch.tensor(5.0)
    settings = json.dumps({"transformer.lora_alpha": 6, "transformer.r": 2})
    deltas = read(tmp_path, tensors, shapes, lora_adapter_metadata=settings).deltas["transformer"]
    for module, (a, b, _) in pairs.items():
        scale = (5 if module == "blocks.0.attn1.to_q" else 6) / a.shape[0]
        torch.testing.assert_close(change_of(deltas[module]), scale * (b.double() @ a.double()), rtol=1e-6, atol=1e-6)


def test_experts_get_what_the_keys_say(shapes: Shapes, tmp_path: Path) -> None:
    """One file for both alike, one with keys for each, or two files."""
    pairs = pairs_for(shapes, BLOCKS)
    two = {"transformer": shapes, "transformer_2": shapes}
    high, low = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    write_tensors(high, FORMATS["ComfyUI"][2](pairs), {})
    others = {module: (2 * a, b, alpha) for module, (a, b, alpha) in pairs.items()}
    write_tensors(low, FORMATS["kohya"][2](others), {})

    alike = read_lora(high, two)
    assert alike.deltas["transformer"] is alike.deltas["transformer_2"]
    assert alike.digest == hashlib.sha256(high.read_bytes()).hexdigest()
    assert alike.size_bytes == high.stat().st_size
    assert list(read_lora(high, two, only="transformer_2").deltas) == ["transformer_2"]

    each = read_lora(high, two, second=low)
    assert each.size_bytes == high.stat().st_size + low.stat().st_size
    assert len({each.digest, alike.digest, read_lora(low, two).digest}) == 3

    prefixes = {"transformer": "transformer.", "transformer_2": "transformer_2."}
    tensors = dotted(prefixes["transformer"], "lora_A", "lora_B", SAME, has_alpha=False)(pairs)
    tensors |= dotted(prefixes["transformer_2"], "lora_A", "lora_B", SAME, has_alpha=True)(others)
    write_tensors(tmp_path / "both.safetensors", tensors, {})
    both = read_lora(tmp_path / "both.safetensors", two)
    for component in two:
        for module in pairs:
            ours, theirs = (change_of(lora.deltas[component][module]) for lora in (each, both))
            assert torch.equal(ours, theirs)
    assert not torch.equal(
        change_of(both.deltas["transformer"]["blocks.0.attn1.to_q"]),
        change_of(both.deltas["transformer_2"]["blocks.0.attn1.to_q"]),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, shapes: Shapes, tmp_path: Path
) -> None:
    """One of them would make every pixel one."""
    tensors = FORMATS["ComfyUI"][2](pairs_for(shapes, BLOCKS, dtype))
    tensors["diffusion_model.blocks.1.ffn.2.lora_B.weight"][3, 0] = value
    with pytest.raises(InvalidRequest) as refusal:
        read(tmp_path, tensors, shapes)
    assert refusal.value.message == (
        "the LoRA lora.safetensors has values that are not finite, in 'diffusion_model.blocks.1.ffn.2.lora_B.weight': "
        "it is damaged"
    )


def test_a_scale_that_leaves_float32_is_refused(shapes: Shapes, tmp_path: Path) -> None:
    """Though each tensor of it is finite."""
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, WIDTH), f"{name}.lora_B.weight": torch.full((WIDTH, 1), 1e10)}
    with pytest.raises(InvalidRequest, match=r"has a scale that is too large: 1e\+30 for"):
        read(tmp_path, {**tensors, f"{name}.alpha": torch.tensor(1e30)}, shapes)


def test_changes_that_are_zero_are_none(shapes: Shapes, tmp_path: Path) -> None:
    """Also of norms that this model does not have; others of these are refused."""
    name = "diffusion_model.blocks.0"
    tensors = FORMATS["ComfyUI"][2](pairs_for(shapes, {"blocks.0.attn1.to_q": ""}))
    tensors |= {
        f"{name}.norm3.diff": torch.zeros(WIDTH),
        f"{name}.self_attn.q.diff_b": torch.zeros(WIDTH),
        f"{name}.norm9.diff": torch.zeros(5),
    }
    deltas = read(tmp_path, tensors, shapes).deltas["transformer"]
    assert set(deltas) == {"blocks.0.attn1.to_q"}
    assert deltas["blocks.0.attn1.to_q"].bias is None
    tensors[f"{name}.norm9.diff"][4] = 1e-9
    with pytest.raises(InvalidRequest, match=f"changes modules that this model does not have: '{name}.norm9.diff'"):
        read(tmp_path, tensors, shapes)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Path], Any]]:
    """What happens to the file after its header was read."""
    actions: list[Callable[[Path], Any]] = []

    def swapping(path: Path) -> Header:
        header = open_header(path)
        for action in actions:
            action(path)
        return header

    monkeypatch.setattr(reading, "open_header", swapping)
    return actions


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: write_tensors(path, {"a": torch.zeros(3)}, {}),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_file_that_changes_meanwhile_is_refused(
    change: Callable[[Path], Any], swapped: list[Callable[[Path], Any]], shapes: Shapes, tmp_path: Path
) -> None:
    """Its tensors would be read from the wrong places."""
    swapped.append(change)
    with pytest.raises(InvalidRequest, match=r"the LoRA lora\.safetensors was changed while it was read"):
        read(tmp_path, FORMATS["ComfyUI"][2](pairs_for(shapes, BLOCKS)), shapes)


def test_a_lora_is_read_for_the_weights_that_the_engine_names(tmp_path: Path) -> None:
    """The bundled model's, by the config of its transformer."""
    checkpoint = inspect(str(BUNDLED["tiny-wan"]))
    transformers = {name: shapes_of(config) for name, config in checkpoint.transformers.items()}
    module = "blocks.0.attn1.to_q"
    outs, ins = transformers["transformer"][f"{module}.weight"]
    tensors = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.randn(4, ins)}
    tensors["lora_unet_blocks_0_self_attn_q.lora_up.weight"] = torch.randn(outs, 4)
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    deltas = read_lora(tmp_path / "x.safetensors", transformers).deltas
    assert {name: list(modules) for name, modules in deltas.items()} == {"transformer": [module]}


@pytest.fixture
def files(shapes: Shapes, tmp_path: Path) -> list[LoraRef]:
    """Three LoRAs."""
    refs = []
    for number in range(3):
        path = tmp_path / f"lora-{number}.safetensors"
        named = dotted("diffusion_model.", "lora_A", "lora_B", BLOCKS, has_alpha=True)
        write_tensors(path, named(pairs_for(shapes, BLOCKS)), {"number": str(number)})
        refs.append(LoraRef(path, hashlib.sha256(path.read_bytes()).hexdigest(), 1.0))
    return refs


class Disk:
    """Counts the readings of files, and holds each until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go = threading.Semaphore(0)
        self.has_begun = threading.Semaphore(0)
        self.names: list[str] = []
        read = reading.read_lora

        def hold(path: Path, *arguments: Any, **options: Any) -> Lora:
            self.names.append(path.name)
            self.has_begun.release()
            assert self.may_go.acquire(timeout=PATIENCE_S)
            return read(path, *arguments, **options)

        monkeypatch.setattr(reading, "read_lora", hold)

    def let_go(self, count: int = 1) -> None:
        self.may_go.release(count)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_lora_is_read_once_for_all_who_wait_for_it(files: list[LoraRef], shapes: Shapes, disk: Disk) -> None:
    """Another one is read meanwhile, and may be there first."""
    reader = LoraReader({"transformer": shapes})
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(reader.read, files[0])]
        assert disk.has_begun.acquire(timeout=PATIENCE_S)
        waiting += [threads.submit(reader.read, files[0]) for _ in range(2)]
        other = threads.submit(reader.read, files[1])
        assert disk.has_begun.acquire(timeout=PATIENCE_S)
        disk.let_go(2)
        first = waiting[0].result(PATIENCE_S)
        assert all(one.result(PATIENCE_S) is first for one in waiting)
        assert other.result(PATIENCE_S) is not first
    assert disk.names == ["lora-0.safetensors", "lora-1.safetensors"]


def test_who_waits_for_a_reading_that_fails_fails_with_it(files: list[LoraRef], shapes: Shapes, disk: Disk) -> None:
    """And the next one reads again."""
    reader, path = LoraReader({"transformer": shapes}), files[0].path
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(reader.read, files[0])]
        assert disk.has_begun.acquire(timeout=PATIENCE_S)
        waiting.append(threads.submit(reader.read, files[0]))
        disk.let_go(2)
        for one in waiting:
            with pytest.raises(InvalidRequest):
                one.result(PATIENCE_S)
    path.write_bytes(data)
    disk.let_go()
    assert reader.read(files[0]).digest == files[0].digest


def test_what_is_held_is_not_read_again(files: list[LoraRef], shapes: Shapes, disk: Disk) -> None:
    """However little may be kept; the last one is, also when nobody holds it."""
    reader = LoraReader({"transformer": shapes}, max_bytes=1)
    disk.let_go(9)
    held = reader.read(files[0])
    for file in (files[1], files[2], files[2]):
        reader.read(file)
    assert reader.read(files[0]) is held
    assert reader.deltas(files[0], "transformer") == held.deltas["transformer"]
    reader.read(files[1])
    assert [name[5] for name in disk.names] == ["0", "1", "2", "1"]
