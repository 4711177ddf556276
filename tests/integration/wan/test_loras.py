"""Videos with LoRAs of a folder are those of changed weights, whoever takes turns, on one device and on two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kinema.engines.base import Inputs
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.lora.reading import LoraReader
from kinema.engines.wan.transformer.shapes import shapes
from kinema.errors import InvalidRequest
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_two_experts, save_wan21
from tests.integration.wan.ranks import assert_same_in_turns_and_resumed, take_turns
from tests.integration.wan.test_parity import MAX_DIFFERENCE, ours, run

pytestmark = pytest.mark.usefixtures("one_thread", "all_ranks_forked")

RANKS = {"style": 4, "face": 7, "slow": 2, "far": 16}


def write(path: Path, names: Mapping[str, tuple[int, ...]], seed: int, rank: int, alpha: float | None = None) -> None:
    """Matrices for every layer, as PEFT names them; with ``alpha`` as kohya's scripts do."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in names.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            continue
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.3
        tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.3
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)


def folder_of(checkpoint: Checkpoint, folder: Path) -> Path:
    """Four LoRAs; with two experts one of them is for each alone, and one has a file for each."""
    folder.mkdir()
    names = shapes(checkpoint.transformer)
    for seed, (name, rank) in enumerate(RANKS.items()):
        write(folder / f"{name}.safetensors", names, seed, rank, alpha=2.0 if name == "face" else None)
    if len(checkpoint.transformers) > 1:
        (folder / "slow.json").write_text('{"expert": "low_noise"}')
        (folder / "far.json").write_text('{"second": "far-2.safetensors"}')
        write(folder / "far-2.safetensors", names, 9, 3)
    return folder


