"""LoRAs by name with the diffusers engine: those of the stock pipeline, each request its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Inputs, UInt8Array
from kinema.engines.diffusers.families import FAMILIES
from kinema.engines.diffusers.model_folder import Model
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.errors import ConfigError, InvalidRequest
from kinema.request.request import GenerationRequest, LoraUse
from tests.contract.diffusers.test_families import frames_of, request_for

pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "LTX-Video"
LTX = next(family for family in FAMILIES if family.name == NAME)


def make_lora(path: Path, seed: int, name: str = NAME, alpha: int | None = None) -> None:
    """A random LoRA of the attention of the row's dummy, as the library saves it: with ``alpha`` in its header."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from tests.dummies.pipelines import make

    pipeline = make(name)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(pipeline.transformer)
    layers = {key: 0.5 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}
    said = {} if alpha is None else {"transformer_lora_adapter_metadata": _adapter(pipeline.transformer, alpha)}
    type(pipeline).save_lora_weights(path.parent, transformer_lora_layers=layers, weight_name=path.name, **said)


def _adapter(network: Any, alpha: int) -> dict[str, Any]:
    """What the library keeps of an adapter."""
    return {**network.peft_config["default"].to_dict(), "lora_alpha": alpha}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    make_lora(folder / "paper.safetensors", 1)
    make_lora(folder / "clay.safetensors", 2)
    make_lora(folder / "other.safetensors", 3, "Mochi")
    make_lora(folder / "strong.safetensors", 1, alpha=7)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    from kinema.engines.diffusers.engine import DiffusersEngine
    from tests.dummies.pipelines import make

    model = Model(NAME, Path(), {"_class_name": LTX.pipelines[0]}, LTX, {}, flow_shift=1.0)
    library = LoraLibrary(folder, None)
    engine = DiffusersEngine(model, "cpu", load_pipeline=lambda *_: make(NAME), loras=library)
    engine.load()
    yield engine
    engine.close()


def asked(folder: Path, **scales: float) -> GenerationRequest:
    uses = tuple(LoraUse(name=name, digest=digest(folder, name), scale=scale) for name, scale in scales.items())
    return request_for(LTX, "text", seed=3).model_copy(update={"loras": uses})


