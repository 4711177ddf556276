"""The LoRAs of a request: how a client may write them, and what is made of them or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kinema.engines.fake import FakeEngine
from kinema.errors import InvalidRequest, RequestError, UnsupportedRequest
from kinema.request.bodies import RemixBody, VideoBody
from kinema.request.capabilities import Capabilities, LoraInfo
from kinema.request.loras import merge_loras, split_model, with_loras
from kinema.request.options import GenerationOptions, LoraAsk
from kinema.request.request import GenerationRequest, LoraUse
from kinema.request.resolve import Resolved, resolve

PAPER = LoraInfo(name="paper", digest="a" * 64, scale=0.7)
CLAY = LoraInfo(name="clay", digest="b" * 64)
CAN = FakeEngine(loras=[PAPER, CLAY]).capabilities


def two_experts(**changes: object) -> Capabilities:
    infos = tuple(info.model_copy(update={"is_for": "both", **changes}) for info in CAN.loras)
    return CAN.model_copy(update={"has_two_experts": True, "loras": infos})


def resolved(loras: Any, can: Capabilities = CAN) -> Resolved:
    return resolve(VideoBody.parse({"prompt": "a", "loras": loras}).options(), can)


def asked(loras: Any, can: Capabilities = CAN) -> list[tuple[str, float, float | None]]:
    return [(use.name, use.scale, use.scale_2) for use in resolved(loras, can).request.loras]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (None, []),
        ([], []),
        ("", []),
        ("[]", []),
        ("paper", [("paper", 0.7, None)]),
        (["paper"], [("paper", 0.7, None)]),
        ({"name": "paper"}, [("paper", 0.7, None)]),
        ({"name": "paper", "scale": None}, [("paper", 0.7, None)]),
        ([{"name": "paper", "scale": 0.5}, "clay"], [("paper", 0.5, None), ("clay", 1.0, None)]),
        ([{"name": "paper", "scale": "-1e1"}], [("paper", -10.0, None)]),
        (['{"name": "paper", "scale": 2}', "clay"], [("paper", 2.0, None), ("clay", 1.0, None)]),
    ],
)
def test_loras_are_written_in_many_ways(sent: object, expected: object) -> None:
    """A list, one alone, names, objects; and the same as JSON text, as a form has it."""
    assert asked(sent) == expected
    if sent is not None and not isinstance(sent, str):
        assert asked(json.dumps(sent)) == expected


def test_a_request_keeps_the_digest() -> None:
    """So that another file of that name is never taken for it."""
    (use,) = resolved("clay").request.loras
    assert use == LoraUse(name="clay", digest="b" * 64, scale=1.0)


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        (1, "loras", 'must be names or objects; for instance'),
        (True, "loras", "must be names or objects"),
        ([["paper"]], "loras", "must be names or objects"),
        ("[", "loras", "cannot be read: the text is not valid JSON"),
        ('["paper"', "loras", "cannot be read"),
        (["paper"] * 5, "loras", "loras has 5 entries; at most 4 are used together"),
        ([{}], "loras.0.name", "is missing"),
        (["paper", {"name": None}], "loras.1.name", "is not valid"),
        ([""], "loras.0.name", "must not be empty"),
        (["x" * 201], "loras.0.name", "too long"),
        (["\0"], "loras.0.name", "NUL"),
        (["\ud800"], "loras.0.name", "not valid Unicode"),
        ([{"name": "paper", "scale": "strong"}], "loras.0.scale", "must be a number, not 'strong'"),
        ([{"name": "paper", "scale": True}], "loras.0.scale", "must be a number"),
        ([{"name": "paper", "strength": 1}], "loras.0.strength", "'loras.0.strength'; known are name, scale"),
        ([{"name": "paper", "path": "/etc/passwd"}], "loras.0.path", "unknown field"),
        (["paper", "paper"], "loras", "the LoRA 'paper' is given more than once"),
        ([{"name": "paper", "scale": "nan"}], "loras", "scale of the LoRA paper must be a number from -10 to 10"),
        ([{"name": "paper", "scale": "-inf"}], "loras", "must be a number from -10 to 10"),
        ([{"name": "paper", "scale": 10.01}], "loras", "must be a number from -10 to 10"),
        ([{"name": "paper", "scale": -(10**41)}], "loras", "must be a number from -10 to 10"),
        (["wood"], "loras", "fake has no LoRA 'wood'; there are paper, clay"),
        (["../paper"], "loras", "fake has no LoRA '../paper'"),
        (["paper.safetensors"], "loras", "fake has no LoRA 'paper.safetensors'"),
        ([{"name": "paper", "digest": "c" * 64}], "loras", f"paper is not the file that is asked for: .* {'a' * 64}"),
        ([{"name": "paper", "scale_2": 1}], "loras", "scale_2 of the LoRA paper is for models with two experts"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(sent: object, param: str, message: str) -> None:
    """With what would be accepted."""
    with pytest.raises(RequestError, match=message) as refused:
        resolved(sent)
    assert refused.value.param == param


def test_a_model_without_loras_says_so() -> None:
    """And one with many names the first few."""
    with pytest.raises(UnsupportedRequest, match="fake has no LoRAs here; leave loras out, or send an empty list"):
        resolved("paper", FakeEngine().capabilities)
    many = FakeEngine(loras=[LoraInfo(name=f"l{index}", digest="") for index in range(9)]).capabilities
    with pytest.raises(UnsupportedRequest, match="there are l0, l1, l2, l3, l4 and 4 more"):
        resolved("paper", many)


def test_each_expert_may_have_its_strength() -> None:
    """Where the model has two."""
    can = two_experts()
    assert asked({"name": "paper", "scale_2": 0.25}, can) == [("paper", 0.7, 0.25)]
    assert asked("paper", can) == [("paper", 0.7, None)]
    with pytest.raises(InvalidRequest, match="scale_2 of the LoRA paper must be a number from -10 to 10"):
        resolved({"name": "paper", "scale_2": 11}, can)


@pytest.mark.parametrize(
    ("is_for", "scale", "scale_2", "is_left_out"),
    [
        (None, 0, None, True),
        (None, 0.1, None, False),
        ("both", 0, None, True),
        ("both", 0, 0, True),
        ("both", 0, 1, False),
        ("both", 1, 0, False),
        ("high_noise", 0, 1, True),
        ("low_noise", 0, 1, False),
        ("low_noise", 1, 0, True),
        ("low_noise", 1, None, False),
    ],
)
def test_a_lora_without_strength_is_left_out(
    is_for: str | None, scale: float, scale_2: float | None, is_left_out: bool
) -> None:
    """It would cost time and change nothing; the warnings say so."""
    can = CAN if is_for is None else two_experts(is_for=is_for)
    found = resolved([{"name": "paper", "scale": scale, "scale_2": scale_2}, "clay"], can)
    assert [use.name for use in found.request.loras] == (["clay"] if is_left_out else ["paper", "clay"])
    assert found.warnings == (("the LoRA paper was left out: its strength is 0",) if is_left_out else ())


def test_a_remix_has_the_loras_of_the_first_video() -> None:
    """The same files, or it is refused; a list in its body takes their place, an empty one too."""
    first = resolved({"name": "paper", "scale": 0.5}).request
    body = {"prompt": "b"}
    again = RemixBody.parse(body).options_after(first)
    assert resolve(again, CAN).request.loras == first.loras
    assert resolve(RemixBody.parse(body | {"loras": []}).options_after(first), CAN).request.loras == ()
    other = resolve(RemixBody.parse(body | {"loras": "clay"}).options_after(first), CAN).request
    assert [use.name for use in other.loras] == ["clay"]
    changed = FakeEngine(loras=[PAPER.model_copy(update={"digest": "c" * 64})]).capabilities
    with pytest.raises(UnsupportedRequest, match="paper is not the file that is asked for"):
        resolve(again, changed)


def test_older_requests_and_capabilities_have_no_loras() -> None:
    """Rows of a database, and what an older worker says."""
    request = resolved(None).request
    assert GenerationRequest.model_validate(request.model_dump(exclude={"loras"})) == request
    can = FakeEngine().capabilities
    assert Capabilities.model_validate(can.model_dump(mode="json", exclude={"loras"})) == can
    assert Capabilities.model_validate(CAN.model_dump(mode="json")) == CAN


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny", ("tiny", ())),
        ("tiny:paper", ("tiny", ("paper",))),
        ("tiny:paper,clay", ("tiny", ("paper", "clay"))),
        ("tiny:", ("tiny", ("",))),
        ("own:name", ("own:name", ())),
        ("own:name:paper", ("own:name", ("paper",))),
        ("other:paper", ("other:paper", ())),
        (":paper", (":paper", ())),
        ("tiny : paper , clay", ("tiny", ("paper", "clay"))),
        ("", ("", ())),
    ],
)
def test_a_model_may_have_loras_behind_a_colon(model: str, expected: object) -> None:
    """For clients that can set nothing else; a model's own name with a colon wins."""
    base, tier, loras = split_model(model, {"tiny", "own:name"})
    assert ((base, loras), tier) == (expected, None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny@draft", ("tiny", "draft", ())),
        ("tiny@draft:paper,clay", ("tiny", "draft", ("paper", "clay"))),
        ("tiny@", ("tiny@", None, ())),
        ("tiny @ draft : paper", ("tiny", "draft", ("paper",))),
        ("own@name", ("own@name", None, ())),
        ("own@name@draft:paper", ("own@name", "draft", ("paper",))),
        ("own@name:paper", ("own@name", None, ("paper",))),
        ("other@draft", ("other@draft", None, ())),
    ],
)
def test_a_model_may_have_a_tier_behind_an_at_sign(model: str, expected: object) -> None:
    """Before its LoRAs; a model's own name wins."""
    assert split_model(model, {"tiny", "own@name"}) == expected


def test_loras_of_both_places_are_used() -> None:
    """One that is in both has the strength that the list gives it."""
    options = GenerationOptions(prompt="a", loras=(LoraAsk(name="paper", scale=0.5),))
    both = with_loras(options, ["clay", "paper"]).loras
    assert both == (LoraAsk(name="clay"), LoraAsk(name="paper", scale=0.5))
    assert with_loras(options, ()) is options


def test_workers_of_a_model_have_the_loras_of_all() -> None:
    """Of two files with one name that of the first worker."""
    other = CLAY.model_copy(update={"digest": "d" * 64})
    first, second = FakeEngine(loras=[CLAY]).capabilities, FakeEngine(loras=[PAPER, other]).capabilities
    assert merge_loras(first, second).loras == (CLAY, PAPER)
    assert merge_loras(first, first) is first