@pytest.fixture(scope="module", params=[save_wan21, save_two_experts], ids=["one", "two experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    save: Callable[[Path], Path] = request.param
    return inspect(str(save(tmp_path_factory.mktemp("checkpoint") / "model")))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(checkpoint, tmp_path_factory.mktemp("loras") / "folder")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, folder: Path) -> WanEngine:
    made = WanEngine(checkpoint, device="cpu", dtype="float32", loras=folder)
    made.load()
    return made


def asked(engine: WanEngine, *loras: tuple[Any, ...], **values: object) -> GenerationRequest:
    """A request with these LoRAs: name, scale, and scale of the second expert."""
    assert engine.loras is not None
    can = engine.capabilities.model_copy(update={"loras": engine.loras.described([name for name, *_ in loras])})
    named = [dict(zip(("name", "scale", "scale_2"), lora, strict=False)) for lora in loras]
    given = {"prompt": "a red circle moving right", "num_frames": 5, "size": "64x64", "seed": 3, **values}
    options = GenerationOptions.model_validate({"num_inference_steps": 3, "loras": named, **given})
    return resolve(options, can).request


def changed(checkpoint: Checkpoint, request: GenerationRequest, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What the LoRAs of a request add to the weights of each transformer."""
    names = {name: shapes(config) for name, config in checkpoint.transformers.items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    engine = WanEngine(checkpoint, device="cpu", loras=folder)
    assert engine.loras is not None
    for name, refs in engine.loras.refs(request.loras).items():
        for ref in refs:
            for module, delta in LoraReader(names).deltas(ref, name).items():
                assert delta.down is not None
                assert delta.up is not None
                added = found[name].setdefault(f"{module}.weight", torch.zeros(()))
                found[name][f"{module}.weight"] = added + ref.strength * (delta.up.float() @ delta.down.float())
    return found


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_video_is_that_of_changed_weights(
    checkpoint: Checkpoint, engine: WanEngine, folder: Path, count: int, guidance: float
) -> None:
    """In diffusers' pipeline, whose transformers got the sums."""
    from diffusers import WanPipeline

    loras = [("style", 0.8), ("face", -0.5), ("slow", 0.6), ("far", 0.3)][:count]
    if len(checkpoint.transformers) > 1:
        loras = [(name, scale, scale / 2) for name, scale in loras]
    request = asked(engine, *loras, guidance_scale=guidance, size="96x64" if count == 2 else "64x64")
    pipeline = WanPipeline.from_pretrained(str(checkpoint.path), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for name, changes in changed(checkpoint, request, folder).items():
        for weight, change in changes.items():
            getattr(pipeline, name).get_parameter(weight).data += change
    theirs = run(pipeline, request)
    made = ours(engine, request)
    assert np.abs(made - theirs).max() < MAX_DIFFERENCE
    assert np.abs(made - ours(engine, request.model_copy(update={"loras": ()}))).max() > 10 * MAX_DIFFERENCE


def test_each_video_is_what_it_is_alone(engine: WanEngine) -> None:
    plain = asked(engine)
    before = take_turns([engine.sample(plain)])[0]
    requests = [
        asked(engine, ("style", 0.8)),
        plain,
        asked(engine, ("style", 0.4)),
        asked(engine, ("face",), ("slow",), guidance_scale=1.0),
        asked(engine, ("far",), seed=4),
    ]
    assert_same_in_turns_and_resumed(engine, requests)
    assert torch.equal(take_turns([engine.sample(plain)])[0], before)


def test_a_checkpoint_of_another_strength_is_not_used(engine: WanEngine) -> None:
    request, other = asked(engine, ("style", 0.8)), asked(engine, ("style", 0.7))
    step = next(engine.sample(request))
    assert step.checkpoint is not None
    steps = engine.sample(other, resume=step.checkpoint())
    assert next(steps).index == 1
    steps.close()


@pytest.fixture(scope="module", params=["cfg", "ulysses", "shard"])
def double(request: pytest.FixtureRequest, checkpoint: Checkpoint, folder: Path) -> Iterator[WanEngine]:
    made = WanEngine(checkpoint, device="cpu", dtype="float32", gpus=2, parallel=request.param, loras=folder)
    made.load()
    yield made
    made.close()


def test_two_processes_make_what_one_makes(double: WanEngine, engine: WanEngine) -> None:
    requests = [asked(engine, ("style", 0.8), ("far",)), asked(engine), asked(engine, ("face",), guidance_scale=1.0)]
    together = take_turns([double.sample(request) for request in requests])
    for request, made in zip(requests, together, strict=True):
        assert torch.allclose(made, take_turns([engine.sample(request)])[0], rtol=0, atol=1e-4)


def test_blocks_in_the_host_memory_take_loras(checkpoint: Checkpoint, engine: WanEngine, folder: Path) -> None:
    offloaded = WanEngine(checkpoint, device="cpu", dtype="float32", offload="blocks", loras=folder)
    offloaded.load()
    request = asked(engine, ("style", 0.8), ("face",))
    assert torch.equal(take_turns([offloaded.sample(request)])[0], take_turns([engine.sample(request)])[0])


def test_a_lora_that_is_another_file_now_is_refused(checkpoint: Checkpoint, engine: WanEngine, tmp_path: Path) -> None:
    folder = folder_of(checkpoint, tmp_path / "own")
    own = WanEngine(checkpoint, device="cpu", dtype="float32", loras=folder)
    own.load()
    request = asked(own, ("style",))
    write(folder / "style.safetensors", shapes(checkpoint.transformer), 8, 4)
    with pytest.raises(InvalidRequest, match="another file"):
        next(own.sample(request))
    (folder / "style.safetensors").unlink()
    with pytest.raises(InvalidRequest, match="no LoRA 'style'"):
        next(own.sample(request))
    bare = WanEngine(checkpoint, device="cpu", dtype="float32")
    bare.load()
    with pytest.raises(InvalidRequest, match=r"engine\.wan\.loras"):
        next(bare.sample(request))


def read_and_remove(engine: WanEngine, other: WanEngine, checkpoint: Checkpoint, folder: Path) -> tuple[Tensor, Tensor]:
    """What ``engine`` makes with a LoRA that it has read and that is gone since, and what ``other`` made before."""
    path = folder / "fresh.safetensors"
    write(path, shapes(checkpoint.transformer), 5, 6)
    request = asked(engine, ("fresh", 0.9))
    expected = take_turns([other.sample(request)])[0]
    loras = engine.read_loras(request)
    path.unlink()
    return take_turns([engine.sample(request, Inputs(loras=loras))])[0], expected


def test_a_video_needs_no_disk_when_its_loras_are_read(checkpoint: Checkpoint, engine: WanEngine, folder: Path) -> None:
    own = WanEngine(checkpoint, device="cpu", dtype="float32", loras=folder)
    own.load()
    assert torch.equal(*read_and_remove(own, engine, checkpoint, folder))
    assert own.read_loras(asked(own)) is None


def test_other_ranks_need_no_disk_either(
    double: WanEngine, checkpoint: Checkpoint, engine: WanEngine, folder: Path
) -> None:
    made, expected = read_and_remove(double, engine, checkpoint, folder)
    assert torch.allclose(made, expected, rtol=0, atol=1e-4)


def test_a_rank_that_cannot_read_says_why(double: WanEngine, checkpoint: Checkpoint, folder: Path) -> None:
    """And goes on with other videos."""
    assert double.leader is not None
    ref = LoraRef(folder / "missing.safetensors", "0" * 64, 1.0)
    with pytest.raises(InvalidRequest, match="no file"), double.leader.reading([ref]):
        pass
    assert len(take_turns([double.sample(asked(double, ("style", 0.5)))])) == 1
