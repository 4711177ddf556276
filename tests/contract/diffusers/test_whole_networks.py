"""Networks that come to the device whole, one at a time. That their weights move is for ``tests/gpu``."""

from __future__ import annotations


def test_whichever_computes_is_there_and_none_beside_the_vae() -> None:
    """In any order, since videos take turns: a whole network, a part of an encoder, and what a VAE does."""
    import torch
    from torch import nn

    from kinema.engines.diffusers.whole_networks import OneAtATime
    from tests.dummies.parts import wan_vae

    place = OneAtATime(torch.device("cpu"))
    encoder, transformer, vae = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), wan_vae()
    place.add(encoder, by_parts=True)
    place.add(transformer, by_parts=False)
    place.add_lasting(vae, sends_away=True)
    assert place.present is None
    x = torch.ones(1, 2)
    for _ in range(2):
        encoder(x)
        assert place.present is encoder
        transformer(x)
        transformer(x)
        assert place.present is transformer
        encoder[1](x)
        assert place.present is encoder
        vae.decode(torch.zeros(1, 16, 1, 1, 1))
        assert place.present is None
