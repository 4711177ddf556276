"""Whether a checkpoint's folder ``tokenizer`` can be read here. Imports none of the libraries that read it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from kinema.engines.wan.configs import require
from kinema.engines.wan.safetensors_header import START_BYTES, in_place_of_file
from kinema.errors import ConfigError

READY, CONVERTED = "tokenizer.json", "spiece.model"
# transformers converts a SentencePiece model with these. Without one of them it takes the file for one of tiktoken.
_PACKAGES = {"transformers": "transformers", "sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
# That of UMT5 has 17 MB, and is read as a whole.
_MAX_BYTES = 128 * 2**20


def check_tokenizer(root: Path) -> None:
    """Raises ConfigError when a file is missing or too large, or when a package is that its file needs."""
    require(root, "tokenizer/tokenizer_config.json")
    found = [f"tokenizer/{name}" for name in (READY, CONVERTED) if (root / "tokenizer" / name).is_file()]
    if not found:
        require(root, f"tokenizer/{READY}")
    for name in found:
        if (root / name).stat().st_size > _MAX_BYTES:
            raise ConfigError(f"the model folder {root}: {name} is larger than {_MAX_BYTES // 2**20} MiB")
        with (root / name).open("rb") as file:
            if kind := in_place_of_file(file.read(START_BYTES)):
                raise ConfigError(f"the model folder {root}: {name} is {kind}")
    refuse_unconverted(root, "tokenizer")


def refuse_unconverted(root: Path, component: str) -> None:
    """Raises ConfigError for a folder with a SentencePiece model alone where a package that converts it is missing."""
    folder = root / component
    if (folder / READY).is_file() or not (folder / CONVERTED).is_file():
        return
    if missing := [package for module, package in _PACKAGES.items() if not _is_installed(module)]:
        raise ConfigError(
            f"the model folder {root}: {component} has {CONVERTED} and no {READY}, and what converts it is not "
            f"installed; pip install {' '.join(missing)}"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # of the package around it; or the module is None in sys.modules
        return False
