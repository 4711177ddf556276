"""The tiers of a model: what they set, what a client may say beside them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kinema.engines.fake import FakeEngine
from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.bodies import RemixBody, VideoBody
from kinema.request.capabilities import LoraInfo, Tier, TierLora
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.request.tiers import named_tier

FAST, CLAY = LoraInfo(name="fast", digest="a" * 64), LoraInfo(name="clay", digest="b" * 64)
DRAFT = Tier(
    name="draft",
    timesteps=(1000, 750.5, 250),
    guidance_scale=1.0,
    flow_shift=5.0,
    solver="lcm",
    loras=(TierLora(name="fast", scale=0.9),),
)
QUICK = Tier(name="quick", num_inference_steps=2, guidance_scale=3.0)
GONE = Tier(name="gone", loras=(TierLora(name="wood"),))
CAN = FakeEngine(loras=[FAST, CLAY], tiers=[DRAFT, QUICK, GONE]).capabilities


def asked(**fields: Any) -> GenerationRequest:
    return resolve(VideoBody.parse({"prompt": "a", "seed": 1, **fields}).options(), CAN).request


def remixed(first: GenerationRequest, named: str | None = None, **fields: Any) -> GenerationRequest:
    body = RemixBody.parse({"prompt": "b", **fields})
    return resolve(body.options_after(first, CAN.tiers, named), CAN).request


def used(request: GenerationRequest) -> list[tuple[str, float]]:
    return [(use.name, use.scale) for use in request.loras]


def test_a_tier_takes_the_place_of_the_preset() -> None:
    """The request has each value, and the others are still the preset's."""
    request = asked(tier="draft")
    assert (request.tier, request.solver, request.timesteps) == ("draft", "lcm", (1000, 750.5, 250))
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (3, 1.0, 5.0)
    assert used(request) == [("fast", 0.9)]
    assert request.loras[0].digest == FAST.digest
    assert request.size == CAN.preset.size
    plain = asked()
    assert (plain.tier, plain.solver, plain.timesteps, plain.loras) == (None, None, None, ())
    assert (request.num_passes, plain.num_passes) == (1, 2)
    assert request.work < asked(guidance_scale=1, num_inference_steps=4).work < plain.work


def test_a_client_wins_where_that_makes_sense() -> None:
    """Its LoRAs are added."""
    quick = asked(tier="quick", num_inference_steps=6, guidance_scale=7, flow_shift=2)
    assert (quick.num_inference_steps, quick.guidance_scale, quick.flow_shift) == (6, 7.0, 2.0)
    draft = asked(tier="draft", guidance_scale=0.5, loras=["clay"], num_inference_steps=3, flow_shift=5)
    assert (draft.guidance_scale, used(draft)) == (0.5, [("fast", 0.9), ("clay", 1.0)])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_inference_steps": 8}, "num_inference_steps", "the tier draft has timesteps of its own"),
        ({"flow_shift": 3}, "flow_shift", "the tier draft has timesteps of its own"),
        ({"guidance_scale": 1.1}, "guidance_scale", "the tier draft is made without guidance"),
        ({"loras": ["fast"]}, "loras", "has the LoRA fast with its own strength"),
        ({"tier": "final"}, "tier", "fake has no tier 'final' here; there are draft, quick"),
        ({"tier": "gone"}, "tier", r"the tier gone of fake is not offered now: .* \(wood\)"),
    ],
)
def test_what_contradicts_a_tier_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(UnsupportedRequest, match=message) as refused:
        asked(**{"tier": "draft", **fields})
    assert refused.value.param == param


def test_no_tier_is_an_empty_text() -> None:
    """As a form sends it."""
    assert asked(tier="") == asked()


def test_a_tier_whose_lora_is_away_is_not_offered() -> None:
    assert [tier.name for tier in CAN.offered_tiers] == ["draft", "quick"]


def test_the_name_of_a_model_and_the_field_agree() -> None:
    options = GenerationOptions(prompt="a", tier="draft")
    assert named_tier(options, "draft") is options
    assert named_tier(options, None) is options
    assert named_tier(GenerationOptions(prompt="a"), "quick").tier == "quick"
    with pytest.raises(InvalidRequest, match="tier and the tier in model differ"):
        named_tier(options, "quick")


def test_a_remix_keeps_the_tier_and_its_values() -> None:
    """Also when the tier has other ones now."""
    first = asked(tier="draft", loras=["clay"])
    assert remixed(first) == first.model_copy(update={"prompt": "b"})
    assert remixed(first, tier="draft") == remixed(first, named="draft") == remixed(first)
    changed = [DRAFT.model_copy(update={"timesteps": None, "num_inference_steps": 9}), QUICK]
    now = CAN.model_copy(update={"tiers": tuple(changed)})
    options = RemixBody.parse({"prompt": "b"}).options_after(first, now.tiers)
    assert resolve(options, now).request == remixed(first)
    assert used(remixed(first, loras=[])) == [("fast", 0.9)]
    with pytest.raises(UnsupportedRequest, match="num_inference_steps must be 3"):
        remixed(first, num_inference_steps=5)
    with pytest.raises(UnsupportedRequest, match="made without guidance"):
        remixed(first, guidance_scale=5)


@pytest.mark.parametrize("named", [None, "quick"])
def test_a_remix_may_name_another_tier(named: str | None) -> None:
    """The LoRAs that the client added stay; those of the first tier go, and so do its values."""
    first = asked(tier="draft", loras=["clay"], fps=9)
    fields = {"tier": "quick"} if named is None else {}
    body = RemixBody.parse({"prompt": "b", **fields})
    other = resolve(named_tier(body.options_after(first, CAN.tiers, named), named), CAN).request
    assert other == asked(tier="quick", loras=["clay"], fps=9).model_copy(update={"prompt": "b"})
    plain = remixed(first, tier="")
    assert plain == asked(loras=["clay"], fps=9).model_copy(update={"prompt": "b"})
