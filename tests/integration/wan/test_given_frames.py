"""Image-to-video by channels: a generation makes what it makes alone, however it is shared, parked or offloaded.

Small models with random weights, on the CPU, and the whole service with one; ``test_parity.py`` holds them to
diffusers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Step
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Offload
from kinema.engines.wan.ranks.plan import Parallel
from kinema.errors import EngineFailed, OutOfMemory, UnsupportedRequest
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.request.shapes import Size
from tests.integration.wan.random_checkpoints import save_i2v22
from tests.integration.wan.ranks import Request, load_short_of_memory, take_turns
from tests.server_process import running_server

pytestmark = pytest.mark.usefixtures("one_thread", "all_ranks_forked")

PICTURES = np.random.default_rng(5).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
# Sums over parts of the tokens are rounded otherwise; latents are about 1.
_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts."""
    return save_i2v22(tmp_path_factory.mktemp("model") / "i2v")


def loaded(model: Path, **options: object) -> WanEngine:
    engine = WanEngine(inspect(str(model)), device="cpu", **options)  # type: ignore[arg-type]
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine(model: Path) -> WanEngine:
    return loaded(model)


def request_of(engine: WanEngine, prompt: str, **values: object) -> GenerationRequest:
    wanted = {"prompt": prompt, "size": "96x64", "num_frames": 5, "num_inference_steps": 4, **values}
    options = GenerationOptions.model_validate(wanted)
    return resolve(options, engine.capabilities, Size(width=96, height=64)).request


@pytest.fixture(scope="module")
def requests(engine: WanEngine) -> list[Request]:
    """From a first frame, between two frames, and unguided in another length."""
    return [
        (request_of(engine, "a red circle", seed=1), Inputs(PICTURES[0])),
        (request_of(engine, "the black sky", seed=2, num_frames=13), Inputs(PICTURES[1], PICTURES[2])),
        (request_of(engine, "bad", seed=3, num_frames=9, guidance_scale=1.0), Inputs(PICTURES[2])),
    ]


@pytest.fixture(scope="module")
def alone(engine: WanEngine, requests: list[Request]) -> list[Tensor]:
    return [take_turns([engine.sample(*request)])[0] for request in requests]


def test_interleaved_equals_alone(engine: WanEngine, requests: list[Request], alone: list[Tensor]) -> None:
    """Bit for bit, and one that is given up in between."""
    dropped = engine.sample(*requests[1])
    next(dropped)
    together = [engine.sample(*request) for request in requests]
    next(together[0])
    dropped.close()
    assert all(torch.equal(*pair) for pair in zip(take_turns(together), alone, strict=True))


def test_resumed_equals_uninterrupted(engine: WanEngine, requests: list[Request], alone: list[Tensor]) -> None:
    """After each step, so after the last one of the first expert too."""
    for request, expected in zip(requests, alone, strict=True):
        checkpoints = [step.checkpoint() for step in engine.sample(*request) if step.checkpoint is not None]
        assert len(checkpoints) == 4
        resumed = [take_turns([engine.sample(*request, resume=data)])[0] for data in checkpoints]
        assert all(torch.equal(one, expected) for one in resumed)


@pytest.mark.parametrize("offload", ["text", "blocks"])
def test_offloaded_equals_resident(offload: Offload, model: Path, requests: list[Request], alone: list[Tensor]) -> None:
    """Bit for bit, in turns."""
    offloaded = loaded(model, offload=offload)
    made = take_turns([offloaded.sample(*request) for request in requests])
    assert all(torch.equal(*pair) for pair in zip(made, alone, strict=True))


@pytest.fixture(scope="module", params=["cfg", "ulysses", "shard"])
def double(request: pytest.FixtureRequest, model: Path) -> Iterator[WanEngine]:
    parallel: Parallel = request.param
    engine = loaded(model, gpus=2, parallel=parallel)
    yield engine
    engine.close()


def test_two_that_take_turns_make_what_one_makes(
    double: WanEngine, requests: list[Request], alone: list[Tensor]
) -> None:
    """Though what a rank reads and what it predicts have other channels; the same bits over branches of guidance."""
    made = take_turns([double.sample(*request) for request in requests])
    tolerance = 0.0 if double.facts.parallel == "cfg" else _TOLERANCE
    assert all(torch.allclose(*pair, rtol=0, atol=tolerance) for pair in zip(made, alone, strict=True))


