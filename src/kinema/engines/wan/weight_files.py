"""Which files have the weights of a component, and what a file is that has none. Needs no torch.

A component's folder has one file, or shards with or without an index. Beside them, or alone, it may have a variant in a
another type; the plain files come first, as in diffusers, then bf16, in which Wan was trained, then fp16 and fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinema.engines.wan.configs import ShardList, quoted, read_json, require, validated
from kinema.engines.wan.gguf_header import read_gguf_header
from kinema.engines.wan.safetensors_header import PICKLES, Header, foreign_kind, read_header
from kinema.errors import ConfigError

GGUF = ".gguf"
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".bf16", ".fp16", ".fp32")
_START_BYTES = 64


def files_in_folder(root: Path, component: str) -> list[Path]:
    """The component's file of weights, or all its shards. Raises ConfigError when one is missing, or is no such file.

    The files are not read: their first bytes tell a page or a pointer that was saved in the place of a file.
    """
    files = _find(root, component)
    for file in files:
        try:
            with file.open("rb") as opened:
                kind = foreign_kind(opened.read(_START_BYTES))
        except OSError as exc:
            raise ConfigError(f"the model folder {root}: {component}/{file.name} cannot be read: {exc}") from exc
        if kind is not None:
            raise ConfigError(f"the model folder {root}: {component}/{file.name} is {kind}")
    return files


def variant_of(file: Path) -> str | None:
    """The type that the name of a component's file says, as ``fp16``; None for a plain one."""
    parts = re.split(r"[.-]", file.name)
    return parts[1] if f".{parts[1]}" in _VARIANTS else None


def names_in_folder(root: Path, component: str) -> set[str]:
    """The names of the component's tensors: those that its files have, and its index names if it has one. Raises
    ConfigError as ``files_in_folder`` does, and OSError or DamagedFile."""
    files = files_in_folder(root, component)
    names = {name for file in files for name in read_header(file).entries}
    stem = files[0].name.split("-")[0]
    for path in (root / component).glob(f"{stem}.safetensors.index*.json") if len(files) > 1 else ():
        shard_list = f"{component}/{path.name}"
        names &= validated(ShardList, read_json(root, shard_list), root, shard_list).weight_map.keys()
    return names


def refuse_quantised(root: Path, component: str, config: dict[str, Any]) -> None:
    """Raises ConfigError for the config of a component whose weights are another library's quantised numbers."""
    found = config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    raise ConfigError(
        f"the model folder {root}: {component}/config.json: quantization_config says that the weights are quantised "
        f"by {quoted(method)}, which this engine does not read; give the model's own weights, or for a transformer an "
        "FP8 or GGUF file with engine.wan.transformer"
    )


def refuse_pickle(path: Path) -> None:
    """Raises ConfigError for a file whose name is that of a pickle."""
    if path.suffix.lower() in PICKLES:
        raise ConfigError(f"{path} is a pickle, which may run a program and is never opened; give it as .safetensors")


def header_of(path: Path) -> Header:
    """The header of a safetensors or GGUF file. Raises OSError or DamagedFile."""
    return read_gguf_header(path) if path.suffix.lower() == GGUF else read_header(path)


def _find(root: Path, component: str) -> list[Path]:
    for variant in _VARIANTS:
        for stem in _STEMS:
            if files := _of_stem(root, component, stem, variant):
                return files
    for path in sorted((root / component).glob("*")):
        refuse_pickle(path)
    name = f"{component}/{_STEMS[component.endswith('_encoder')]}.safetensors"
    require(root, name)
    return [root / name]


def _of_stem(root: Path, component: str, stem: str, variant: str) -> list[Path]:
    """The files with this beginning; none when there is no such file. Raises ConfigError when a shard is missing."""
    whole = root / component / f"{stem}{variant}.safetensors"
    if whole.is_file():
        return [whole]
    shard_list = f"{component}/{stem}.safetensors.index{variant}.json"
    if (root / shard_list).is_file():
        shards = validated(ShardList, read_json(root, shard_list), root, shard_list).weight_map.values()
        return [_shard(root, component, shard_list, shard) for shard in sorted(set(shards))]
    return list(_numbered(root, component, f"{stem}{variant}"))


def _numbered(root: Path, component: str, stem: str) -> Iterator[Path]:
    """Shards without an index, as ``model-00001-of-00003.safetensors``: all of the first one's number."""
    pattern = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-(\d{{5}})\.safetensors")
    names = sorted(path.name for path in (root / component).glob(f"{stem}-*.safetensors"))
    totals = [found[1] for found in map(pattern.fullmatch, names) if found is not None]
    for number in range(int(totals[0]) if totals else 0):
        name = f"{component}/{stem}-{number + 1:05}-of-{totals[0]}.safetensors"
        require(root, name, is_part=True)
        yield root / name


def _shard(root: Path, component: str, shard_list: str, shard: str) -> Path:
    if Path(shard).name != shard or shard == "..":
        raise ConfigError(f"the model folder {root}: {shard_list}: {quoted(shard)} is no file beside it")
    require(root, f"{component}/{shard}", is_part=True)
    return root / component / shard
