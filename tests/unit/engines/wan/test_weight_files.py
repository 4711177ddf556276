"""A component's files are found in each form in which they are published, and what is no such file is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.safetensors_header import DamagedFile
from kinema.engines.wan.weight_files import files_in_folder, header_of
from kinema.errors import ConfigError

STEM = "diffusion_pytorch_model"


def with_files(folder: Path, *names: str) -> Path:
    """A folder with a transformer whose files have these names; an index names the second and third of them."""
    (folder / "transformer").mkdir()
    for name in names:
        index = json.dumps({"weight_map": {"a": names[1], "b": names[2]}}) if name.endswith("json") else "{}"
        (folder / "transformer" / name).write_text(index, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([f"{STEM}.safetensors"], [0]),
        (["model.safetensors"], [0]),
        ([f"{STEM}.fp16.safetensors"], [0]),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.fp16.safetensors"], [0]),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], [1]),
        ([f"{STEM}.safetensors.index.json", "b.safetensors", "a.safetensors"], [2, 1]),
        ([f"{STEM}.safetensors.index.fp16.json", "a.safetensors", "b.safetensors"], [1, 2]),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"], [0, 1]),
        ([f"{STEM}.bf16-00001-of-00002.safetensors", f"{STEM}.bf16-00002-of-00002.safetensors"], [0, 1]),
        ([f"{STEM}.fp16.safetensors", "model-00001-of-00001.safetensors"], [1]),
    ],
)
def test_files_are_found(names: list[str], found: list[int], tmp_path: Path) -> None:
    """Plain ones before variants, of which bf16 comes first; shards with and without an index."""
    files = files_in_folder(with_files(tmp_path, *names), "transformer")
    assert [file.name for file in files] == [names[place] for place in found]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """Also without an index: each name says how many there are."""
    folder = with_files(tmp_path, f"{STEM}-00001-of-00003.safetensors", f"{STEM}-00003-of-00003.safetensors")
    with pytest.raises(ConfigError, match=f"transformer/{STEM}-00002-of-00003.safetensors is missing"):
        files_in_folder(folder, "transformer")


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.pt", "wan.ckpt", "wan.pth"])
def test_a_pickle_is_named_and_never_opened(name: str, tmp_path: Path) -> None:
    """In a folder, and as a transformer's file; its first bytes are not looked at either."""
    folder = with_files(tmp_path, name)
    (folder / "transformer" / name).chmod(0)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is a pickle, which may run a program and is never"):
        files_in_folder(folder, "transformer")
    with pytest.raises(ConfigError, match=r"engine\.wan\.transformer = .* is a pickle|is a pickle, which may run"):
        inspect("tiny-wan", files={"transformer": folder / "transformer" / name})


FOREIGN = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a page of HTML or XML": b"\n<!DOCTYPE html><html><body>Access denied</body></html>",
    "an archive of torch.save, a pickle": b"PK\x03\x04\x00\x00\x08\x08\x00\x00",
    "a pickle, which is never opened": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_only_has_the_name_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    """In a folder, as a transformer's file of either format, and by what reads headers."""
    folder = with_files(tmp_path, f"{STEM}.safetensors")
    file = folder / "transformer" / f"{STEM}.safetensors"
    file.write_bytes(FOREIGN[kind])
    with pytest.raises(ConfigError, match=f"transformer/{STEM}.safetensors is {kind}"):
        files_in_folder(folder, "transformer")
    for path in (file, tmp_path / "wan.gguf"):
        path.write_bytes(FOREIGN[kind])
        with pytest.raises(DamagedFile, match=f"{path.name} is {kind}"):
            header_of(path)
        with pytest.raises(ConfigError, match=rf"engine\.wan\.transformer = .* cannot be read: {path.name} is {kind}"):
            inspect("tiny-wan", files={"transformer": path})


def test_a_gguf_file_needs_its_ending(tmp_path: Path) -> None:
    """The ending says how a file is read."""
    (tmp_path / "wan.safetensors").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    with pytest.raises(ConfigError, match=r"wan\.safetensors is a GGUF file; give it a name that ends in \.gguf"):
        inspect("tiny-wan", files={"transformer": tmp_path / "wan.safetensors"})


def test_a_transformers_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """With what would be accepted."""
    with pytest.raises(
        ConfigError, match=r"engine\.wan\.transformer = .*: no such file; give a \.safetensors or \.gguf"
    ):
        inspect("tiny-wan", files={"transformer": tmp_path / "none.safetensors"})
