"""What a LoRA file says of itself in its header, without a model: its format, rank, transformers and trigger words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.engines.wan.lora.keys import FIRST, Key, other_kind_of, parse_key
from kinema.engines.wan.safetensors_header import PICKLES, DamagedFile, Header, is_pickle, read_header
from kinema.errors import InvalidRequest
from kinema.request.json_text import parse_file

_TRIGGER_KEYS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase")
_MAX_TRIGGER_WORDS, _MAX_TRIGGER_CHARS = 20, 200
# A message names so many keys, each up to a length.
_MAX_TOLD, _MAX_TOLD_CHARS = 3, 100


@dataclass(frozen=True)
class LoraFacts:
    """What the header of a LoRA file says.

    ``rank`` is the largest of its layers, 0 when it has whole weights alone. ``components`` are the transformers that
    it is for, by the names of their folders; none when it does not say. It says so for a model with two experts only.
    """

    format: str
    rank: int
    components: tuple[str, ...]
    trigger_words: tuple[str, ...]


def open_header(path: Path) -> Header:
    """The header of a LoRA file. Raises InvalidRequest for a pickle, and for a damaged or unreadable file."""
    if path.suffix.lower() in PICKLES:
        raise InvalidRequest(f"the LoRA {path.name} is a pickle, which can run code; only .safetensors files are read")
    try:
        if not path.is_file():
            raise InvalidRequest(f"the LoRA {path.name} is no file")
        return read_header(path)
    except DamagedFile as exc:
        if _has_pickle(path):
            raise InvalidRequest(
                f"the LoRA {path.name} is a pickle under another name, which can run code; only safetensors are read"
            ) from exc
        raise InvalidRequest(f"the LoRA cannot be read: {exc}") from exc
    except OSError as exc:
        raise InvalidRequest(f"the LoRA {path.name} cannot be read: {exc.strerror}") from exc


def _has_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return is_pickle(file.read(8))


def facts_of(file: str, header: Header) -> LoraFacts:
    """What the header says of the LoRA. Raises InvalidRequest when it is none, or one of another kind."""
    keys = parse_keys(file, header)
    shapes = [header.entries[text].shape for text, key in keys.items() if key.kind == "down"]
    return LoraFacts(
        format=Counter(key.format for key in keys.values()).most_common(1)[0][0],
        rank=max((shape[0] for shape in shapes if shape), default=0),
        components=tuple(sorted(name for name in by_component(keys) if name is not None)),
        trigger_words=_trigger_words(header.metadata),
    )


def parse_keys(file: str, header: Header) -> dict[str, Key]:
    """What each key says. Raises InvalidRequest when one is no LoRA's, or that of another kind of adapter."""
    for text in header.entries:
        if kind := other_kind_of(text):
            raise InvalidRequest(
                f"the LoRA {file} is a {kind} ({quoted(text)}), which is not supported; give a plain LoRA"
            )
    found = {text: parse_key(text) for text in header.entries}
    keys = {text: key for text, key in found.items() if key is not None}
    if not keys:
        has = f"it has {told(found)}" if found else "it has no tensors"
        raise InvalidRequest(f"{file} is no LoRA: none of its tensors is a lora_A, lora_down or diff; {has}")
    if strange := [text for text, key in found.items() if key is None]:
        raise InvalidRequest(f"the LoRA {file} has tensors that are no part of a LoRA: {told(strange)}")
    return keys


def by_component(keys: Mapping[str, Key]) -> dict[str | None, dict[str, Key]]:
    """The keys by the transformer that they are for.

    It is None for all of them when they name none. Where some name one, the others are for the first transformer.
    """
    default = FIRST if any(key.component is not None for key in keys.values()) else None
    found: dict[str | None, dict[str, Key]] = {}
    for text, key in keys.items():
        found.setdefault(key.component or default, {})[text] = key
    return found


def _trigger_words(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The words by which a prompt calls what the LoRA was trained for: those of the first key that has any."""
    for value in (metadata.get(key) for key in _TRIGGER_KEYS):
        if isinstance(value, str) and value.strip():
            short = [word.strip()[:_MAX_TRIGGER_CHARS] for word in _listed(value)]
            return tuple(dict.fromkeys(word for word in short if word))[:_MAX_TRIGGER_WORDS]
    return ()


def _listed(value: str) -> list[str]:
    """The texts of a JSON list, or those between commas."""
    try:
        values = parse_file(value) if value.lstrip().startswith("[") else None
    except InvalidRequest:
        values = None
    return [word for word in values if isinstance(word, str)] if isinstance(values, list) else value.split(",")


def told(texts: Iterable[str]) -> str:
    """The first names, and how many there are beside them."""
    names = list(texts)
    more = f" and {len(names) - _MAX_TOLD:,} more" if len(names) > _MAX_TOLD else ""
    return ", ".join(map(quoted, names[:_MAX_TOLD])) + more


def quoted(value: object) -> str:
    """A name or value of a file, as a sentence has it."""
    text = ascii(value)
    return text if len(text) <= _MAX_TOLD_CHARS else f"{text[:_MAX_TOLD_CHARS]}..."
