"""Where the values of the settings come from.

A value comes from, strongest first: a command-line flag, an environment variable (``KINEMA_SERVER_PORT``), the TOML
file, the default. Unknown keys stop the start.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from kinema.errors import ConfigError
from kinema.settings import Settings

CONFIG_FILE = Path("kinema.toml")
ENV_PREFIX = "KINEMA_"


class _Sources(BaseSettings):
    """Reads the environment as nested settings; the values are checked by Settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="_", env_nested_max_split=1, extra="allow"
    )
    data_dir: Any = None
    log_format: Any = None
    server: dict[str, Any] = {}
    jobs: dict[str, Any] = {}
    storage: dict[str, Any] = {}
    retention: dict[str, Any] = {}
    webhooks: dict[str, Any] = {}
    worker: dict[str, Any] = {}
    cluster: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    client: dict[str, Any] = {}


@dataclass(frozen=True)
class SettingRow:
    """One setting for ``kinema config``: its dotted key, value, where the value came from, and what it does."""

    key: str
    value: object
    origin: str
    description: str

    def __str__(self) -> str:
        """The value for people: a password in a URL is masked, before the host or in the query."""
        text = "" if self.value is None else str(self.value)
        text = re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", text)
        return re.sub(r"([?&](?:ssl)?password=)[^&#]*", r"\1***", text)


@dataclass(frozen=True)
class LoadedSettings:
    settings: Settings
    rows: tuple[SettingRow, ...]


def load_settings(flags: Mapping[str, object] | None = None, config_file: Path | None = None) -> LoadedSettings:
    """Merge flags (dotted keys; None means not given), environment, TOML file and defaults.

    ``config_file`` must exist when it is given; ``kinema.toml`` in the current folder is read when it is there.
    Raises ConfigError for an unknown key, a value that does not fit, or a file that cannot be read.
    """
    layers = {"flag": _given(flags or {}), "environment": _from_environment()}
    path = config_file or (CONFIG_FILE if CONFIG_FILE.exists() else None)
    if path is not None:
        layers[str(path)] = _flatten(_read_toml(path))
    merged: dict[str, object] = {}
    for layer in reversed(list(layers.values())):
        merged.update(layer)
    try:
        settings = Settings.model_validate(_nest(merged))
    except ValidationError as exc:
        raise ConfigError(_explain(exc, layers)) from exc
    return LoadedSettings(settings, tuple(_rows(settings, layers)))


def _given(flags: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in flags.items() if value is not None}


def _from_environment() -> dict[str, object]:
    source = EnvSettingsSource(_Sources)
    try:
        found = {key: value for key, value in source().items() if value not in (None, {})}
    except SettingsError as exc:
        raise ConfigError(f"environment: {exc}") from exc
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and not any(name == key or name.startswith(key + "_") for key in known):
            raise ConfigError(f"environment: unknown setting {name}; `kinema config` lists all of them")
    return _flatten(found)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"cannot read the settings in {path}: {reason}") from exc


def _flatten(nested: Mapping[str, Any]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _nest(flat: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if name:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def _rows(settings: Settings, layers: Mapping[str, Mapping[str, object]]) -> Iterator[SettingRow]:
    derived = {
        "storage.url": settings.storage_url,
        "jobs.database_url": settings.database_url,
        "cluster.file_dir": settings.transport.file_dir,
        "cluster.etcd_endpoints": settings.transport.etcd_endpoints,
        "engine.weights_cache_dir": settings.loading.weights_cache_dir,
    }
    for key, field, given in _fields(settings):
        value = derived.get(key) if given is None else given
        origin = next((name for name, layer in layers.items() if key in layer), "default")
        yield SettingRow(key, value, origin, field.description or "")


def _fields(settings: Settings) -> Iterator[tuple[str, FieldInfo, object]]:
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            for inner, inner_field in type(value).model_fields.items():
                yield f"{name}.{inner}", inner_field, getattr(value, inner)
        else:
            yield name, field, value


def _explain(exc: ValidationError, layers: Mapping[str, Mapping[str, object]]) -> str:
    error = exc.errors()[0]
    key = ".".join(str(part) for part in error["loc"])
    origin = next((name for name, layer in layers.items() if key in layer), "settings")
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown setting {key}; `kinema config` lists all of them"
    return f"{origin}: {key} = {error['input']!r}: {error['msg']}"
