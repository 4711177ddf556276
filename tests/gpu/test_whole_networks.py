"""Networks of the diffusers engine that come to the GPU whole, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kinema.engines.diffusers.whole_networks import OneAtATime

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def three() -> Any:
    """The place, an encoder with a part, a transformer, and a VAE that stays."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.layer(x)
            return made

    place = OneAtATime(torch.device("cuda"))
    encoder, transformer, vae = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), Vae()
    numbers = [one.clone() for one in (*encoder.parameters(), *transformer.parameters())]
    place.add(encoder, by_parts=True)
    place.add(transformer, by_parts=False)
    place.add_lasting(vae, sends_away=True)
    return encoder, transformer, vae, numbers


def where(*networks: Any) -> list[str]:
    return ["".join({one.device.type for one in network.parameters()}) for network in networks]


def test_one_is_on_the_device_and_none_while_the_vae_computes(three: Any) -> None:
    """In any order, since videos take turns; what left has its numbers."""
    encoder, transformer, vae, numbers = three
    x = torch.ones(1, 2, device="cuda")
    assert where(encoder, transformer, vae) == ["cpu", "cpu", "cuda"]
    for _ in range(2):
        encoder(x)
        assert where(encoder, transformer) == ["cuda", "cpu"]
        transformer(x)
        transformer(x)
        assert where(encoder, transformer) == ["cpu", "cuda"]
        encoder[1](x)
        assert where(encoder, transformer) == ["cuda", "cpu"]
        vae(x)
        assert where(encoder, transformer, vae) == ["cpu", "cpu", "cuda"]
    kept = (*encoder.parameters(), *transformer.parameters())
    assert all(torch.equal(one, other) for one, other in zip(kept, numbers, strict=True))


def test_what_was_added_to_a_network_on_the_device_comes_and_goes_with_it(three: Any) -> None:
    """As a LoRA is."""
    encoder, transformer, _, _ = three
    transformer.added = nn.Parameter(torch.ones(2))
    x = torch.ones(1, 2, device="cuda")
    transformer(x)
    assert where(transformer) == ["cuda"]
    encoder(x)
    assert where(transformer) == ["cpu"]
    assert transformer.added.tolist() == [1, 1]


def test_a_network_that_finds_no_room_leaves_whole(three: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one comes."""
    encoder, transformer, _, numbers = three
    x, fails = torch.empty(1, 2, device="cuda"), encoder[1].weight

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() == fails.data_ptr():
            raise torch.OutOfMemoryError("no room")
        return tensor

    place = encoder._hf_hook._place
    monkeypatch.setattr(place, "_pinned", pinned)
    with pytest.raises(torch.OutOfMemoryError):
        encoder(x)
    assert where(encoder) == ["cpu"]
    transformer(x)
    assert where(encoder, transformer) == ["cpu", "cuda"]
    monkeypatch.undo()
    encoder(x)
    assert where(encoder, transformer) == ["cuda", "cpu"]
    transformer(x)
    assert all(torch.equal(one, other) for one, other in zip(encoder.parameters(), numbers, strict=False))
    assert all(one.is_pinned() for one in encoder.parameters())
