"""Settings come from flags, environment, file and defaults, in this order, and nothing unknown passes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kinema.errors import ConfigError
from kinema.jobs.database import Database
from kinema.settings_sources import SettingRow, load_settings
from kinema.storage import Storage


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row(rows: tuple[SettingRow, ...], key: str) -> tuple[object, str]:
    return next((found.value, found.origin) for found in rows if found.key == key)


def test_the_strongest_source_wins_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flag > environment > file > default, each row saying which."""
    file = tmp_path / "k.toml"
    file.write_text('[server]\nport = 1\nhost = "a"\n[jobs]\nmax_queued = 3\n', encoding="utf-8")
    monkeypatch.setenv("KINEMA_SERVER_PORT", "2")
    monkeypatch.setenv("KINEMA_SERVER_HOST", "b")
    loaded = load_settings({"server.port": 3, "engine.model": None}, file)
    assert row(loaded.rows, "server.port") == (3, "flag")
    assert row(loaded.rows, "server.host") == ("b", "environment")
    assert row(loaded.rows, "jobs.max_queued") == (3, str(file))
    assert row(loaded.rows, "engine.model") == ("tiny-wan", "default")


def test_every_setting_says_what_it_does() -> None:
    """`kinema config` has a sentence for each."""
    rows = load_settings().rows
    assert len(rows) > 10
    assert all(found.description.endswith(".") for found in rows)


