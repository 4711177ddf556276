"""What a model folder has in the place of a missing file: the same file under another name, or another layout."""

from __future__ import annotations

from pathlib import Path

_MAX_NAMED = 3
# Weights of all kinds stand for each other; a text file is the same one only under its own name.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_TOKENIZERS = (".model", ".vocab")
_INDEX = "model_index.json"


def similar_files(root: Path, name: str) -> list[str]:
    """Up to three files that may be meant for ``name``, by their paths in ``root``; none when nothing is like it.

    These are a file whose name differs in small and large letters, weights with other names, and for the index of the
    whole folder one in a folder below, or the weights of another layout.
    """
    wanted = root / name
    beside = _files(_folder(wanted.parent))
    like = [path for path in beside if _is_like(path, wanted)]
    if name == _INDEX:
        like = [*like, *sorted(root.glob(f"*/{_INDEX}")), *(path for path in beside if path.suffix in _WEIGHTS)]
    named = [path.relative_to(root).as_posix() for path in like[:_MAX_NAMED]]
    return [*named, "..."] if len(like) > _MAX_NAMED else named


def _folder(folder: Path) -> Path:
    """The folder, or one beside it whose name differs in small and large letters, or in ``-`` and ``_``."""
    if folder.is_dir() or not folder.parent.is_dir():
        return folder
    return next((one for one in sorted(folder.parent.iterdir()) if _plain(one.name) == _plain(folder.name)), folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _is_like(path: Path, wanted: Path) -> bool:
    if _plain(path.name) == _plain(wanted.name):
        return True
    suffix = path.suffix.lower()
    if wanted.suffix in _WEIGHTS:
        return suffix in _WEIGHTS
    return wanted.name == "tokenizer.json" and suffix in _TOKENIZERS


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