def digest(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()


def stock(folder: Path, **scales: float) -> UInt8Array:
    """The frames of a pipeline that has these LoRAs and never had others."""
    import torch

    from kinema.engines.diffusers.call_arguments import arguments_of
    from tests.dummies.pipelines import make

    pipeline = make(NAME)
    for name in scales:
        pipeline.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
    request = request_for(LTX, "text", seed=3)
    accepted = ("prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale")
    arguments = arguments_of(LTX, request, Inputs(), (*accepted, "frame_rate"))
    made = pipeline(**arguments, generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    return (np.asarray(made) * 255).round().astype(np.uint8)


def test_videos_with_loras_are_those_of_the_stock_pipeline(engine: Any, folder: Path) -> None:
    """Bit for bit, in turn with one that has none and one that has another strength."""
    each: list[dict[str, float]] = [{}, {"paper": 1.0}, {"paper": -0.5, "clay": 0.7}, {"strong": 1.0}, {}]
    plain = frames_of(list(engine.generate(asked(folder))))
    together = zip(*(engine.generate(asked(folder, **scales)) for scales in each), strict=True)
    made = [frames_of(list(outputs)) for outputs in zip(*together, strict=True)]
    for frames, scales in zip(made, each, strict=True):
        assert np.array_equal(frames, stock(folder, **scales)), scales
    assert np.array_equal(made[0], plain)
    assert not np.array_equal(made[1], made[0])
    assert not np.array_equal(made[2], made[1])
    assert not np.array_equal(made[3], made[1])


def test_loras_are_listed_and_kept_in_memory(engine: Any, folder: Path) -> None:
    """By their names and digests; what was read before a turn is not read again."""
    infos = engine.capabilities.loras
    request = asked(folder, clay=1.0)
    read = engine.read_loras(request)
    assert {info.name for info in infos} <= {"paper", "clay", "other", "strong"}
    assert isinstance(read, dict)
    frames = frames_of(list(engine.generate(request)))
    assert set(engine.loras_in_memory) >= {request.loras[0].digest}
    assert engine.read_loras(request) == {}
    assert np.array_equal(frames, stock(folder, clay=1.0))


def test_a_lora_of_another_model_is_refused_and_leaves_no_trace(engine: Any, folder: Path) -> None:
    """In a sentence that names it; so is one whose file has changed or is gone."""
    before = frames_of(list(engine.generate(asked(folder))))
    with pytest.raises(InvalidRequest, match="the LoRA other does not fit the model"):
        list(engine.generate(asked(folder, other=1.0)))
    wrong = asked(folder, paper=1.0)
    wrong = wrong.model_copy(update={"loras": (wrong.loras[0].model_copy(update={"digest": "0" * 64}),)})
    with pytest.raises(InvalidRequest, match="paper is another file now"):
        list(engine.generate(wrong))
    assert np.array_equal(frames_of(list(engine.generate(asked(folder)))), before)


def test_a_lora_is_what_it_was_when_it_was_read(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is cut off or written over afterwards, as by ``cp``, neither ends the process nor changes a video.

    Its header counts under any spelling of its ending.
    """
    file = tmp_path / "strong.SAFETENSORS"
    make_lora(tmp_path / "strong.safetensors", 4, alpha=7)
    expected = stock(tmp_path, strong=1.0)
    (tmp_path / "strong.safetensors").rename(file)
    monkeypatch.setattr(engine._adapters, "_library", LoraLibrary(tmp_path, None))
    use = LoraUse(name="strong", digest=hashlib.sha256(file.read_bytes()).hexdigest(), scale=1.0)
    request = request_for(LTX, "text", seed=3).model_copy(update={"loras": (use,)})
    outputs = engine.generate(request, Inputs(loras=engine.read_loras(request)))
    with file.open("r+b") as written:
        written.truncate(600)
    first = next(outputs)
    file.write_bytes(b"another file")
    assert np.array_equal(frames_of([first, *outputs]), expected)


def write_tensors(folder: Path, name: str, tensors: dict[str, Any]) -> GenerationRequest:
    """A request for a LoRA of these tensors."""
    from safetensors.torch import save_file

    save_file(tensors, folder / f"{name}.safetensors")
    use = LoraUse(name=name, digest=digest(folder, name), scale=1.0)
    return request_for(LTX, "text", seed=3).model_copy(update={"loras": (use,)})


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, None),
        (
            {"self_attn.q.lora_A.weight": float("nan")},
            "has values that are not finite, in 'diffusion_model.blocks.0.self",
        ),
        (
            {"norm3.diff": 0.5},
            "changes whole weights, which this engine does not: 'diffusion_model.blocks.0.norm3.diff'",
        ),
        ({"norm3.diff": 0.0, "norm3.diff_b": 0.0}, None),
        ({"norm3.diff_b": 0.5}, "does not fit the model: 1 of its 1 biases have no place in it"),
        ({"self_attn.q.diff_b": 0.5}, None),
    ],
    ids=["a LoRA", "NaN", "a norm", "nothing", "a norm's bias", "a bias"],
)
def test_what_the_library_would_leave_out_is_a_refusal(
    extra: dict[str, float], reason: str | None, tmp_path: Path
) -> None:
    """By the name of the file: changes of norms have no place in its adapters, and it does not say so."""
    import torch

    from kinema.engines.diffusers.request_loras import Adapters
    from tests.dummies.pipelines import make

    pipeline = make("Wan")
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    shapes = {"self_attn.q.lora_A.weight": (2, width), "self_attn.q.lora_B.weight": (width, 2)}
    values = dict.fromkeys(shapes, 0.1) | extra
    request = write_tensors(
        tmp_path,
        "own",
        {
            f"diffusion_model.blocks.0.{key}": torch.full(shapes.get(key, (width,)), value)
            for key, value in values.items()
        },
    )
    adapters = Adapters(pipeline, LoraLibrary(tmp_path, None))
    if reason is None:
        with adapters.held(request, adapters.read(request.loras)):
            adapters.switch(request.loras)
        assert adapters.digests == (request.loras[0].digest,)
        return
    with (
        pytest.raises(InvalidRequest, match=rf"^the LoRA own(\.safetensors)? {re.escape(reason)}"),
        adapters.held(request, None),
    ):
        pass
    assert adapters.digests == ()


def test_a_lora_that_is_closed_in_the_middle_is_gone_from_the_next_video(engine: Any, folder: Path) -> None:
    """Whatever was switched on."""
    outputs = engine.generate(asked(folder, paper=1.0))
    next(outputs)
    outputs.close()
    assert np.array_equal(frames_of(list(engine.generate(asked(folder)))), stock(folder))


def test_an_engine_without_a_folder_takes_none(folder: Path) -> None:
    """And a pipeline that reads none is named at the start."""
    from kinema.engines.diffusers.engine import DiffusersEngine
    from tests.contract.diffusers.test_families import engine_of
    from tests.dummies.pipelines import make

    with pytest.raises(InvalidRequest, match=r"no LoRAs \(engine\.diffusers\.loras\)"):
        list(engine_of(NAME).generate(asked(folder, paper=1.0)))
    family = next(family for family in FAMILIES if family.name == "Latte")
    model = Model("Latte", Path(), {"_class_name": "LattePipeline"}, family, {}, flow_shift=1.0)
    library = LoraLibrary(folder, None)
    engine = DiffusersEngine(model, "cpu", load_pipeline=lambda *_: make("Latte"), loras=library)
    with pytest.raises(ConfigError, match="LattePipeline reads no LoRAs"):
        engine.load()


def test_a_folder_of_loras_is_a_setting_of_this_engine(folder: Path, tmp_path: Path) -> None:
    """The service has them under their names before the model is loaded; weights in 8 bits go without."""
    from kinema.engines.registry import capabilities_of, create_engine, lora_names
    from kinema.settings import DiffusersSettings, EngineSettings
    from tests.dummies.pipelines import make

    make(NAME).save_pretrained(tmp_path / "model")
    settings = EngineSettings(model=str(tmp_path / "model"), device="cpu", diffusers=DiffusersSettings(loras=folder))
    assert lora_names(settings) == ["clay", "other", "paper", "strong"]
    assert [info.digest for info in capabilities_of(settings, ["paper"]).loras] == [digest(folder, "paper")]
    assert create_engine(settings).capabilities.engine == "diffusers"
    with pytest.raises(ConfigError, match=r"engine\.diffusers\.loras: not with engine\.weights = 'fp8'"):
        create_engine(settings.model_copy(update={"weights": "fp8"}))


def test_two_names_of_one_file_add_their_strengths(engine: Any, folder: Path) -> None:
    """As in the engine wan: the file counts as strongly as both say together."""
    (folder / "same.safetensors").write_bytes((folder / "paper.safetensors").read_bytes())
    twice = frames_of(list(engine.generate(asked(folder, paper=0.25, same=0.5))))
    assert np.array_equal(twice, frames_of(list(engine.generate(asked(folder, paper=0.75)))))
    assert not np.array_equal(twice, frames_of(list(engine.generate(asked(folder, paper=0.5)))))
