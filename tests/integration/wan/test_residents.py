"""Who has a device's memory: measured by name, left in order, bounded; and a model that does not fit is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kinema.engines.wan import decode, loading
from kinema.engines.wan import engine as wan_engine
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.device_memory import OUTSIDE_BYTES, bytes_of, limit_of
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.residents import Residents
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.errors import ConfigError

GB = 10**9


class StandIn:
    """A device's allocator with this much memory, of which each of some holders has a part."""

    def __init__(self, limit_bytes: int, held: dict[str, int] | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.held = held or {}
        self.is_closed = False

    def free_bytes(self) -> int:
        return self.limit_bytes - sum(self.held.values())

    def give_back(self) -> None:
        for name in [name for name, size in self.held.items() if not size]:
            del self.held[name]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def memory() -> StandIn:
    return StandIn(100, {"graphs": 30, "decoder": 20, "prompts": 10, "transformer": 40})


@pytest.fixture
def residents(memory: StandIn) -> Residents:
    """Three that leave, and weights that do not."""
    made = Residents(memory)
    for name in ("graphs", "decoder", "prompts"):
        made.add(name, partial(memory.held.get, name, 0), partial(memory.held.__setitem__, name, 0))
    made.add("transformer", lambda: memory.held["transformer"])
    return made


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (0, {"graphs": 30, "decoder": 20, "prompts": 10, "transformer": 40}),
        (30, {"decoder": 20, "prompts": 10, "transformer": 40}),
        (31, {"prompts": 10, "transformer": 40}),
        (60, {"transformer": 40}),
        (1000, {"transformer": 40}),
        (None, {"transformer": 40}),
    ],
)
def test_as_many_leave_as_make_room(
    residents: Residents, memory: StandIn, wanted: int | None, left: dict[str, int]
) -> None:
    """In their order; all that can where nobody says how much is wanted, or where it is more than there is."""
    residents.make_room(wanted)
    assert memory.held == left


def test_shared_memory_counts_once() -> None:
    """Views, and the same tensor in two places; dataclasses, sequences and mappings are looked through."""

    @dataclass
    class Layer:
        weight: torch.Tensor
        rest: object

    whole = torch.zeros(10, 10)
    layer = Layer(whole, ({"a": whole[:2], "b": torch.zeros(3, dtype=torch.float16)}, None, "text"))
    assert bytes_of(layer, [whole.t()]) == 400 + 6


@pytest.mark.parametrize(
    ("memory_gb", "available", "limit"),
    [(None, 140 * GB, 140 * GB - OUTSIDE_BYTES), (20.0, 140 * GB, 20 * GB - OUTSIDE_BYTES)],
)
def test_the_limit_is_without_what_lies_beside_the_tensors(memory_gb: float | None, available: int, limit: int) -> None:
    """What is free by default, or what is given."""
    assert limit_of(memory_gb, available, 141 * GB) == limit


@pytest.mark.parametrize(
    ("memory_gb", "available", "sentence"),
    [
        (None, GB // 2, "0.5 GB of the device are free"),
        (0.5, 140 * GB, r"engine\.memory_gb = 0\.5 cannot be used: give more than 0\.75"),
        (142.0, 140 * GB, "at most 141"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(memory_gb: float | None, available: int, sentence: str) -> None:
    """With what would be accepted."""
    with pytest.raises(ConfigError, match=sentence):
        limit_of(memory_gb, available, 141 * GB)


def test_a_bound_is_for_cuda() -> None:
    """A CPU's memory is not bounded by it, so a start with it is refused."""
    with pytest.raises(ConfigError, match=r"engine\.memory_gb .* engine\.device is cpu; leave it out"):
        WanEngine(inspect("tiny-wan"), device="cpu", memory_gb=20.0)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they take and what there is; the bound is lifted again."""
    checkpoint = inspect("tiny-wan")
    parts = loading.load(checkpoint, Placement(torch.device("cpu")), torch.float32)
    needs = bytes_of(parts.text_encoder.weights, parts.vae.weights, parts.transformer.tensors)
    opened = [StandIn(needs), StandIn(needs - 1)]
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: opened[0])
    engine = WanEngine(checkpoint, device="cpu", offload="none")
    engine.load()
    engine.close()
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: opened[1])
    reading = WanEngine(
        checkpoint, device="cpu", offload="none", load_components=lambda *_: pytest.fail("they were read")
    )
    with pytest.raises(
        ConfigError, match=f"its weights take {needs / 1e9:.3g} GB there, and all of its tensors may take"
    ):
        reading.load()
    assert all(one.is_closed for one in opened)


@pytest.mark.parametrize("at", ["weights", "decoder"])
def test_memory_that_runs_out_in_the_load_is_said(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weights get their memory, or after that; and a later load is as good as the first."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    owner, name = {"weights": (loading, "empty_vae"), "decoder": (VaeDecoder, "__init__")}[at]
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(ConfigError, match=r"tiny-wan does not fit into the memory of cpu: its weights take 0\.0"):
            engine.load()
    engine.load()


def test_the_idle_decoder_has_a_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the card, most of which may be somebody else's."""
    asked: list[float] = []
    plain = decode.VaeDecoder

    def make(*args: object, max_idle_bytes: float, **options: object) -> VaeDecoder:
        asked.append(max_idle_bytes)
        return plain(*args, max_idle_bytes=max_idle_bytes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "VaeDecoder", make)
    monkeypatch.setattr(wan_engine, "open_memory", lambda *_: StandIn(10 * GB))
    WanEngine(inspect("tiny-wan"), device="cpu").load()
    assert asked == [GB]