def test_the_file_in_the_current_folder_is_read(tmp_path: Path) -> None:
    """kinema.toml needs no flag."""
    (tmp_path / "kinema.toml").write_text('data_dir = "elsewhere"', encoding="utf-8")
    assert load_settings().settings.data_dir == Path("elsewhere")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("KINEMA_SERVER_PROT", "1", "unknown setting KINEMA_SERVER_PROT; did you mean KINEMA_SERVER_PORT?"),
        ("KINEMA_SERVERS", "1", "unknown setting KINEMA_SERVERS"),
        ("KINEMA_SERVER", "1", "KINEMA_SERVER is a group of settings, for instance KINEMA_SERVER_HOST"),
        ("KINEMA_WARP", "1", "unknown setting KINEMA_WARP; `kinema config` lists all settings"),
        ("KINEMA_SERVER_PORT", "x", "environment: KINEMA_SERVER_PORT = 'x'"),
        ("KINEMA_SERVER_PORT", "70000", "environment: KINEMA_SERVER_PORT = '70000'"),
        ("KINEMA_ENGINE_NAME", "warp", "environment: KINEMA_ENGINE_NAME = 'warp'"),
        ("KINEMA_ENGINE_WAN_GPUS", "0", "environment: KINEMA_ENGINE_WAN_GPUS = '0'"),
        ("KINEMA_ENGINE_GPUS", "2", "unknown setting KINEMA_ENGINE_GPUS; did you mean KINEMA_ENGINE_WAN_GPUS?"),
        ("KINEMA_ENGINE_WAN", "1", "KINEMA_ENGINE_WAN is a group of settings, for instance KINEMA_ENGINE_WAN_TRANSF"),
    ],
)
def test_a_bad_environment_stops_the_start(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names and values that do not fit are errors that name the key."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as stopped:
        load_settings()
    assert sentence in stopped.value.message


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script or a compose file may pass a variable on that nobody has set."""
    monkeypatch.setenv("KINEMA_SERVER_PORT", "")
    assert row(load_settings().rows, "server.port") == (8000, "default")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[server]\nprot = 1", "unknown setting server.prot; did you mean server.port?"),
        ("[sever]\nport = 1", "unknown setting sever.port; did you mean server.port?"),
        ("[sever]", "unknown setting sever; `kinema config` lists all settings"),
        ("[server.port]\nx = 1", "server.port = a table: a whole number is accepted"),
        ("port = 1", "unknown setting port;"),
        ("server = 1", "server is a group of settings, for instance server.host"),
        ("= broken", "cannot read the settings"),
        ("[engine]\nwan = 1", "engine.wan is a group of settings, for instance engine.wan.transformer"),
        ("[engine.wan]\ngpus = 0", "engine.wan.gpus = 0: a number of at least 1 is accepted"),
        ("[engine]\nloras = 'a'", "unknown setting engine.loras; did you mean engine.wan.loras?"),
        ("[engine]\nsglang_lora = 'a'", "unknown setting engine.sglang_lora; did you mean engine.sglang.lora?"),
        ("[engine.wam]\ngpus = 2", "unknown setting engine.wam.gpus; did you mean engine.wan.gpus?"),
        ("[engine.wam]", "unknown setting engine.wam; "),
        ("[jobs]\nmax_queued = 0", "jobs.max_queued = 0: a number of at least 1 is accepted"),
        ("[server]\napi_keys = [1]", "server.api_keys = ***: a list of keys, each a text without a comma, is accepted"),
        ("[server]\napi_keys = 'käse'", "server.api_keys = ***: keys of printable ASCII characters are accepted"),
        (
            "[server.keys.me]\nkey = 'käse'",
            "server.keys = ***: me.key: keys of printable ASCII characters are accepted",
        ),
    ],
)
def test_a_bad_file_stops_the_start(text: str, sentence: str, tmp_path: Path) -> None:
    """The file, the key and what would be right are named; a secret is not."""
    file = tmp_path / "bad.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as stopped:
        load_settings({}, file)
    assert str(file) in stopped.value.message
    assert sentence in stopped.value.message


def test_each_engine_has_a_section_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file, in the environment and as a flag."""
    (tmp_path / "kinema.toml").write_text("[engine.sglang]\ntp_size = 2\nlora = 'a'\n", encoding="utf-8")
    monkeypatch.setenv("KINEMA_ENGINE_SGLANG_LORA_SCALE", "0.5")
    loaded = load_settings({"engine.sglang.lora": "b"})
    given = loaded.settings.engine.sglang
    assert (given.tp_size, given.lora, given.lora_scale) == (2, "b", 0.5)
    assert row(loaded.rows, "engine.sglang.tp_size") == (2, "kinema.toml")
    assert row(loaded.rows, "engine.sglang.lora_scale") == (0.5, "environment")


@pytest.mark.parametrize("name", ["what?x=1", "a::b", "p#q", "x%20y", "a b", "100%", "{x}", "file:x", "é", "a:b@c"])
def test_any_data_folder_holds_what_is_its_own(name: str, tmp_path: Path) -> None:
    """Its path is part of two URLs, which give some letters a meaning. Nothing lies beside it."""
    settings = load_settings({"data_dir": tmp_path / name}).settings

    async def make() -> None:
        database = await Database.open(settings.database_url)
        await database.close()

    asyncio.run(make())
    artifact = Storage(settings.storage_url).put_bytes("videos/a/b.mp4", b"film", "video/mp4")
    assert b"".join(Storage(settings.storage_url).read(artifact.key)) == b"film"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in (tmp_path / name).iterdir()} == {"kinema.db", "files"}


def test_a_data_folder_that_is_no_text_is_refused() -> None:
    """No URL has it."""
    with pytest.raises(ConfigError, match=r"data_dir = .*: the name of a folder must be UTF-8"):
        load_settings({"data_dir": "\udcff"})
    with pytest.raises(ConfigError, match=r"data_dir = '': give the name of a folder"):
        load_settings({"data_dir": ""})


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    """Unlike ./kinema.toml."""
    with pytest.raises(ConfigError, match="absent"):
        load_settings({}, tmp_path / "absent.toml")


