"""A folder of LoRAs: what is in it now, and why the rest is not usable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.engines.wan.lora import folder as module
from kinema.engines.wan.lora.folder import scan
from kinema.engines.wan.lora.header import open_header
from tests.unit.engines.wan.lora.files import pair, write_lora


def say(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def test_files_are_found_when_they_appear_and_gone_when_they_go(tmp_path: Path) -> None:
    """In folders below, too; other files are nobody's business."""
    assert scan(tmp_path) == module.Listing()
    one = write_lora(tmp_path / "one.safetensors", pair(rank=4), {"trigger_word": "sks"})
    (tmp_path / "below").mkdir()
    (tmp_path / "README.md").touch()
    write_lora(tmp_path / ".two.safetensors.part", pair())
    found = scan(tmp_path)
    assert not found.problems
    lora = found.loras["one"]
    assert (lora.path, lora.second, lora.only, lora.scale) == (one, None, None, 1.0)
    assert (lora.trigger_words, lora.facts.rank, lora.size_bytes) == (("sks",), 4, one.stat().st_size)
    write_lora(tmp_path / "below" / "two.v1.safetensors", pair())
    assert list(scan(tmp_path).loras) == ["one", "two.v1"]
    one.unlink()
    assert list(scan(tmp_path).loras) == ["two.v1"]


