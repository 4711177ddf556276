"""No secret of a setting is shown, whatever else the text has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kinema.cli.app import app
from kinema.errors import ConfigError
from kinema.jobs.database import Database
from kinema.masking import masked, without_secrets
from kinema.settings_sources import load_settings
from kinema.storage import Storage


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db/kinema", "postgresql://me:***@db/kinema"),
        ("postgresql://me:s@ec/r?et@db/kinema", "postgresql://me:***@db/kinema"),
        ("postgresql://me:a secret@db/kinema?password=secret", "postgresql://me:***@db/kinema?password=***"),
        (
            "postgresql:///kinema?user=me&passfile=secret&sslmode=require",
            "postgresql:///kinema?user=me&passfile=***&sslmode=require",
        ),
        ("postgresql:///kinema?secret", "postgresql:///kinema?***"),
        ("s3://KEY:SE/CR+ET@bucket/videos", "s3://KEY:***@bucket/videos"),
        (
            "https://hooks.example/kinema?token=secret&sig=secret#secret",
            "https://hooks.example/kinema?token=***&sig=***",
        ),
        ("https://secret@hooks.example/kinema", "https://***@hooks.example/kinema"),
        ("me:secret@127.0.0.1:8000", "me:***@127.0.0.1:8000"),
        ("http://me:secret@a:2379,http://me:secret@b:2379", "http://me:***@a:2379,http://me:***@b:2379"),
    ],
)
def test_secrets_of_urls_are_masked(text: str, shown: str) -> None:
    """A password, quoted or not, and every parameter that is not known to be harmless."""
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "file:///srv/videos",
        "sqlite:////srv/kinema.db",
        "postgresql://me@db:5432/kinema?host=/run/postgresql&connect_timeout=5",
        "abfs://container@account.dfs.core.windows.net/videos",
        "s3://bucket/a folder",
        "http://127.0.0.1:8000",
        "tiny-wan",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """So that a person sees what is set."""
    assert masked(text) == text


def test_words_that_are_secrets_are_masked_in_a_sentence() -> None:
    """As whole words, the longest first."""
    assert without_secrets('option "pass" of pass-word, not passing', ["pass", "pass-word"]) == (
        'option "***" of ***, not passing'
    )


# Settings that may hold a secret, and what is shown of each.
SECRETS = {
    "server.api_keys": "hunter2-one,hunter2-two",
    "webhooks.secret": "hunter2",
    "client.api_key": "hunter2",
    "webhooks.url": "https://hooks.example/kinema?token=hunter2",
    "client.url": "http://me:hunter2@127.0.0.1:8000",
    "server.public_url": "https://me:hunter2@videos.example",
    "jobs.database_url": "postgresql://me:hunter2@db/kinema?sslpassword=hunter2",
    "storage.url": "s3://KEY:hunter2@bucket/videos",
    "storage.public_url": "https://videos.example/?sig=hunter2",
    "cluster.etcd_endpoints": "http://me:hunter2@etcd:2379,http://me:hunter2@etcd2:2379",
    "engine.model": "https://me:hunter2@hub.example/wan",
}


@pytest.fixture
def with_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in SECRETS.items():
        monkeypatch.setenv(f"KINEMA_{key.replace('.', '_').upper()}", value)


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.usefixtures("with_secrets")
def test_kinema_config_shows_no_secret(form: list[str]) -> None:
    """In lines and as JSON; every setting that has one is there."""
    shown = CliRunner().invoke(app, ["config", *form]).stdout
    if form:
        values = {row["key"]: row["value"] for row in json.loads(shown)}
    else:
        values = {key: value for key, value, *_ in (line.split("\t") for line in shown.splitlines())}
    assert all(values[key] and "hunter2" not in values[key] for key in SECRETS)


@pytest.mark.parametrize("key", SECRETS)
def test_a_setting_of_the_wrong_kind_is_not_quoted(key: str, tmp_path: Path) -> None:
    """A list, a table, or a list in a list, where a text belongs: the file and the key are named."""
    section, _, name = key.partition(".")
    text = json.dumps(SECRETS[key])
    file = tmp_path / "kinema.toml"
    for value in (f"[{text}, [{text}]]", f"{{a = {text}}}", f"[{{a = [{text}]}}]"):
        file.write_text(f"[{section}]\n{name} = {value}\n", encoding="utf-8")
        with pytest.raises(ConfigError) as stopped:
            load_settings({}, file)
        assert f"{file}: {key} = " in stopped.value.message
        assert "hunter2" not in stopped.value.message


@pytest.mark.parametrize(
    "text", ['api_keys = ["hunter2"', 'api_keys = "hunter2\n', "api_keys = 'hunter2' 'hunter2'", "x = hunter2"]
)
def test_a_file_that_cannot_be_read_is_not_quoted(text: str, tmp_path: Path) -> None:
    """The line and the column are enough."""
    file = tmp_path / "kinema.toml"
    file.write_text(f"[server]\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as stopped:
        load_settings({}, file)
    assert "hunter2" not in stopped.value.message


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hunter2@bucket/videos",
        "s3://KEY:hun/ter2@bucket",
        "gs://KEY:hunter2@bucket",
        "az://KEY:hunter2@container",
        "s4://KEY:hunter2@bucket",
        "s4://bucket?token=hunter2",
        "https://me:hunter2@host/videos",
    ],
)
def test_the_url_of_a_storage_is_not_quoted_with_its_secret(url: str) -> None:
    """The start is refused in a sentence, since no storage reads a key in its URL."""
    with pytest.raises(ConfigError, match=r"storage\.url = ") as stopped:
        Storage(url)
    for part in ("hunter2", "hun/ter2", "ter2@"):
        assert part not in stopped.value.message


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "mysql://me:hunter2@127.0.0.1/kinema",
        "postgresql://me:hunter2@127.0.0.1:hunter2/kinema",
        "postgresql://me:hun@ter2@127.0.0.1:1/kinema",
        "postgresql://me:hunter2@127.0.0.1:1/kinema",
        "postgresql://me:hunter2@127.0.0.1:1/kinema?connect_timeout=1&password=hunter2",
        "postgresql://127.0.0.1:1/kinema?gssencmode=hunter2",
        "postgresql://127.0.0.1:1/kinema?nothing=hunter2",
    ],
)
async def test_the_url_of_a_database_is_not_quoted_with_its_secret(url: str) -> None:
    """Neither by us nor by the driver."""
    with pytest.raises(ConfigError, match=r"jobs\.database_url") as stopped:
        await Database.open(url)
    assert "hunter2" not in stopped.value.message
    assert "ter2@" not in stopped.value.message