def test_all_mistakes_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each source, those in names and those in values."""
    (tmp_path / "kinema.toml").write_text("[sever]\nport = 1\n[jobs]\nmax_queued = 0\n", encoding="utf-8")
    monkeypatch.setenv("KINEMA_SERVER_PORT", "x")
    with pytest.raises(ConfigError) as stopped:
        load_settings({"engine.name": "warp"})
    head, *lines = stopped.value.message.splitlines()
    assert head == "4 settings are wrong"
    assert [line.strip().partition(":")[0] for line in lines] == ["environment", "flag", "kinema.toml", "kinema.toml"]


def test_names_of_a_model_are_names(tmp_path: Path) -> None:
    """Aliases by commas or as a list; a name that no request could have is refused."""
    for text in ('["one", "org/two"]', '"one, org/two,"'):
        (tmp_path / "kinema.toml").write_text(f"[engine]\naliases = {text}\n", encoding="utf-8")
        assert load_settings().settings.engine.alias_names == ("one", "org/two")
    for key, value in (("served_name", ""), ("served_name", " a"), ("served_name", "a\nb"), ("aliases", "a" * 301)):
        with pytest.raises(ConfigError, match=f"engine.{key} = .*: a name is 1 to 300 printable characters"):
            load_settings({f"engine.{key}": value})


def test_keys_may_be_a_list(tmp_path: Path) -> None:
    """A list is what one expects of TOML; commas work as well."""
    for text in ('["one", "two"]', '"one,two"'):
        (tmp_path / "kinema.toml").write_text(f"[server]\napi_keys = {text}\n", encoding="utf-8")
        assert load_settings().settings.server.api_keys.get_secret_value() == "one,two"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@db/kinema", "postgresql://me:***@db/kinema"),
        ("postgresql:///kinema?user=me&password=secret", "postgresql:///kinema?user=me&password=***"),
        (
            "postgresql://me:secret@db/kinema?sslpassword=secret&sslkey=key.pem",
            "postgresql://me:***@db/kinema?sslpassword=***&sslkey=key.pem",
        ),
    ],
)
def test_a_password_is_masked_when_shown(url: str, shown: str) -> None:
    """`kinema config` may be pasted into a ticket."""
    rows = load_settings({"jobs.database_url": url}).rows
    assert next(str(found) for found in rows if found.key == "jobs.database_url") == shown


def test_a_cluster_needs_no_settings_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local etcd, or the one that ETCD_ENDPOINTS names; files in the data folder. `kinema config` shows both."""
    monkeypatch.delenv("ETCD_ENDPOINTS", raising=False)
    loaded = load_settings({"data_dir": "data"})
    folder = Path.cwd() / "data" / "discovery"
    assert (loaded.settings.transport.etcd_endpoints, loaded.settings.transport.file_dir) == (
        "http://127.0.0.1:2379",
        folder,
    )
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://etcd:2379")
    assert row(load_settings().rows, "cluster.etcd_endpoints") == ("http://etcd:2379", "default")
    assert row(loaded.rows, "cluster.file_dir") == (folder, "default")
    given = load_settings({"cluster.etcd_endpoints": "http://other:2379", "cluster.file_dir": "/run/kinema"})
    assert given.settings.transport.etcd_endpoints == "http://other:2379"
    assert given.settings.transport.file_dir == Path("/run/kinema")


def test_copies_of_weights_are_in_the_data_folder(tmp_path: Path) -> None:
    """Unless a folder is given; the row says which one it is."""
    loaded = load_settings({"data_dir": tmp_path})
    folder = tmp_path.resolve() / "weights-cache"
    assert loaded.settings.loading.weights_cache_dir == folder
    assert row(loaded.rows, "engine.weights_cache_dir") == (folder, "default")
    given = load_settings({"engine.weights_cache_dir": tmp_path / "copies"})
    assert given.settings.loading.weights_cache_dir == tmp_path / "copies"


def test_compiled_kernels_are_in_the_data_folder(tmp_path: Path) -> None:
    """Unless a folder is given; the row says which one it is."""
    loaded = load_settings({"data_dir": tmp_path})
    assert loaded.settings.loading.kernels_dir == tmp_path.resolve() / "kernels"
    assert row(loaded.rows, "engine.kernels_dir") == (tmp_path.resolve() / "kernels", "default")
    given = load_settings({"engine.kernels_dir": tmp_path / "other"})
    assert given.settings.loading.kernels_dir == tmp_path / "other"


