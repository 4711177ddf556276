"""The LoRAs of a folder that a model can use: which are listed, when, and that a changed file is another LoRA."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kinema.engines.fake import FakeEngine
from kinema.engines.wan.lora import digests as digests_module
from kinema.engines.wan.lora import header as header_module
from kinema.engines.wan.lora import library as module
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.errors import InvalidRequest
from kinema.request.capabilities import LoraInfo
from tests.unit.engines.wan.lora.files import ONE, TWO, pair, write_lora


@pytest.fixture(autouse=True)
def _looks_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test does not wait for the second between two looks, and nothing is remembered of other tests."""
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_PAUSE_SHARE", 0)
    digests_module._sha256_of.cache_clear()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read for their digests, in this order."""
    names: list[str] = []
    actual = hashlib.file_digest

    def watched(file: object, kind: str) -> object:
        names.append(Path(file.name).name)  # type: ignore[attr-defined]
        return actual(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(digests_module.hashlib, "file_digest", watched)
    return names


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the library's thread brings about."""
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at
        os.sched_yield()


def names_of(loras: Sequence[LoraInfo]) -> list[str]:
    return [lora.name for lora in loras]


def until_listed(library: LoraLibrary, *names: str) -> tuple[LoraInfo, ...]:
    until(lambda: names_of(library.listed()) == list(names))
    until_idle(library)
    return library.listed()


def until_idle(library: LoraLibrary) -> None:
    """Until its thread has ended."""
    until(lambda: library._reader is None)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def set_age(path: Path, age_s: float) -> None:
    os.utime(path, (time.time() - age_s,) * 2)


def test_loras_are_listed_with_what_is_known_of_them(tmp_path: Path) -> None:
    """Once their digests are known; and whatever comes later, without a restart."""
    library = LoraLibrary(tmp_path, ONE)
    assert library.listed() == ()
    path = write_lora(tmp_path / "paper.safetensors", pair(rank=4), {"trigger_word": "paper"})
    (tmp_path / "paper.json").write_text(json.dumps({"scale": 0.7}), encoding="utf-8")
    (info,) = until_listed(library, "paper")
    size = path.stat().st_size
    assert info == LoraInfo(
        name="paper", digest=sha256(path), scale=0.7, trigger_words=("paper",), rank=4, size_bytes=size
    )
    write_lora(tmp_path / "clay.safetensors", pair())
    until_listed(library, "clay", "paper")
    path.unlink()
    until_listed(library, "clay")


def test_nothing_new_is_the_same_object(tmp_path: Path) -> None:
    """So that it costs nothing to ask often."""
    write_lora(tmp_path / "a.safetensors", pair())
    library, can = LoraLibrary(tmp_path, ONE), FakeEngine().capabilities
    loras = until_listed(library, "a")
    loras = library.listed()
    until_idle(library)
    assert library.listed() is loras
    added = library.added_to(can)
    assert added.loras == loras
    assert library.added_to(can) is added
    write_lora(tmp_path / "b.safetensors", pair(rank=3))
    until_listed(library, "a", "b")
    assert names_of(library.added_to(can).loras) == ["a", "b"]


