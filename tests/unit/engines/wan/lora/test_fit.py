"""A LoRA that does not fit a model is refused by its header, with a sentence that names what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.engines.wan.lora.fit import check_fit, fit
from kinema.engines.wan.lora.header import LoraFacts, facts_of, open_header
from kinema.errors import InvalidRequest
from tests.unit.engines.wan.lora.files import HIDDEN, ONE, QUERY, TWO, WIDTH, Tensors, pair, write_lora

OTHER_MODEL = "diffusion_model.blocks.9.self_attn.q"
DOWN, UP = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
REFUSED: dict[str, tuple[Tensors, str]] = {
    "nothing": ({}, "x.safetensors is no LoRA: none of its tensors is a lora_A, lora_down or diff; it has no tensors"),
    "a checkpoint": (
        {f"blocks.{index}.attn1.to_q.weight": (WIDTH, WIDTH) for index in range(5)},
        "x.safetensors is no LoRA: none of its tensors is a lora_A, lora_down or diff; it has "
        "'blocks.0.attn1.to_q.weight', 'blocks.1.attn1.to_q.weight', 'blocks.2.attn1.to_q.weight' and 2 more",
    ),
    "more than a LoRA": (
        {**pair(), "dwpose_embedding.0.weight": (4,)},
        "the LoRA x.safetensors has tensors that are no part of a LoRA: 'dwpose_embedding.0.weight'",
    ),
    "another model's names": (
        {**pair("lora_unet_down_blocks_0"), **pair("lora_te_layers_0")},
        "the LoRA x.safetensors changes modules that this model does not have: "
        "'lora_unet_down_blocks_0.lora_A.weight', 'lora_unet_down_blocks_0.lora_B.weight', "
        "'lora_te_layers_0.lora_A.weight' and 1 more",
    ),
    "a module too many": (
        {**pair(), **pair("diffusion_model.blocks.0.cross_attn.k_img")},
        "the LoRA x.safetensors changes modules that this model does not have: "
        "'diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight', "
        "'diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight'",
    ),
    "changes of unknown modules alone": (
        {"diffusion_model.blocks.0.norm9.diff": (WIDTH,)},
        "the LoRA x.safetensors changes modules that this model does not have: 'diffusion_model.blocks.0.norm9.diff'",
    ),
    "matrices for a norm": (
        pair("blocks.0.attn1.norm_q"),
        "the LoRA x.safetensors changes modules that this model does not have: "
        "'blocks.0.attn1.norm_q.lora_A.weight', 'blocks.0.attn1.norm_q.lora_B.weight'",
    ),
    "another width, and more blocks": (
        {**pair(ins=12, outs=12), **pair(OTHER_MODEL, ins=12, outs=12)},
        "the LoRA x.safetensors is for another model: its blocks.0.attn1.to_q has 12 inputs and 12 outputs, "
        "this model's 8 and 8",
    ),
    "another width of a bias": (
        {**pair(), f"{QUERY}.diff_b": (12,)},
        "the LoRA x.safetensors is for another model: its bias of blocks.0.attn1.to_q has the shape [12], "
        "this model's [8]",
    ),
    "another width of a table": (
        {"diffusion_model.blocks.0.diff_m": (1, 6, 12)},
        "the LoRA x.safetensors is for another model: its weight of blocks.0.scale_shift_table has the shape "
        "[1, 6, 12], this model's [1, 6, 8]",
    ),
    "more channels of a patch": (
        {"patch_embedding.diff": (WIDTH, 9, 1, 2, 2)},
        "the LoRA x.safetensors is for another model: its weight of patch_embedding has the shape [8, 9, 1, 2, 2], "
        "this model's [8, 4, 1, 2, 2]",
    ),
    "other patches": (
        {"patch_embedding.lora_A.weight": (2, 4, 2, 1, 2), "patch_embedding.lora_B.weight": (WIDTH, 2, 1, 1, 1)},
        "the LoRA x.safetensors is for another model: its patches have the shape [2, 1, 2], this model's [1, 2, 2]",
    ),
    "one matrix of two": (
        {DOWN: (2, WIDTH)},
        f"the LoRA x.safetensors has '{DOWN}' without the other matrix of the pair",
    ),
    "alpha alone": (
        {f"{QUERY}.alpha": (), f"{QUERY}.diff": (WIDTH, WIDTH)},
        f"the LoRA x.safetensors has '{QUERY}.alpha' without the other matrix of the pair",
    ),
    "two ranks": (
        {DOWN: (2, WIDTH), UP: (WIDTH, 3)},
        f"the LoRA x.safetensors has the ranks 2 and 3 in '{DOWN}', '{UP}'; both must be the same, at least 1",
    ),
    "no rank": (
        pair(rank=0),
        f"the LoRA x.safetensors has the ranks 0 and 0 in '{DOWN}', '{UP}'; both must be the same, at least 1",
    ),
    "two adapters": (
        {**pair(), f"{QUERY}.lora_A.other.weight": (2, WIDTH)},
        f"the LoRA x.safetensors has two tensors for one place: '{DOWN}', '{QUERY}.lora_A.other.weight'",
    ),
    "two names of one module": (
        {**pair(), **pair("transformer.blocks.0.attn1.to_q")},
        f"the LoRA x.safetensors has two tensors for one place: '{DOWN}', "
        "'transformer.blocks.0.attn1.to_q.lora_A.weight'",
    ),
    "an alpha for each rank": (
        {**pair(), f"{QUERY}.alpha": (2,)},
        f"the LoRA x.safetensors has an alpha that is no single number: '{QUERY}.alpha'",
    ),
    "a convolution": (
        {DOWN: (2, WIDTH, 3, 3), UP: (WIDTH, 2, 1, 1)},
        f"the LoRA x.safetensors is a Conv LoRA: '{DOWN}' has the shape [2, 8, 3, 3]",
    ),
    "a list for a matrix": (
        {DOWN: (WIDTH,), UP: (WIDTH,)},
        f"the LoRA x.safetensors has a tensor that is no matrix: '{DOWN}' has the shape [8]",
    ),
    "DoRA": (
        {**pair(), f"{QUERY}.dora_scale": (1, WIDTH)},
        f"the LoRA x.safetensors is a DoRA ('{QUERY}.dora_scale'), which is not supported; give a plain LoRA",
    ),
    "PEFT's DoRA": (
        {**pair(), f"{QUERY}.lora_magnitude_vector.weight": (WIDTH,)},
        f"the LoRA x.safetensors is a DoRA ('{QUERY}.lora_magnitude_vector.weight'), which is not supported; "
        "give a plain LoRA",
    ),
    "LoHa": (
        {f"{QUERY}.hada_w1_a": (WIDTH, 2)},
        f"the LoRA x.safetensors is a LoHa ('{QUERY}.hada_w1_a'), which is not supported; give a plain LoRA",
    ),
    "LoKr": (
        {f"{QUERY}.lokr_w1": (2, 2)},
        f"the LoRA x.safetensors is a LoKr ('{QUERY}.lokr_w1'), which is not supported; give a plain LoRA",
    ),
    "a Tucker convolution": (
        {**pair(), f"{QUERY}.lora_mid.weight": (2, 2, 3, 3)},
        f"the LoRA x.safetensors is a Conv LoRA ('{QUERY}.lora_mid.weight'), which is not supported; give a plain LoRA",
    ),
    "a second transformer": (
        pair("transformer_2.blocks.0.attn1.to_q"),
        "the LoRA x.safetensors is for the transformer_2 of a model with two experts; this model has one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    """In one sentence, with the first keys and how many there are."""
    tensors, message = REFUSED[name]
    with pytest.raises(InvalidRequest) as refusal:
        check_fit(write_lora(tmp_path / "x.safetensors", tensors), ONE)
    assert refusal.value.message == message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64", "I8"])
def test_types_that_no_trainer_writes_are_refused(dtype: str, tmp_path: Path) -> None:
    """A file in 8 bits would need scales that LoRA files do not have; also one that only might be zero."""
    for tensors in ({DOWN: (2, WIDTH), UP: (WIDTH, 2)}, {"diffusion_model.blocks.0.norm9.diff": (WIDTH,)}):
        path = write_lora(tmp_path / "x.safetensors", tensors, dtype=dtype)
        with pytest.raises(InvalidRequest, match=f"has '{next(iter(tensors))}' in {dtype}; give F16, BF16, F32"):
            check_fit(path, ONE)


def test_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    """Some trainers write it in int64, and with one dimension."""
    check_fit(write_lora(tmp_path / "x.safetensors", pair(), others={f"{QUERY}.alpha": (1,)}), ONE)


def test_each_kind_of_change_has_its_place(tmp_path: Path) -> None:
    """Matrices, whole weights and biases of layers, norms, tables and the patches."""
    tensors: Tensors = {
        **pair(rank=3),
        f"{QUERY}.diff_b": (WIDTH,),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": (WIDTH,),
        "diffusion_model.blocks.0.norm3.diff": (WIDTH,),
        "diffusion_model.blocks.0.norm3.diff_b": (WIDTH,),
        "diffusion_model.blocks.0.diff_m": (1, 6, WIDTH),
        "diffusion_model.head.diff_m": (1, 2, WIDTH),
        "diffusion_model.patch_embedding.diff": (WIDTH, 4, 1, 2, 2),
        **pair("diffusion_model.ffn", rank=1),
    }
    tensors = {name.replace("model.ffn", "model.blocks.0.ffn.0"): shape for name, shape in tensors.items()}
    tensors = {**tensors, "diffusion_model.blocks.0.ffn.0.lora_B.weight": (HIDDEN, 1)}
    path = write_lora(tmp_path / "x.safetensors", tensors)
    header = open_header(path)
    layers = fit(path.name, header, ONE).layers["transformer"]
    assert {module: set(layer.keys) for module, layer in layers.items()} == {
        "blocks.0.attn1.to_q": {"down", "up", "bias"},
        "blocks.0.attn1.norm_q": {"weight"},
        "blocks.0.norm2": {"weight", "bias"},
        "blocks.0.scale_shift_table": {"weight"},
        "scale_shift_table": {"weight"},
        "patch_embedding": {"weight"},
        "blocks.0.ffn.net.0.proj": {"down", "up"},
    }
    assert layers["patch_embedding"].shape == (WIDTH, 16)
    assert facts_of(path.name, header) == LoraFacts("ComfyUI", 3, (), ())


def test_a_file_is_for_the_experts_that_it_names(tmp_path: Path) -> None:
    """Keys that name none are for all, or for the one that the caller names."""
    plain = write_lora(tmp_path / "plain.safetensors", pair())
    header = open_header(plain)
    both = fit("plain", header, TWO).layers
    assert list(both) == ["transformer", "transformer_2"]
    assert both["transformer"] is both["transformer_2"]
    assert list(fit("plain", header, TWO, "transformer_2").layers) == ["transformer_2"]

    module = "blocks.0.attn1.to_q"
    named = {**pair(f"transformer.{module}"), **pair(f"transformer_2.{module}", rank=4)}
    header = open_header(write_lora(tmp_path / "named.safetensors", named))
    layers = fit("named", header, TWO).layers
    assert layers["transformer"][module].keys["down"] == f"transformer.{module}.lora_A.weight"
    assert layers["transformer_2"][module].keys["down"] == f"transformer_2.{module}.lora_A.weight"
    assert facts_of("named", header).components == ("transformer", "transformer_2")
    with pytest.raises(InvalidRequest, match="the LoRA named says itself which transformer it is for"):
        fit("named", header, TWO, "transformer")


def test_two_files_are_for_an_expert_each(tmp_path: Path) -> None:
    """So a second file needs a model with two."""
    one, two = (write_lora(tmp_path / f"{name}.safetensors", pair()) for name in ("one", "two"))
    check_fit(one, TWO, second=two)
    with pytest.raises(InvalidRequest, match=r"the LoRA two.safetensors is for the transformer_2 of a model with two"):
        check_fit(one, ONE, second=two)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"transformer.lora_alpha": 8, "transformer.r": 4}, 2.0),
        ({"lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"blocks.0.attn1.to_q": 2}}, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 1, "to_k": 2}}, 0.25),
        ({"transformer_2.lora_alpha": 8}, 1.0),
    ],
)
def test_the_scale_of_pefts_settings_counts(settings: dict[str, object], scale: float, tmp_path: Path) -> None:
    """diffusers writes them into the metadata, for each transformer."""
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else {}
    path = write_lora(tmp_path / "x.safetensors", pair(rank=4), metadata)
    layers = fit(path.name, open_header(path), ONE).layers["transformer"]
    assert layers["blocks.0.attn1.to_q"].scale == scale


@pytest.mark.parametrize("text", ["[", "[]", '"', "1", '{"transformer.alpha_pattern": [1]}'])
def test_settings_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    """Metadata may hold anything."""
    path = write_lora(tmp_path / "x.safetensors", pair(rank=4), {"lora_adapter_metadata": text})
    assert fit(path.name, open_header(path), ONE).layers["transformer"]["blocks.0.attn1.to_q"].scale == 1


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """A LoRA of another strength than it was trained for would look like a bad one."""
    path = write_lora(tmp_path / "x.safetensors", pair(), {"lora_adapter_metadata": '{"lora_alpha": "8"}'})
    with pytest.raises(InvalidRequest, match="has a lora_alpha in its metadata that is no number: '8'"):
        check_fit(path, ONE)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "a red coat, , rain,rain"}, ("a red coat", "rain")),
        ({"ss_trigger_words": '["sks, dog", "cat"]'}, ("sks, dog", "cat")),
        ({"trigger_word": "[broken"}, ("[broken",)),
        ({"trigger_word": " ", "trigger_words": "w" * 500}, ("w" * 200,)),
        ({"trigger_words": ",".join(map(str, range(50)))}, tuple(map(str, range(20)))),
        ({"ss_tag_frequency": '{"a": 1}'}, ()),
    ],
)
def test_trigger_words_are_told(metadata: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    """Where a trainer says them, within bounds."""
    path = write_lora(tmp_path / "x.safetensors", pair(), metadata)
    assert facts_of(path.name, open_header(path)).trigger_words == words


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.ckpt", b"", "the LoRA x.ckpt is a pickle, which can run code; only .safetensors files are read"),
        ("x.PT", b"", "the LoRA x.PT is a pickle, which can run code; only .safetensors files are read"),
        (
            "x.safetensors",
            b"PK\x03\x04" + bytes(100),
            "the LoRA x.safetensors is a pickle under another name, which can run code; only safetensors are read",
        ),
        (
            "x.safetensors",
            b"\x80\x04\x95\x1a" + bytes(3) + b"\x01" + bytes(100),
            "the LoRA x.safetensors is a pickle under another name, which can run code; only safetensors are read",
        ),
        ("x.safetensors", b"", "the LoRA cannot be read: x.safetensors is no safetensors file, or is cut off"),
        (  # the length of its header begins as a pickle does
            "x.safetensors",
            (640).to_bytes(8, "little") + bytes(100),
            "the LoRA cannot be read: x.safetensors is no safetensors file, or is cut off",
        ),
        (
            "x.safetensors",
            (2**25).to_bytes(8, "little") + bytes(2**25),
            "the LoRA cannot be read: the header of x.safetensors has 33554432 bytes; at most 16777216 are read",
        ),
    ],
)
def test_other_files_are_refused_by_what_they_are(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    """Nothing is ever unpickled, and no header takes more memory than a real one."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest) as refusal:
        check_fit(tmp_path / name, ONE)
    assert refusal.value.message == message


def test_a_file_that_is_cut_off_or_missing_is_refused(tmp_path: Path) -> None:
    """Wherever it ends; and a folder is no file."""
    whole = write_lora(tmp_path / "x.safetensors", pair()).read_bytes()
    for size in (4, 20, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        with pytest.raises(InvalidRequest, match=r"x\.safetensors.* is cut off"):
            check_fit(tmp_path / "x.safetensors", ONE)
    with pytest.raises(InvalidRequest, match=r"the LoRA nothing\.safetensors is no file"):
        check_fit(tmp_path / "nothing.safetensors", ONE)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InvalidRequest, match=r"the LoRA folder\.safetensors is no file"):
        check_fit(tmp_path / "folder.safetensors", ONE)
