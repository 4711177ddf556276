"""Where the values of the settings come from.

A value comes from, strongest first: a command-line flag, an environment variable (``KINEMA_SERVER_PORT``), the TOML
file, the default. An environment variable that is empty counts as not set. Every mistake in the flags, the environment
and the file is reported at once, and stops the start.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kinema.errors import ConfigError
from kinema.masking import MASK, masked, masked_value
from kinema.settings import KeySettings, Settings

CONFIG_FILE = Path("kinema.toml")
ENV_PREFIX = "KINEMA_"
# By pydantic's names of errors.
_ACCEPTED = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such setting",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number is accepted"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number is accepted"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false is accepted"),
    "string_type": "a text is accepted",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a table of settings is accepted"),
    "greater_than": "a number above {gt} is accepted",
    "greater_than_equal": "a number of at least {ge} is accepted",
    "less_than": "a number below {lt} is accepted",
    "less_than_equal": "a number of at most {le} is accepted",
    "literal_error": "{expected} is accepted",
}


@dataclass(frozen=True)
class SettingRow:
    """One setting for ``kinema config``: its dotted key, value, where the value came from, and what it does."""

    key: str
    value: object
    origin: str
    description: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return _variable(self.key)

    @property
    def plain(self) -> object:
        """The value as JSON has it; a secret is masked, and a number that JSON does not have is text."""
        is_number = isinstance(self.value, int | float) and math.isfinite(self.value)
        return self.value if self.value is None or is_number else str(self)

    def __str__(self) -> str:
        """The value for people, with its secrets masked."""
        return "" if self.value is None else masked(str(self.value))


@dataclass(frozen=True)
class LoadedSettings:
    """The settings, and a row about each for ``kinema config``."""

    settings: Settings
    rows: tuple[SettingRow, ...]


@dataclass(frozen=True)
class _Source:
    """The values that one source gives, by dotted key. ``written`` makes of a key the name that a person wrote."""

    name: str
    values: Mapping[str, object]
    written: Callable[[str], str] = str


def load_settings(flags: Mapping[str, object] | None = None, config_file: Path | None = None) -> LoadedSettings:
    """Merge flags (dotted keys; None means not given), environment, TOML file and defaults.

    ``config_file`` must exist when it is given; ``kinema.toml`` in the current folder is read when it is there.
    Raises ConfigError for unknown keys, values that do not fit, or a file that cannot be read.
    """
    sources = [_Source("flag", {key: value for key, value in (flags or {}).items() if value is not None})]
    sources.append(_Source("environment", _from_environment(), _variable))
    path = config_file or (CONFIG_FILE if CONFIG_FILE.exists() else None)
    if path is not None:
        sources.append(_Source(str(path), _flatten(_read_toml(path))))
    mistakes = [mistake for source in sources for mistake in _unknown(source)]
    settings, wrong = _validated(sources)
    mistakes += wrong
    if settings is None or mistakes:
        raise ConfigError(_listed(mistakes))
    return LoadedSettings(settings, tuple(_rows(settings, sources)))


def _validated(sources: list[_Source]) -> tuple[Settings | None, list[str]]:
    """The settings, or a sentence for each value that does not fit. Keys that do not exist are left out."""
    merged = {key: value for source in reversed(sources) for key, value in source.values.items() if key in _FIELDS}
    try:
        return Settings.model_validate(_nest(merged)), []
    except ValidationError as exc:
        return None, [_misfit(error["loc"], _told(error), sources) for error in exc.errors(include_url=False)]


def _told(error: ErrorDetails) -> str:
    """What would be accepted in place of a value. Our own validators say it themselves."""
    said = _ACCEPTED.get(error["type"])
    return error["msg"].removeprefix("Value error, ") if said is None else said.format(**error.get("ctx", {}))


def _misfit(place: tuple[int | str, ...], message: str, sources: list[_Source]) -> str:
    path = [".".join(map(str, place[:length])) for length in range(1, len(place) + 1)]
    key = next((key for key in path if key in _FIELDS), path[-1])
    source = next((source for source in sources if key in source.values), None)
    if source is None:
        return f"settings: {key}: {message}"
    value = MASK if _is_secret(_FIELDS[key]) else masked_value(source.values[key])
    inner = ".".join(str(part) for part in place[2:]) if isinstance(source.values[key], Mapping) else ""
    message = f"{inner}: {message}" if inner else message
    return f"{source.name}: {source.written(key)} = {value}: {message}"


def _is_secret(field: FieldInfo) -> bool:
    parts = (field.annotation, *get_args(field.annotation))
    return SecretStr in parts or KeySettings in parts


def _unknown(source: _Source) -> Iterator[str]:
    """A sentence for each key of the source that is no setting, with the setting that was probably meant."""
    for key in source.values.keys() - _FIELDS.keys():
        written = source.written(key)
        if key in _SECTIONS:
            yield f"{source.name}: {written} is a group of settings, for instance {source.written(_first_of(key))}"
            continue
        close = get_close_matches(key, _FIELDS, n=1, cutoff=0.75)
        hint = f"did you mean {source.written(close[0])}?" if close else "`kinema config` lists all settings"
        yield f"{source.name}: unknown setting {written}; {hint}"


def _listed(mistakes: list[str]) -> str:
    """One mistake as a sentence, several as a list."""
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n  ".join([f"{len(mistakes)} settings are wrong", *sorted(mistakes)])


def _from_environment() -> dict[str, object]:
    """The values of ``KINEMA_...`` by dotted key; a name that fits no key is kept as it is, in small letters."""
    found: dict[str, object] = {}
    for name, value in os.environ.items():
        if name.upper().startswith(ENV_PREFIX) and value:
            found[_key_of(name[len(ENV_PREFIX) :].lower())] = value
    return found


def _key_of(name: str) -> str:
    """The dotted key that ``server_port`` means; the section is the longest that fits."""
    for section in sorted(_SECTIONS, key=len, reverse=True):
        start = section.replace(".", "_")
        if name == start:
            return section
        if name.startswith(f"{start}_"):
            return f"{section}.{name.removeprefix(start)[1:]}"
    return name


def _variable(key: str) -> str:
    return ENV_PREFIX + key.replace(".", "_").upper()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"cannot read the settings in {path}: {reason}") from exc


def _flatten(nested: Mapping[str, Any], section: str = "") -> dict[str, object]:
    """Values by dotted key. An empty table of a name that does not exist is kept, so that it is reported."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        key = f"{section}{name}"
        if isinstance(value, Mapping) and (value or key in _SECTIONS) and key not in _FIELDS:
            flat.update(_flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def _nest(flat: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


def _rows(settings: Settings, sources: list[_Source]) -> Iterator[SettingRow]:
    derived = {
        "storage.url": settings.storage_url,
        "jobs.database_url": settings.database_url,
        "cluster.file_dir": settings.transport.file_dir,
        "cluster.etcd_endpoints": settings.transport.etcd_endpoints,
        "engine.weights_cache_dir": settings.loading.weights_cache_dir,
        "engine.kernels_dir": settings.loading.kernels_dir,
    }
    for key, field in _FIELDS.items():
        given = attrgetter(key)(settings)
        value = derived.get(key) if given is None else given
        if isinstance(value, Mapping):
            value = ",".join(value)  # the names are enough
        origin = next((source.name for source in sources if key in source.values), "default")
        yield SettingRow(key, value, origin, field.description or "")


def _fields(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted key."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _first_of(section: str) -> str:
    return next(key for key in _FIELDS if key.startswith(f"{section}."))


def _sections(key: str) -> Iterator[str]:
    """``a`` and ``a.b`` of ``a.b.c``."""
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


_FIELDS = dict(_fields())
_SECTIONS = {section for key in _FIELDS for section in _sections(key)}