def test_a_file_is_opened_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a look at the folder costs a few microseconds for each file."""
    opened: list[str] = []

    def watched(path: Path) -> object:
        opened.append(path.name)
        return open_header(path)

    monkeypatch.setattr(module, "open_header", watched)
    path = write_lora(tmp_path / "one.safetensors", pair())
    before = scan(tmp_path).loras["one"]
    assert scan(tmp_path).loras["one"] == before
    assert opened == ["one.safetensors"]
    write_lora(path, pair(rank=8))
    after = scan(tmp_path).loras["one"]
    assert opened == ["one.safetensors"] * 2
    assert after.facts.rank == 8
    assert after.stamp != before.stamp


def test_a_file_that_is_still_written_is_not_listed(tmp_path: Path) -> None:
    """And does not disturb others; it is listed when it is whole."""
    write_lora(tmp_path / "whole.safetensors", pair())
    path = write_lora(tmp_path / "growing.safetensors", pair())
    data = path.read_bytes()
    for size in (0, 30, len(data) - 1):
        path.write_bytes(data[:size])
        found = scan(tmp_path)
        assert list(found.loras) == ["whole"]
        assert "cut off" in found.problems["growing.safetensors"]
    path.write_bytes(data)
    assert list(scan(tmp_path).loras) == ["growing", "whole"]


def test_a_file_beside_says_more(tmp_path: Path) -> None:
    """Its strength, words and expert; a change of it counts at once."""
    write_lora(tmp_path / "one.safetensors", pair(), {"trigger_word": "from the file"})
    say(tmp_path / "one.json", scale=0.6, trigger_words=["a", "b"], expert="low_noise")
    lora = scan(tmp_path).loras["one"]
    assert (lora.scale, lora.trigger_words, lora.only) == (0.6, ("a", "b"), "transformer_2")
    say(tmp_path / "one.json", scale=1)
    again = scan(tmp_path).loras["one"]
    assert (again.scale, again.trigger_words, again.only) == (1, ("from the file",), None)
    assert again.stamp != lora.stamp


def test_two_files_are_one_lora(tmp_path: Path) -> None:
    """The second one is not listed by itself, and its changes count."""
    paths = [write_lora(tmp_path / f"style_{name}.safetensors", pair()) for name in ("high", "low")]
    say(tmp_path / "style_high.json", second="style_low.safetensors")
    found = scan(tmp_path)
    assert (list(found.loras), found.problems) == (["style_high"], {})
    lora = found.loras["style_high"]
    assert (lora.path, lora.second, lora.only) == (*paths, None)
    assert lora.size_bytes == sum(path.stat().st_size for path in paths)
    write_lora(paths[1], pair(rank=8))
    assert scan(tmp_path).loras["style_high"].stamp != lora.stamp
    paths[1].write_bytes(b"")
    found = scan(tmp_path)
    assert not found.loras
    assert set(found.problems) == {"style_high.safetensors", "style_low.safetensors"}


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("lightning_HIGH-noise_v1", "transformer"),
        ("style_low_noise", "transformer_2"),
        ("high_noise_model", "transformer"),
        ("noise", None),
        ("highlights", None),
    ],
)
def test_the_name_may_say_the_expert(name: str, only: str | None, tmp_path: Path) -> None:
    """As published files do; what stands beside it counts more."""
    write_lora(tmp_path / f"{name}.safetensors", pair())
    assert scan(tmp_path).loras[name].only == only
    say(tmp_path / f"{name}.json", expert="both")
    assert scan(tmp_path).loras[name].only is None


def test_the_keys_of_a_file_count_more_than_its_name(tmp_path: Path) -> None:
    """A file that names its experts in its keys needs no guess."""
    path = tmp_path / "low_noise.safetensors"
    write_lora(path, {**pair("transformer.blocks.0.attn1.to_q"), **pair("transformer_2.blocks.0.attn1.to_q")})
    assert scan(tmp_path).loras["low_noise"].only is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"scal": 1}', "x.json: unknown key scal"),
        ('{"scale": "1"}', "x.json: scale = '1': Input should be a valid number"),
        ('{"scale": 11}', "x.json: scale = 11: Input should be less than or equal to 10"),
        ('{"scale": NaN}', "x.json cannot be read: it is not valid JSON: NaN is not a JSON number"),
        (r'{"trigger_words": ["\udc80"]}', "x.json cannot be read: it is not valid Unicode: it has a lone surrogate"),
        ('{"expert": "middle"}', "x.json: expert = 'middle': Input should be 'high_noise', 'low_noise' or 'both'"),
        ('{"second": "x.safetensors"}', "x.json: second = 'x.safetensors' is no other .safetensors file beside it"),
        (
            '{"second": "../y.safetensors"}',
            "x.json: second = '../y.safetensors' is no other .safetensors file beside it",
        ),
        (
            '{"second": "y.safetensors", "expert": "both"}',
            "x.json has expert and second; with two files, each is for one expert",
        ),
        (
            "{",
            "x.json cannot be read: it is not valid JSON: Expecting property name enclosed in double quotes: line 1 ",
        ),
        ("[]", "x.json: Input should be a valid dictionary or instance of Sidecar"),
        (" " * 70_000, "x.json cannot be read: it is larger than 64 KiB"),
    ],
)
def test_a_bad_file_beside_is_a_problem(text: str, problem: str, tmp_path: Path) -> None:
    """A word that was meant otherwise is not passed over."""
    write_lora(tmp_path / "x.safetensors", pair())
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    found = scan(tmp_path)
    assert not found.loras
    assert found.problems["x.safetensors"].startswith(problem)


def test_what_is_not_usable_is_named(tmp_path: Path) -> None:
    """Each file with its reason; the others are listed."""
    (tmp_path / "loras" / "below" / "a" / "b" / "c" / "d").mkdir(parents=True)
    root = tmp_path / "loras"
    outside = write_lora(tmp_path / "outside.safetensors", pair())
    write_lora(root / "good.safetensors", pair())
    write_lora(root / "twice.safetensors", pair())
    write_lora(root / "below" / "twice.safetensors", pair())
    write_lora(root / "two words.safetensors", pair())
    write_lora(root / "dora.safetensors", {**pair(), "blocks.0.attn1.to_q.dora_scale": (1, 8)})
    (root / "old.pt").touch()
    os.mkfifo(root / "pipe.safetensors")
    (root / "leaves.safetensors").symlink_to(outside)
    (root / "within.safetensors").symlink_to(root / "good.safetensors")
    (root / "nowhere.safetensors").symlink_to(root / "missing")
    (root / "around").symlink_to(root)
    (root / "notes.txt").symlink_to(root / "missing")
    found = scan(root)
    assert list(found.loras) == ["good", "within"]
    assert found.problems == {
        "around": "links to folders are not followed",
        "below/a/b/c/d": "folders are looked into 4 levels deep",
        "below/twice.safetensors": "2 files have the name twice; give each its own",
        "dora.safetensors": "the LoRA dora.safetensors is a DoRA ('blocks.0.attn1.to_q.dora_scale'), which is not "
        "supported; give a plain LoRA",
        "leaves.safetensors": "it is a link to a file outside of the folder, which is not followed",
        "nowhere.safetensors": "it cannot be read: No such file or directory",
        "old.pt": "it is a pickle, which can run code; only .safetensors files are read",
        "pipe.safetensors": "it is no file",
        "twice.safetensors": "2 files have the name twice; give each its own",
        "two words.safetensors": "the name 'two words' is not up to 100 letters A-Z and a-z, digits, '.', '_' and '-'",
    }


def test_a_file_beside_must_be_one_of_the_folder(tmp_path: Path) -> None:
    """Neither a pipe, which would wait for ever, nor a link to another place."""
    (tmp_path / "loras").mkdir()
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    for name in ("pipe", "link"):
        write_lora(tmp_path / "loras" / f"{name}.safetensors", pair())
    os.mkfifo(tmp_path / "loras" / "pipe.json")
    (tmp_path / "loras" / "link.json").symlink_to(tmp_path / "secret.json")
    found = scan(tmp_path / "loras")
    assert found.problems == {
        f"{name}.safetensors": f"{name}.json is no file of this folder" for name in ("pipe", "link")
    }


def test_a_folder_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    """Whoever asks for a LoRA of it learns why there is none."""
    assert scan(tmp_path / "missing").problems == {".": "the folder cannot be read: No such file or directory"}


def test_a_folder_of_too_many_files_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bounded, for somebody may name the wrong folder."""
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    for name in "abcd":
        write_lora(tmp_path / f"{name}.safetensors", pair())
    found = scan(tmp_path)
    assert list(found.loras) == ["a", "b", "c"]
    assert found.problems == {".": "more than 3 files; the others are not looked at"}


def test_files_are_listed_and_compared_without_torch() -> None:
    """So a frontend can refuse a request before it is accepted."""
    code = "import sys, kinema.engines.wan.lora.folder, kinema.engines.wan.lora.fit; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
