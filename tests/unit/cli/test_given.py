"""What a person gives with a flag beyond a plain value."""

from __future__ import annotations

import pytest

from kinema.cli.given import read_loras
from kinema.errors import InvalidRequest
from kinema.request.options import LoraAsk


def test_a_lora_has_a_name_and_maybe_a_strength() -> None:
    """As ``--lora`` takes it, several times."""
    expected = (LoraAsk(name="paper"), LoraAsk(name="clay.v2", scale=-0.8), LoraAsk(name="wood", scale=1.0))
    assert read_loras(["paper", "clay.v2=-.8", "wood=1"]) == expected
    assert read_loras([]) == ()


@pytest.mark.parametrize("text", ["paper=", "paper=strong", "paper=1=2", "paper=0,8"])
def test_a_strength_that_is_no_number_is_refused(text: str) -> None:
    """With the form that is accepted."""
    with pytest.raises(InvalidRequest, match=f"--lora {text}: the strength is no number; give NAME or NAME=0.8"):
        read_loras([text])
