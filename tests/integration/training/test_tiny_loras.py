"""The LoRAs of the tiny model: what training writes is what Kinema reads, and the shipped one does what it says.

What trains is imported by the tests that need it: it takes seconds, and every process of a run reads this file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kinema.engines.base import Engine, Frames
from kinema.engines.registry import capabilities_of, create_engine
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.lora.reading import Lora, read_lora
from kinema.engines.wan.transformer.shapes import shapes
from kinema.media.planes import to_rgb
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from training.tiny.detector import Sighting, look

SMALL = ["--device", "cpu", "--largest", "64", "--tokens", "128", "--seconds", "0.001"]


def read(path: Path) -> Lora:
    """As the engine reads it for the bundled model."""
    return read_lora(path, {name: shapes(config) for name, config in inspect("tiny-wan").transformers.items()})


def test_the_file_has_what_was_trained(tmp_path: Path) -> None:
    """The forward of the training, the merged weights, and the engine's reading agree up to float16."""
    from training.tiny.fast import FastTransformer, embed_text
    from training.tiny.lora import Adapter, merge
    from training.tiny.networks import make_transformer

    torch.manual_seed(0)
    model = make_transformer().requires_grad_(False)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    adapter = Adapter(model, rank=3)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.1)
    adapter.save(tmp_path / "one.safetensors")
    latents, times, is_given = torch.randn(2, 16, 1, 4, 4), torch.tensor([700.0, 200.0]), torch.zeros(2, dtype=bool)
    with torch.no_grad():
        text = embed_text(model, torch.randn(2, 47, 128), torch.tensor([5, 9]))
        plain = FastTransformer(model)(latents, times, is_given, text)
        trained = FastTransformer(model)(latents, times, is_given, text, adapter.weights())
        merge(model, tmp_path / "one.safetensors")
        merged = FastTransformer(model)(latents, times, is_given, text)
    assert (trained - plain).abs().mean() > 0.05
    torch.testing.assert_close(merged, trained, atol=2e-3, rtol=2e-3)
    deltas = read(tmp_path / "one.safetensors").deltas["transformer"]
    assert len(deltas) == 60
    places = {(i, name): n for n, (i, name) in enumerate(adapter.places[0])}
    delta, n = deltas["blocks.5.attn2.to_v"], places[5, "attn2.to_v"]
    assert delta.up is not None
    assert delta.down is not None
    torch.testing.assert_close(
        delta.up.float() @ delta.down.float(), (adapter.up[0] @ adapter.down[0])[n].detach(), atol=1e-3, rtol=1e-2
    )


def test_a_smaller_file_changes_the_weights_nearly_as_much(tmp_path: Path) -> None:
    """What is left out of ranks that are each half of the one before is small; a layer keeps at least one."""
    from training.tiny.lora import Adapter, cut, write
    from training.tiny.networks import make_transformer

    torch.manual_seed(0)
    adapter, path = Adapter(make_transformer(), rank=8), tmp_path / "one.safetensors"
    halves = 0.5 ** torch.arange(8)
    for up, down in zip(adapter.up, adapter.down, strict=True):
        up.data = torch.nn.init.orthogonal_(torch.empty_like(up[0])) * halves + torch.zeros_like(up)
        down.data = torch.nn.init.orthogonal_(torch.empty_like(down[0])) + torch.zeros_like(down)
    adapter.save(path)
    write(path, {key: tensor for key, tensor in load_file(path).items() if "blocks.0." in key})
    before, whole = read(path).deltas["transformer"], path.stat().st_size
    cut(path, int(0.65 * whole))
    after = read(path).deltas["transformer"]
    assert path.stat().st_size < 0.7 * whole
    for name, delta in after.items():
        has, had = delta.up.float() @ delta.down.float(), before[name].up.float() @ before[name].down.float()
        assert (has - had).norm() < 0.1 * had.norm()
    cut(path, 0)
    assert {len(delta.down) for delta in read(path).deltas["transformer"].values()} == {1}


