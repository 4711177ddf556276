"""What generations that take turns keep between two turns: their prompts' states, and keys and values of one of them.

Real small models, on the CPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.denoise import make_noise
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_two_experts
from tests.integration.wan.ranks import take_turns

pytestmark = pytest.mark.usefixtures("one_thread")

# 512 tokens, whose keys and values are 24 times as large as the states.
LONG = "a red circle moving right " * 200
# More than states, times, latents and the solver's memory of a small video, and less than a tenth of keys and values.
MAX_KEPT = 2**20
TIMESTEPS = torch.tensor([999, 600, 20])


def loaded(model: str) -> WanEngine:
    engine = WanEngine(inspect(model), device="cpu")
    engine.load()
    return engine


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects() -> Iterator[None]:
    """The collector looks at nothing that was there before, so that looking for tensors takes milliseconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    return loaded("tiny-wan")


def ask(engine: WanEngine, prompt: str, **values: object) -> GenerationRequest:
    asked = {"num_inference_steps": 4, "num_frames": 5, "size": "64x64", "seed": 1, **values}
    return resolve(GenerationOptions.model_validate({"prompt": prompt, **asked}), engine.capabilities).request


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def size_bytes() -> int:
    """The memory of all new tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors()}
    return sum(storages.values())


def keys_and_values(engine: WanEngine) -> int:
    """How many prompts have keys and values in memory. No other tensor has such a shape."""
    network = engine.parts.transformer.network
    shape = len(network.blocks), 2 * network.width
    return sum(
        tensor.shape[1]
        for tensor in live_tensors()
        if tensor.dim() == 4 and (tensor.shape[0], tensor.shape[3]) == shape
    )


def test_generations_that_take_turns_keep_states_and_latents(engine: WanEngine) -> None:
    """However many there are, one of them has keys and values; when memory has run out, or all are given up, none."""
    request = ask(engine, LONG)
    engine.sample(request).close()
    before = size_bytes()
    running = [engine.sample(request.model_copy(update={"seed": seed})) for seed in range(4)]
    next(running[0])
    first = size_bytes()
    assert first - before > 10 * MAX_KEPT
    for _ in range(2):
        for generation in running:
            next(generation)
    assert size_bytes() - first < 3 * MAX_KEPT
    assert keys_and_values(engine) == 2  # of the prompt and the negative prompt
    engine.make_room()
    assert keys_and_values(engine) == 0
    next(running[0])
    for generation in running:
        generation.close()
    assert size_bytes() - before < MAX_KEPT
    assert keys_and_values(engine) == 0


def prepare(engine: WanEngine, request: GenerationRequest, *used: int) -> PreparedRequest:
    """A request with a text of so many random states for each prompt."""
    texts = [torch.randn(1, count, 128) for count in used]
    transformer: WanTransformer = engine.parts.transformer
    return transformer.prepare(texts, TIMESTEPS, make_noise(request, engine.parts), has_clean_frame=False)


@torch.inference_mode()
def test_keys_and_values_are_computed_when_the_turn_changes(engine: WanEngine) -> None:
    """Not again at the next step of the same request, and the same numbers when it comes back."""
    request = ask(engine, "a red circle")
    transformer: WanTransformer = engine.parts.transformer
    latents = make_noise(request, engine.parts)
    first, second = prepare(engine, request, 9, 70), prepare(engine, request, 30)
    transformer.velocities(first, latents, 0)
    text = transformer.expand(first).text
    computed, numbers = weakref.ref(text), text.keys_values.clone()
    del text
    transformer.velocities(first, latents, 1)
    assert computed() is transformer.expand(first).text
    transformer.velocities(second, latents, 1)
    assert computed() is None
    transformer.velocities(first, latents, 2)
    assert torch.equal(transformer.expand(first).text.keys_values, numbers)
    last = weakref.ref(transformer.expand(first).text)
    del first
    assert last() is None


@torch.inference_mode()
def test_a_branch_of_guidance_has_the_numbers_of_both(engine: WanEngine) -> None:
    """A rank that computes one of the prompts has its keys and values alone, as long as the longest prompt's."""
    request = ask(engine, "a red circle")
    transformer: WanTransformer = engine.parts.transformer
    both = prepare(engine, request, 9, 70)
    whole = transformer.expand(both).text
    for index in range(2):
        text = transformer.expand(both.branch(index)).text
        assert text.keys_values.shape[1:3] == (1, 71)
        assert torch.equal(text.keys_values, whole.branch(index).keys_values)
        assert torch.equal(text.bias, whole.branch(index).bias)


def test_two_experts_have_one_text_each(tmp_path: Path) -> None:
    """The first lets go of it when a generation goes on to the second. Interleaved equals alone, bit for bit, also when
    some are at the first and some at the second expert."""
    engine = loaded(str(save_two_experts(tmp_path / "model")))
    asked = [
        ask(engine, "a red circle", seed=1, num_inference_steps=6),
        ask(engine, "a circle moving right on the sky", seed=2),
        ask(engine, "a black sky", seed=3, guidance_scale=1.0),
    ]
    alone = []
    for request in asked:
        generation, counts = engine.sample(request), []
        try:
            while True:
                next(generation)
                counts.append(keys_and_values(engine))
        except StopIteration as end:
            alone.append(end.value)
        assert set(counts) == {1 if request.guidance_scale == 1.0 else 2}
    ahead = engine.sample(asked[0])
    for _ in range(5):  # the fifth of its steps is the second expert's first, of the others the fourth is
        next(ahead)
    together = [ahead, *(engine.sample(request) for request in asked[1:])]
    for generation in together[1:]:
        next(generation)
    assert keys_and_values(engine) == 3  # two of the one that is ahead, and one of the last
    for made, expected in zip(take_turns(together), alone, strict=True):
        assert torch.equal(made, expected)