def test_the_folder_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often somebody asks; a slow folder even less often."""
    now, looks, took = [100.0], [], [0.0]

    def look(folder: Path, check: Any) -> object:
        looks.append(now[0])
        now[0] += took[0]
        return scan(folder, check)

    scan = module.scan
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 1.0)
    monkeypatch.setattr(module, "_PAUSE_SHARE", 20)
    monkeypatch.setattr(module, "scan", look)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    library = LoraLibrary(tmp_path, ONE)

    def ask_at(*times: float) -> None:
        for at in times:
            now[0] = at
            library.listed()
            until_idle(library)

    ask_at(100.0, 100.9, 101.0, 101.5)
    assert looks == [100.0, 101.0]
    took[0] = 0.1
    ask_at(102.0, 104.0, 104.2)
    assert looks == [100.0, 101.0, 102.0, 104.2]


@pytest.mark.parametrize("second", ["a", "z"])
def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """To list the file and to compare it with the model, whether it fits or not, and whatever its partner is called."""
    opened: list[str] = []
    actual = header_module.read_header

    def watched(path: Path) -> object:
        opened.append(path.stem)
        return actual(path)

    monkeypatch.setattr(header_module, "read_header", watched)
    for name in ("alone", "first", second):
        write_lora(tmp_path / f"{name}.safetensors", pair())
    write_lora(tmp_path / "other.safetensors", pair(outs=12, ins=12))
    (tmp_path / "first.json").write_text(json.dumps({"second": f"{second}.safetensors"}), encoding="utf-8")
    library = LoraLibrary(tmp_path, TWO)
    until_listed(library, "alone", "first")
    library.described(["first"])
    assert sorted(opened) == sorted(["alone", "first", second, "other"])
    write_lora(tmp_path / "alone.safetensors", pair(rank=9))
    library.described(["alone"])
    assert opened[4:] == ["alone"]


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    """Of two files it is that of both digests, and a change of either is another LoRA."""
    high, low = (write_lora(tmp_path / f"{name}.safetensors", pair(rank=rank)) for name, rank in (("a", 2), ("b", 3)))
    (tmp_path / "a.json").write_text(json.dumps({"second": "b.safetensors"}), encoding="utf-8")
    library = LoraLibrary(tmp_path, TWO)
    (info,) = until_listed(library, "a")
    assert info.digest == hashlib.sha256((sha256(high) + sha256(low)).encode()).hexdigest()
    assert info.size_bytes == high.stat().st_size + low.stat().st_size
    write_lora(low, pair(rank=5))
    until(lambda: library.listed() != () and library.listed()[0].digest != info.digest)


@pytest.mark.parametrize("has_two_experts", [False, True])
def test_without_a_model_to_compare_with_a_second_file_needs_two_experts(tmp_path: Path, has_two_experts: bool) -> None:
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", pair())
    (tmp_path / "a.json").write_text(json.dumps({"second": "b.safetensors"}), encoding="utf-8")
    library = LoraLibrary(tmp_path, None, has_two_experts=has_two_experts)
    if has_two_experts:
        assert names_of(library.described(["a"])) == ["a"]
        return
    with pytest.raises(InvalidRequest, match="a cannot be used: it has a second file, which is for a model with two"):
        library.described(["a"])


def test_new_files_are_read_first_and_each_once(tmp_path: Path, read: list[str]) -> None:
    """An old folder of many gigabytes does not delay the LoRA that was just trained."""
    for age_s, name in enumerate(("new", "older", "oldest")):
        set_age(write_lora(tmp_path / f"{name}.safetensors", pair()), 1000.0 * age_s)
    library = LoraLibrary(tmp_path, ONE)
    until_listed(library, "new", "older", "oldest")
    library.listed()
    assert read == ["new.safetensors", "older.safetensors", "oldest.safetensors"]


def test_a_restart_reads_nothing_again(tmp_path: Path, read: list[str]) -> None:
    """The digests are kept in a file; that of a file that has changed is read anew."""
    folder, kept = tmp_path / "loras", tmp_path / "cache" / "digests.json"
    folder.mkdir()
    paths = [write_lora(folder / f"{name}.safetensors", pair()) for name in ("a", "b")]
    before = until_listed(LoraLibrary(folder, ONE, kept), "a", "b")
    digests_module._sha256_of.cache_clear()
    read.clear()
    assert LoraLibrary(folder, ONE, kept).listed() == before
    assert read == []
    write_lora(paths[0], pair(rank=7))
    after = until_listed(LoraLibrary(folder, ONE, kept), "a", "b")
    assert after[0].digest == sha256(paths[0]) != before[0].digest
    assert set(read) == {"a.safetensors"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"a": 1}', "\0", "[" * 100_000]
    + [json.dumps({"PATH": entry}) for entry in ({}, {"stamp": [1, 2], "sha256": "0" * 64}, {"sha256": "0" * 64})],
)
def test_a_damaged_file_of_digests_is_ignored(tmp_path: Path, content: str) -> None:
    """And written anew; one that cannot be written costs the next start its time, and nothing else."""
    folder, kept = tmp_path / "loras", tmp_path / "digests.json"
    folder.mkdir()
    path = write_lora(folder / "a.safetensors", pair())
    kept.write_text(content.replace("PATH", str(path)), encoding="utf-8")
    (info,) = until_listed(LoraLibrary(folder, ONE, kept), "a")
    assert info.digest == sha256(path)
    assert json.loads(kept.read_text(encoding="utf-8"))[str(path)]["sha256"] == info.digest


def test_digests_that_cannot_be_kept_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so."""
    folder = tmp_path / "loras"
    folder.mkdir()
    write_lora(folder / "a.safetensors", pair())
    (tmp_path / "file").touch()
    until_listed(LoraLibrary(folder, ONE, tmp_path / "file" / "digests.json"), "a")
    assert "the digests of LoRAs are not kept" in caplog.text