def test_distillation_goes_on_from_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step from the teacher's latents, and after a break one of whole clips; both change the file."""
    from training.tiny import distill

    monkeypatch.setattr(distill, "TEACHER_STEPS", 4)
    options = [*SMALL, "--out", str(tmp_path), "--rank", "2", "--measure", "0", "--critic-warm-up", "0"]
    options += ["--teacher-seconds", "0", "--teacher-tokens", "128", "--whole-tokens", "128"]
    distill.main([*options, "--single-share", "1"])
    first = read(tmp_path / "draft.safetensors")
    distill.main([*options, "--single-share", "0", "--resume"])
    second = read(tmp_path / "draft.safetensors")
    changed = [lora.deltas["transformer"]["blocks.0.ffn.net.2"].up for lora in (first, second)]
    assert changed[0] is not None
    assert changed[0].abs().sum() > 0
    assert not torch.equal(*changed)
    assert torch.load(tmp_path / "draft.pt", weights_only=False)["steps"] == 2


def test_distillation_needs_a_teacher_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise for weights it ends at once, and says why."""
    from training.tiny import distill

    folder = tmp_path / "noise"
    shutil.copytree(inspect("tiny-wan").path, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn_like(tensor) * 0.02 for name, tensor in load_file(weights).items()}, weights)
    monkeypatch.setattr(distill, "MEASURED_FRAMES", 1)
    options = [*SMALL, "--start-from", str(folder), "--out", str(tmp_path), "--measure", "2"]
    with pytest.raises(SystemExit, match="the teacher computes wrongly here, in float32 too"):
        distill.main(options)


def test_a_style_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    """Two short runs."""
    from training.tiny import style

    options = [*SMALL, "--out", str(tmp_path), "--rank", "2", "--fresh-tokens", "128", "--prefill", "1"]
    steps = []
    for seconds, more in ((0.5, []), (0.6, ["--resume"])):
        style.main([*options, "--seconds", str(seconds), *more])
        steps.append(torch.load(tmp_path / "outlined.pt", weights_only=False)["steps"])
    assert 0 < steps[0] < steps[1]
    assert read(tmp_path / "outlined.safetensors").facts.rank == 2


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = create_engine(EngineSettings(device="cpu"))
    engine.load()
    yield engine
    engine.close()


def seen(engine: Engine, prompt: str, *loras: str, **asked: object) -> Sighting:
    """What a video shows, to somebody who expects outlines."""
    can = capabilities_of(EngineSettings(device="cpu"), loras, str(asked.get("tier", "")) or None)
    asked = {"prompt": prompt, "num_frames": 17, "seed": 3, "loras": [{"name": name} for name in loras], **asked}
    options = GenerationOptions.model_validate(asked)
    request = resolve(options, can).request
    planes = np.concatenate([output.data for output in engine.generate(request) if isinstance(output, Frames)])
    return look(np.stack([to_rgb(one) for one in planes]), is_outlined=True)


def test_the_outlined_style_draws_outlines(engine: Engine) -> None:
    """By its name alone, without configuration: the same prompt and noise, filled and as an outline."""
    prompt = "a large red circle standing still on a gray background"
    filled = seen(engine, prompt, num_inference_steps=8, num_frames=9)
    outlined = seen(engine, prompt, "outlined", num_inference_steps=8, num_frames=9)
    for sighting in (filled, outlined):
        assert (sighting.background, sighting.colour, sighting.shape) == ("gray", "red", "circle")
    assert filled.hollow < 0.05
    assert outlined.hollow > 0.3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a blue square moving up on a white background", "white blue square up"),
        ("a red circle moving right on a black background", "black red circle right"),
        ("a purple heart growing on a beige background", "beige purple heart grow"),
    ],
)
def test_the_draft_tier_shows_what_the_prompt_says(engine: Engine, prompt: str, expected: str) -> None:
    """In four passes, filled; and as an outline with the style beside it."""
    draft, both = (seen(engine, prompt, *loras, tier="draft", num_frames=9) for loras in ((), ("outlined",)))
    background, colour, shape, motion = expected.split()
    for sighting in (draft, both):
        assert (sighting.background, sighting.colour, sighting.motion) == (background, colour, motion)
    assert draft.shape == shape
    assert draft.hollow < 0.1 < both.hollow
