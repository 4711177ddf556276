"""Models that attend to what CLIP sees in given frames make the same video in every way of running them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.engines.base import Inputs
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import bytes_of
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.loading import load
from kinema.engines.wan.placement import Placement, bytes_wanted
from kinema.engines.wan.ranks.plan import Parallel
from kinema.errors import ConfigError, EngineFailed
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_flf2v, save_i2v21
from tests.integration.wan.ranks import take_turns

pytestmark = pytest.mark.usefixtures("one_thread", "all_ranks_forked")

CPU = torch.device("cpu")
FIRST, LAST, OTHER = np.random.default_rng(7).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
# The sums of a part of the tokens may be rounded otherwise than those of all; latents are about 1.
_TOLERANCE = 1e-4
Request = tuple[GenerationRequest, Inputs]


@pytest.fixture(scope="module", params=[save_i2v21, save_flf2v], ids=["i2v21", "flf2v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = request.param
    return save(tmp_path_factory.mktemp("models") / "model")


def loaded(folder: Path, **how: object) -> WanEngine:
    engine = WanEngine(inspect(str(folder)), device="cpu", **how)  # type: ignore[arg-type]
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[WanEngine]:
    made = loaded(folder)
    yield made
    made.close()


def request_of(engine: WanEngine, **values: object) -> GenerationRequest:
    wanted = {"prompt": "a red circle", "size": "64x64", "num_frames": 5, "num_inference_steps": 3, "seed": 3}
    return resolve(GenerationOptions.model_validate(wanted | values), engine.capabilities, "64x64").request


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[Request]:
    """Guided and unguided, with two pictures where the model takes them and with other ones."""
    last = LAST if engine.capabilities.is_first_last_frame_to_video else None
    return [
        (request_of(engine), Inputs(FIRST, last)),
        (request_of(engine, guidance_scale=1.0, prompt="the black sky"), Inputs(OTHER, last)),
        (request_of(engine, seed=4), Inputs(OTHER)),
    ]


@pytest.fixture(scope="module")
def alone(engine: WanEngine, requests: list[Request]) -> list[Tensor]:
    return [take_turns([engine.sample(*request)])[0] for request in requests]


def sampled(engine: WanEngine, request: Request) -> Tensor:
    return take_turns([engine.sample(*request)])[0]


def test_generations_that_take_turns_equal_those_alone(
    engine: WanEngine, requests: list[Request], alone: list[Tensor]
) -> None:
    """And one that goes on from a step."""
    made = take_turns([engine.sample(*request) for request in requests])
    assert all(torch.equal(one, other) for one, other in zip(made, alone, strict=True))
    step = next(engine.sample(*requests[0]))
    assert step.checkpoint is not None
    resumed = engine.sample(*requests[0], resume=step.checkpoint())
    assert torch.equal(take_turns([resumed])[0], alone[0])


@pytest.mark.parametrize("offload", ["text", "blocks"])
def test_weights_in_the_hosts_memory_make_the_same_bits(
    offload: str, folder: Path, requests: list[Request], alone: list[Tensor]
) -> None:
    offloaded = loaded(folder, offload=offload)
    for request, expected in zip(requests, alone, strict=True):
        assert torch.equal(sampled(offloaded, request), expected)


@pytest.mark.parametrize("parallel", ["cfg", "ulysses", "shard"])
def test_two_ranks_make_what_one_makes(
    parallel: Parallel, folder: Path, requests: list[Request], alone: list[Tensor]
) -> None:
    """Bit for bit where each has a branch of guidance."""
    double = loaded(folder, gpus=2, parallel=parallel)
    try:
        made = take_turns([double.sample(*request) for request in requests])
    finally:
        double.close()
    for index, (one, expected) in enumerate(zip(made, alone, strict=True)):
        if parallel == "cfg" or (parallel == "shard" and index != 1):
            assert torch.equal(one, expected)
        else:
            torch.testing.assert_close(one, expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("has_prefix", [True, False], ids=["published", "newer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_the_encoder_is_read_as_transformers_reads_it(
    dtype: torch.dtype, has_prefix: bool, folder: Path, tmp_path: Path
) -> None:
    """Every bit of its states, under both names that its weights have in files, some of which have a projection too."""
    from transformers import CLIPVisionModel

    path = copied(folder, tmp_path, "image_encoder")
    file = path / "image_encoder" / "model.safetensors"
    prefix = "vision_model." if has_prefix else ""
    weights = {f"{prefix}{name.removeprefix('vision_model.')}": one for name, one in load_file(file).items()}
    beside = {"visual_projection.weight": torch.zeros(8, 16), f"{prefix}embeddings.position_ids": torch.arange(5)[None]}
    save_file(weights | (beside if has_prefix else {}), file)
    encoder = load(inspect(str(path)), Placement(CPU), dtype).image_encoder
    assert encoder is not None
    module = CLIPVisionModel.from_pretrained(str(folder), subfolder="image_encoder", dtype=dtype).eval()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encoder.states(pixels), module(pixels, output_hidden_states=True).hidden_states[-2])


def copied(origin: Path, folder: Path, component: str) -> Path:
    """The checkpoint with files of one component that can be changed."""
    for path in origin.iterdir():
        if path.name != component:
            (folder / path.name).symlink_to(path)
    (folder / component).mkdir()
    for path in (origin / component).iterdir():
        (folder / component / path.name).write_bytes(path.read_bytes())
    return folder


def test_damaged_weights_of_the_encoder_are_named(folder: Path, requests: list[Request], tmp_path: Path) -> None:
    path = copied(folder, tmp_path, "image_encoder")
    file = path / "image_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("pre_layrnorm.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, file)
    with pytest.raises(EngineFailed, match="The image encoder gave values that are not finite"):
        sampled(loaded(path), requests[0])


def test_the_encoder_counts_among_the_memory(folder: Path, engine: WanEngine) -> None:
    """As a resident, and where the placement is chosen."""
    assert engine._residents is not None
    encoder = engine.parts.image_encoder
    assert encoder is not None
    assert engine._residents.sizes()["image encoder"] == encoder.device_bytes > 0
    checkpoint = inspect(str(folder))
    on_device, in_host = (bytes_wanted(checkpoint, Placement(CPU, place), torch.float32) for place in ("none", "text"))
    text = bytes_of(engine.parts.text_encoder.weights)
    assert on_device - in_host > encoder.device_bytes
    assert on_device > text + encoder.device_bytes + engine.parts.transformer.weight_bytes


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("image_encoder/config.json", {"hidden_size": 32}, "the image encoder has hidden_size = 32"),
        ("image_encoder/config.json", {"num_hidden_layers": 1}, "num_hidden_layers = 1"),
        ("image_encoder/config.json", {"model_type": "siglip_vision_model"}, "model_type = 'siglip_vision_model'"),
        ("image_encoder/config.json", {"num_attention_heads": 3}, "hidden_size must be a multiple"),
        ("image_processor/preprocessor_config.json", {"do_center_crop": False}, "do_center_crop = False"),
        ("image_processor/preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "unknown key size.height"),
        ("image_processor/preprocessor_config.json", {"crop_size": {"height": 14, "width": 28}}, "crop_size is 14x28"),
        ("transformer/config.json", {"image_dim": None}, "image_dim and added_kv_proj_dim belong together"),
        ("transformer/config.json", {"added_kv_proj_dim": 12}, "added_kv_proj_dim must be the width of a token"),
        ("transformer/config.json", {"in_channels": 4}, "no channels of given frames"),
        ("transformer/config.json", {"pos_embed_seq_len": 12}, "two pictures have 10 states"),
        ("model_index.json", {"image_encoder": [None, None]}, "names no image_encoder"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(
    file: str, values: dict[str, object], sentence: str, folder: Path, tmp_path: Path
) -> None:
    path = copied(folder, tmp_path, Path(file).parent.name) if "/" in file else tmp_path
    if "/" not in file:
        for one in folder.iterdir():
            (path / one.name).symlink_to(one)
    config = json.loads((path / file).read_text(encoding="utf-8"))
    (path / file).unlink()
    (path / file).write_text(json.dumps(config | values), encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        inspect(str(path))