def test_a_rank_without_memory_costs_a_step_alone(model: Path, requests: list[Request], alone: list[Tensor]) -> None:
    """Rank 0 gets what it waits for, also where that has fewer channels than the rank has read."""
    engine = loaded(model, gpus=2, parallel="cfg", load_others=load_short_of_memory)
    made, checkpoint, num_failed = None, None, 0
    while made is None and num_failed < 10:
        steps = engine.sample(*requests[1], resume=checkpoint)
        try:
            for step in steps:
                assert step.checkpoint is not None
                checkpoint = step.checkpoint()
            made = take_turns([engine.sample(*requests[1], resume=checkpoint)])[0]
        except OutOfMemory:
            num_failed += 1
    assert 2 <= num_failed < 10
    assert made is not None
    assert torch.equal(made, alone[1])
    assert not engine.is_lost
    engine.close()


def test_a_step_cache_keeps_velocities_alone(model: Path, requests: list[Request]) -> None:
    """They have the channels of latents, and a checkpoint with some of them is as good as none."""
    engine = loaded(model, has_step_cache=True)
    request = requests[0][0].model_copy(update={"num_inference_steps": 12})
    steps = list(engine.sample(request, requests[0][1]))
    expected = take_turns([engine.sample(request, requests[0][1])])[0]
    last_cached = max(step.index for step in steps if step.is_cached)
    checkpoint = steps[last_cached - 2].checkpoint
    assert checkpoint is not None
    resumed = engine.sample(request, requests[0][1], resume=checkpoint())
    assert torch.equal(take_turns([resumed])[0], expected)


def test_a_video_has_its_frames_and_previews(engine: WanEngine, requests: list[Request]) -> None:
    """Of the request's size; a preview shows latents without the channels beside them."""
    outputs = list(engine.generate(*requests[1]))
    previews = [output.preview() for output in outputs if isinstance(output, Step) and output.preview is not None]
    assert [preview.shape for preview in previews] == [(8, 12, 3)] * 4
    assert sum(len(output.data) for output in outputs if isinstance(output, Frames)) == 13


def test_what_such_a_model_does_not_take_is_refused(engine: WanEngine, requests: list[Request]) -> None:
    """By the request, in a sentence, and by the engine if it comes all the same."""
    can, options = engine.capabilities, GenerationOptions(prompt="a red circle")
    with pytest.raises(UnsupportedRequest, match="needs a first frame in input_reference"):
        resolve(options, can)
    with pytest.raises(EngineFailed, match="needs a first frame"):
        next(engine.generate(requests[0][0], NO_INPUTS))
    with pytest.raises(EngineFailed, match="needs a first frame"):
        next(engine.generate(requests[0][0], Inputs(last_frame=PICTURES[0])))
    with pytest.raises(EngineFailed, match="takes no film"):
        next(engine.generate(requests[0][0], Inputs(film=PICTURES)))


def as_png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_service_makes_videos_between_two_pictures_and_goes_on_from_them(model: Path, tmp_path: Path) -> None:
    """Pictures of other sizes are fitted; the extension begins with the video's last frame; the rest is refused."""
    quick = {"prompt": "a red circle", "num_frames": 5, "num_inference_steps": 2, "seed": 1}
    first, last = (as_png(picture) for picture in (PICTURES[0], np.ascontiguousarray(PICTURES[1, :, :50])))
    with running_server(tmp_path, "--model", str(model), "--device", "cpu") as server, server.client() as client:
        modes = client.get("/v1/models").json()["data"][0]["modes"]
        assert modes == ["image-to-video", "first-last-frame-to-video"]
        asked = {**quick, "size": "96x64", "input_reference": first, "last_frame": last}
        made = client.post("/v1/videos/generations", json=asked).raise_for_status().json()
        assert (made["status"], made["num_frames"]) == ("completed", 5)
        assert made["warnings"] == ["last_frame 50x64 was scaled and cropped to 96x64"]
        extended = client.post("/v1/videos/extensions", json=quick | {"video": {"id": made["id"]}}).json()
        client.get(f"/v1/videos/{extended['id']}/events").raise_for_status()  # until its end
        found = client.get(f"/v1/videos/{extended['id']}").raise_for_status().json()
        assert (found["status"], found["size"]) == ("completed", "96x64")
        for body, part in (({}, "first frame"), ({"last_frame": last}, "first frame")):
            refused = client.post("/v1/videos/generations", json=quick | body)
            assert refused.status_code == 400
            assert part in refused.json()["error"]["message"]
        edited = client.post("/v1/videos/edits", json={"prompt": "sky", "video": {"id": made["id"]}})
        assert edited.status_code == 400