def test_a_file_that_is_not_usable_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its reason: one that does not fit the model, and one that is no LoRA. Another reason is logged anew."""
    write_lora(tmp_path / "big.safetensors", pair(outs=12, ins=12))
    (tmp_path / "old.pt").touch()
    library = LoraLibrary(tmp_path, ONE)
    for _ in range(3):
        assert library.listed() == ()
        until_idle(library)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "big.safetensors is for another model: its blocks.0.attn1.to_q has 12 inputs" in caplog.text
    assert "old.pt: it is a pickle" in caplog.text
    caplog.clear()
    write_lora(tmp_path / "big.safetensors", pair(outs=16, ins=16))
    library.listed()
    until_idle(library)
    (record,) = caplog.records
    assert "16 inputs" in record.getMessage()


def test_a_look_that_breaks_off_is_not_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was listed stays listed."""
    write_lora(tmp_path / "a.safetensors", pair())
    library = LoraLibrary(tmp_path, ONE)
    until_listed(library, "a")
    with monkeypatch.context() as broken:
        broken.setattr(module, "_RETRY_S", 0.0)
        broken.setattr(module, "scan", lambda _folder, _check: 1 / 0)
        until(lambda: bool(library.listed()) and "could not be looked at" in caplog.text)
        until_idle(library)
    write_lora(tmp_path / "b.safetensors", pair())
    until_listed(library, "a", "b")


def test_a_file_that_cannot_be_read_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again after a while, not without end."""
    set_age(write_lora(tmp_path / "a.safetensors", pair()), 1000)
    bad = write_lora(tmp_path / "bad.safetensors", pair())
    tries: list[Path] = []
    actual = digests_module._sha256_of

    def failing(path: Path, stamp: object) -> str:
        if path == bad:
            tries.append(path)
            raise InvalidRequest("the LoRA bad.safetensors cannot be read: Input/output error")
        return actual(path, stamp)  # type: ignore[arg-type]

    monkeypatch.setattr(digests_module, "_sha256_of", failing)
    library = LoraLibrary(tmp_path, ONE)
    for _ in range(3):
        until_listed(library, "a")
    assert (len(tries), caplog.text.count("Input/output error")) == (1, 1)


def test_a_request_gets_the_file_that_it_was_made_for(tmp_path: Path) -> None:
    """Or a sentence: it is gone, has changed, or cannot be used any more."""
    path = write_lora(tmp_path / "a.safetensors", pair(rank=4))
    library = LoraLibrary(tmp_path, ONE)
    (info,) = until_listed(library, "a")
    lora = library.file("a", info.digest)
    assert (lora.path, lora.only, lora.second) == (path, None, None)
    write_lora(path, pair(rank=5))
    with pytest.raises(InvalidRequest, match="the LoRA a is another file now than when the video was asked for"):
        library.file("a", info.digest)
    write_lora(path, pair(rank=4))
    assert library.file("a", info.digest).facts.rank == 4
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"the LoRA a cannot be used: a\.json cannot be read"):
        library.file("a", info.digest)
    (tmp_path / "a.json").unlink()
    write_lora(path, pair(outs=12, ins=12))
    with pytest.raises(InvalidRequest, match=r"the LoRA a cannot be used: .* is for another model"):
        library.file("a", info.digest)
    path.unlink()
    with pytest.raises(InvalidRequest, match="there is no LoRA 'a' here; there are none that can be used"):
        library.file("a", info.digest)


def test_a_command_reads_the_loras_that_it_needs(tmp_path: Path, read: list[str]) -> None:
    """Not the whole folder; a name that is none gets those that there are, though their digests are not known."""
    for name in ("a", "b", "c"):
        write_lora(tmp_path / f"{name}.safetensors", pair())
    library = LoraLibrary(tmp_path, ONE)
    assert list(library.names()) == ["a", "b", "c"]
    assert names_of(library.described(["b", "b"])) == ["b"]
    with pytest.raises(InvalidRequest, match="there is no LoRA 'x' here; there are 'a', 'b', 'c'"):
        library.described(["x"])
    assert read == ["b.safetensors"]
    assert LoraLibrary(tmp_path, ONE).described(["b"]) == library.described(["b"])
    assert read == ["b.safetensors"]


@pytest.mark.parametrize(
    ("sidecar", "prefix", "expected"),
    [
        ({}, "", "both"),
        ({"expert": "high_noise"}, "", "high_noise"),
        ({"expert": "low_noise"}, "", "low_noise"),
        ({"expert": "both"}, "", "both"),
        ({"second": "b.safetensors"}, "", "both"),
        ({}, "transformer.", "both"),
        ({}, "transformer_2.", "low_noise"),
    ],
)
def test_a_lora_says_which_expert_it_is_for(
    tmp_path: Path, sidecar: dict[str, str], prefix: str, expected: str
) -> None:
    """By its sidecar or its keys; of a model with one expert there is nothing to say."""
    for name in ("b", "c"):
        write_lora(tmp_path / f"{name}.safetensors", pair())
    write_lora(
        tmp_path / "a.safetensors", {f"{prefix}{key}": shape for key, shape in pair("blocks.0.attn1.to_q").items()}
    )
    (tmp_path / "a.json").write_text(json.dumps(sidecar), encoding="utf-8")
    assert LoraLibrary(tmp_path, TWO).described(["a"])[0].is_for == expected
    assert LoraLibrary(tmp_path, ONE).described(["c"])[0].is_for is None