@pytest.mark.parametrize(
    ("given", "num_keys", "limits"),
    [
        ({}, 0, (None, None)),
        ({}, 1, (None, None)),
        ({}, 3, (33, None)),
        ({"max_queued_s": 600}, 3, (33, 200)),
        # A tenth at least.
        ({"max_queued_s": 600}, 50, (10, 60)),
        ({"max_queued": 1}, 2, (1, None)),
        ({"max_queued_per_key": 70, "max_queued_s_per_key": 5}, 3, (70, 5)),
    ],
)
def test_each_key_has_a_share_of_the_queue(
    given: dict[str, float], num_keys: int, limits: tuple[int | None, float | None]
) -> None:
    """By default the same for each of them; a limit that is set stays."""
    keys = ",".join(f"key-{number}" for number in range(num_keys))
    found = load_settings({"server.api_keys": keys, **{f"jobs.{name}": value for name, value in given.items()}})
    queue = found.settings.queue
    assert (queue.max_queued_per_key, queue.max_queued_s_per_key) == (limits[0], pytest.approx(limits[1]))


def test_keys_have_names_and_limits_in_the_file(tmp_path: Path) -> None:
    """`kinema config` shows the names alone, and a mistake is told with its place and without the key."""
    file = tmp_path / "keys.toml"
    file.write_text('[server.keys.alice]\nkey = "hunter2"\nmax_queued = 3\n[server.keys.bob]\nkey = ["x", "y"]\n')
    loaded = load_settings(config_file=file)
    alice, bob = loaded.settings.server.keys.values()
    assert (alice.keys, alice.max_queued, alice.max_gb, bob.keys) == (("hunter2",), 3, None, ("x", "y"))
    assert row(loaded.rows, "server.keys") == ("alice,bob", str(file))
    assert row(load_settings().rows, "server.keys") == ("", "default")
    file.write_text('[server.keys.alice]\nkey = "hunter2"\nmax_queued = "hunter2"\n')
    with pytest.raises(ConfigError) as stopped:
        load_settings(config_file=file)
    assert "server.keys = ***: alice.max_queued: " in stopped.value.message
    assert "hunter2" not in stopped.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server.keys.me]", "server.keys = ***: me.key: it is missing"),
        ("[server.keys]\nme = 'a'", "server.keys = ***: me: a table of settings is accepted"),
        ("[server]\nkeys = 5", "server.keys = ***: a table of settings is accepted"),
        ("[server.keys.me]\nkey = 'a'\nkeyy = 'b'", "server.keys = ***: me.keyy: there is no such setting"),
        (
            "[server.keys.me]\nkey = 'a'\nmax_queued = 'x'",
            "server.keys = ***: me.max_queued: a whole number is accepted",
        ),
        ("[server.keys.me]\nkey = 'a'\nmax_queued = 0", "me.max_queued: a number of at least 1 is accepted"),
        ("[server.keys.me]\nkey = 'a'\nmax_gb = 0", "me.max_gb: a number above 0.0 is accepted"),
        ("[server]\nport = 'x'", "server.port = 'x': a whole number is accepted"),
        ("[server]\nport = 70000", "server.port = 70000: a number of at most 65535 is accepted"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_accepted(tmp_path: Path, text: str, says: str) -> None:
    """In our words."""
    file = tmp_path / "wrong.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as stopped:
        load_settings(config_file=file)
    assert says in stopped.value.message


def test_keys_with_names_stand_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is refused, without what is in it."""
    monkeypatch.setenv("KINEMA_SERVER_KEYS", "alice=hunter2")
    with pytest.raises(ConfigError) as stopped:
        load_settings()
    assert "[server.keys.NAME]" in stopped.value.message
    assert "hunter2" not in stopped.value.message
