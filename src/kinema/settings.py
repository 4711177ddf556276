"""Every setting of Kinema, once: its name, type, default and what it does.

``settings_sources.py`` says where the values come from. Only these two files read the environment.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

DEFAULT_MODEL = "tiny-wan"
DEFAULT_ETCD = "http://127.0.0.1:2379"
# The part of the queue that one of many API keys may fill: less would refuse keys while the queue is nearly empty.
_LEAST_SHARE = 0.1


# A job remembers a key with a name by this and the name; one without a name by a digest, which has no colon.
_NAMED_KEY = "name:"
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,48}", re.ASCII)
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*", re.ASCII)
# A manifest has a model's name, and takes none that is longer.
_MAX_NAME_CHARS = 300


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _joined(value: object) -> object:
    """TOML may give names as a list."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(name, str) for name in value):
        raise ValueError("a list of texts is accepted")
    return ",".join(value)


def _separated(names: str) -> tuple[str, ...]:
    return tuple(name for name in map(str.strip, names.split(",")) if name)


def _changed(section: _Section) -> list[str]:
    """The fields of a section that are not at their defaults."""
    fields = type(section).model_fields
    return [name for name, field in fields.items() if getattr(section, name) != field.default]


def sqlite_url(path: Path) -> str:
    """The SQLAlchemy URL of an SQLite file: its path is quoted, so that no part of it is taken for a query."""
    return f"sqlite:///{quote(os.fsencode(path))}"


def _require_name(name: str) -> None:
    """Raises ValueError for a name that no request, line or table could have."""
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= _MAX_NAME_CHARS:
        raise ValueError(f"a name is 1 to {_MAX_NAME_CHARS} printable characters, without spaces at its ends")


def _one_line_of_keys(value: object) -> object:
    """TOML may give API keys as a list."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(key, str) and key.strip() and "," not in key for key in value):
        raise ValueError("a list of keys, each a text without a comma, is accepted")
    return ",".join(value)


def _require_sendable(keys: SecretStr) -> SecretStr:
    """Raises ValueError for API keys that no client could send in a header."""
    if not all(key.isascii() and key.isprintable() for key in _separated(keys.get_secret_value())):
        raise ValueError("keys of printable ASCII characters are accepted, since they come in a header")
    return keys


class KeySettings(_Section):
    """An API key with a name. What is made with it belongs to the name, so the key itself may change."""

    key: SecretStr = Field(
        description="The API key; several separated by commas, or a list, while an old one is replaced by a new one."
    )
    max_queued: int | None = Field(None, ge=1, description="jobs.max_queued_per_key for this key.")
    max_queued_s: float | None = Field(None, gt=0, description="jobs.max_queued_s_per_key for this key.")
    max_gb: float | None = Field(None, gt=0, description="storage.max_gb_per_key for this key.")
    sees_all_usage: bool = Field(False, description="Whether GET /v1/usage tells this key what every key has made.")

    @property
    def keys(self) -> tuple[str, ...]:
        return _separated(self.key.get_secret_value())

    @property
    def max_bytes(self) -> int | None:
        """``max_gb`` in bytes; None means no bound."""
        return None if self.max_gb is None or math.isinf(self.max_gb) else round(self.max_gb * 1e9)

    @field_validator("key", mode="before")
    @classmethod
    def _keys_from_list(cls, value: object) -> object:
        return _one_line_of_keys(value)

    @field_validator("key")
    @classmethod
    def _require_a_key(cls, value: SecretStr) -> SecretStr:
        if not _separated(value.get_secret_value()):
            raise ValueError("a key is not empty")
        return _require_sendable(value)


class ServerSettings(_Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens the service to the network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        None,
        description="Address of the service in the URLs that it answers; by default the one that the client called.",
    )
    root_path: str = Field(
        "",
        description="Path under which a proxy has the service, such as /kinema, whether the proxy takes it off or not. "
        "Links begin with it, unless server.public_url is set.",
    )
    link_lifetime_h: float = Field(
        24.0,
        gt=0,
        le=24 * 366,
        description="Hours for which the URL of a video opens without a key, where keys are needed; each answer about "
        "the video has a new one.",
    )
    max_streams_per_key: int = Field(
        256,
        ge=1,
        description="How many event streams and live videos of one API key a server keeps open; others get a 429. "
        "Without API keys all clients share them.",
    )
    allowed_hosts: str = Field(
        "",
        description="Further host names under which clients call the service, separated by commas, or a list in TOML; "
        "*.example.com stands for all names under example.com, * for any name. Loopback names, the machine's own "
        "addresses and the hosts of server.host and server.public_url are always accepted; others are refused with "
        "421.",
    )
    proxies: str = Field(
        "",
        description="Addresses or networks of the proxies before the service, separated by commas, or a list in TOML. "
        "X-Forwarded-For and X-Forwarded-Proto are believed from them alone, and max_connections_per_address does not "
        "hold for them.",
    )
    max_body_mb: float = Field(32.0, gt=0, description="Larger request bodies are refused with 413.")
    max_uploads_mb: float = Field(
        1024.0,
        gt=0,
        description="Space for all request bodies that are being read, in memory and in data_dir, in MB; beyond it "
        "they are refused with 503. One client may have half of it.",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="How many connections may be open. By default, and at most, what the limit of open files "
        "(ulimit -n) leaves when the service has its own. At the limit the connection whose client has been silent "
        "longest is closed.",
    )
    max_connections_per_address: int | None = Field(
        None, ge=1, description="max_connections for one client's address; by default half of all."
    )
    head_s: float = Field(10.0, gt=0, description="Seconds within which the headers of a request have to come.")
    stall_s: float = Field(
        30.0,
        gt=0,
        description="Seconds for which a client may leave the service waiting while it sends a body or reads an "
        "answer: in silence, or slower than 8 KiB a second.",
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Accepted API keys, separated by commas, or a list in TOML; each key sees only its own videos. "
        "Empty: no key is needed.",
    )

    keys: dict[str, KeySettings] = Field(
        {},
        description="Further API keys, each with a name and limits of its own: a table [server.keys.NAME] in the file, "
        "with key, max_queued, max_queued_s, max_gb and sees_all_usage. What a key has made belongs to its name.",
    )

    @property
    def num_keys(self) -> int:
        """The number of accepted keys; 0 where none is needed. A name counts once."""
        return len({*_separated(self.api_keys.get_secret_value())}) + len(self.keys)

    @property
    def keys_by_id(self) -> dict[str, KeySettings]:
        """The keys with names, by what jobs remember of them."""
        return {f"{_NAMED_KEY}{name}": key for name, key in self.keys.items()}

    @field_validator("keys", mode="before")
    @classmethod
    def _require_tables(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("tables [server.keys.NAME] in the settings' file are accepted")
        return value

    @field_validator("keys")
    @classmethod
    def _check_names(cls, value: dict[str, KeySettings]) -> dict[str, KeySettings]:
        for name in value:
            if not _KEY_NAME.fullmatch(name):
                raise ValueError("the name of a key is 1 to 48 letters, digits, dots, dashes and underscores")
        return value

    @model_validator(mode="after")
    def _require_different_keys(self) -> Self:
        all_keys = Counter(set(_separated(self.api_keys.get_secret_value())))
        for named in self.keys.values():
            all_keys.update(set(named.keys))
        if any(count > 1 for count in all_keys.values()):
            raise ValueError("an API key stands under two names in server.keys, or there and in server.api_keys")
        return self

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        value = value.rstrip("/")
        if not _ROOT_PATH.fullmatch(value) or {".", ".."} & set(value.split("/")):
            raise ValueError("a path such as /kinema is accepted: letters, digits and . _ ~ - between slashes")
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr) -> SecretStr:
        return _require_sendable(value)

    @field_validator("allowed_hosts", "proxies", mode="before")
    @classmethod
    def _text_from_list(cls, value: object) -> object:
        return _joined(value)

    @field_validator("proxies")
    @classmethod
    def _check_proxies(cls, value: str) -> str:
        for part in filter(None, map(str.strip, value.split(","))):
            try:
                ip_network(part)
            except ValueError:
                raise ValueError(f"{part!r} is neither an IP address nor a network such as 10.0.0.0/8") from None
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _keys_from_list(cls, value: object) -> object:
        return _one_line_of_keys(value)


class InputSettings(_Section):
    """The pictures and films that come with requests. Each is decoded by a process of its own."""

    max_at_once: int = Field(
        4,
        ge=1,
        description="Of how many requests the pictures are decoded at once, and half as many films; others wait. One "
        "API key has at most half of these places.",
    )
    picture_s: int = Field(
        5,
        ge=1,
        description="Seconds of processor time that the pictures of a request may take; more is refused.",
    )
    film_s: int = Field(
        60,
        ge=1,
        description="Seconds of processor time that a film may take; one that takes longer is refused. A worker waits "
        "as long for each frame of a film that it continues.",
    )
    memory_mb: int = Field(
        1024,
        ge=256,
        description="Memory in MB that the decoding of one picture or film may take; the largest pictures need 600, "
        "and 4K films up to 900.",
    )


class JobSettings(_Section):
    """The queue and its database."""

    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the job database; by default an SQLite file in the data folder."
    )
    max_queued: int = Field(
        100, ge=1, description="How many jobs of a model may wait; further ones are answered with 429."
    )
    max_queued_s: float | None = Field(
        None, gt=0, description="How many predicted seconds of work may wait for a model; more is answered with 429."
    )
    max_queued_per_key: int | None = Field(
        None,
        ge=1,
        description="max_queued for the jobs of one API key; by default its share: max_queued divided by the number of "
        "keys, but at least a tenth of it.",
    )
    max_queued_s_per_key: float | None = Field(
        None,
        gt=0,
        description="max_queued_s for the jobs of one API key, by default its share as well. One job may always wait.",
    )
    max_wait_h: float | None = Field(
        None,
        gt=0,
        description="Hours after which a job that still waits fails with `waited_too_long`, also when no worker of its "
        "model is left. By default it waits for ever.",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="A job fails when it has lost its worker this many times, or its server alone ten times as often.",
    )
    retry_s: float = Field(
        1.0, ge=0, description="Seconds until a job that lost its worker is tried again; doubled with every loss."
    )
    lease_s: float = Field(
        10.0, gt=0, description="When a server dies, its jobs are started again within this many seconds."
    )

    @property
    def max_wait_s(self) -> float | None:
        """``max_wait_h`` in seconds; None means for ever."""
        return None if self.max_wait_h is None or math.isinf(self.max_wait_h * 3600) else self.max_wait_h * 3600

    def shared_by(self, num_keys: int) -> JobSettings:
        """The same limits with the share of each of so many keys filled in."""
        if num_keys < 2:
            return self
        share = max(1 / num_keys, _LEAST_SHARE)
        per_key = {"max_queued_per_key": self.max_queued_per_key or max(int(self.max_queued * share), 1)}
        seconds = None if self.max_queued_s is None else self.max_queued_s * share
        return self.model_copy(update={**per_key, "max_queued_s_per_key": self.max_queued_s_per_key or seconds})


class StorageSettings(_Section):
    """Where finished files are stored."""

    url: str | None = Field(
        None,
        description="fsspec URL of a folder, for instance s3://bucket/videos; by default a folder in data_dir. "
        "It belongs to one job database, whose id it keeps; another database is refused.",
    )
    public_url: str | None = Field(
        None,
        description="HTTP address where that folder can be read, for answers to NVIDIA Dynamo's own frontend; "
        "not needed with s3, gs and az, which make signed links. Other users of the machine can then read the files.",
    )
    presign: bool = Field(
        False,
        description="Answer downloads with a redirect to a link of the bucket, on s3, gs and az, for 15 minutes. "
        "The servers then carry no videos, and clients must be able to reach the bucket.",
    )
    max_gb_per_key: float = Field(
        50.0,
        gt=0,
        description="How much the inputs and the stored videos of one API key may take; above that new videos are "
        "refused with 429. Without API keys all clients share it. inf: no bound.",
    )
    min_free_gb: float = Field(
        1.0,
        ge=0,
        description="While the disk of a local folder has less free space, new videos are refused with 507.",
    )

    @property
    def max_bytes_per_key(self) -> int | None:
        """``max_gb_per_key`` in bytes; None means no bound."""
        return None if math.isinf(self.max_gb_per_key) else round(self.max_gb_per_key * 1e9)

    @property
    def min_free_bytes(self) -> int:
        return round(self.min_free_gb * 1e9)


class RetentionSettings(_Section):
    """How long finished jobs and their files are kept."""

    keep_h: float | None = Field(
        168.0,
        gt=0,
        description="Hours for which a finished job and its files are kept; `expires_at` tells the end. inf: for ever. "
        "Starred jobs stay.",
    )
    max_disk_gb: float | None = Field(
        None,
        gt=0,
        description="When the stored videos and inputs take more space, the oldest finished jobs without a star are "
        "removed. Inputs of jobs that have not ended stay, so that videos go earlier.",
    )
    sweep_every_s: float = Field(60.0, gt=0, description="Seconds between two searches for expired jobs.")

    @property
    def keep_s(self) -> float | None:
        """``keep_h`` in seconds; None means for ever."""
        return None if self.keep_h is None or math.isinf(self.keep_h * 3600) else self.keep_h * 3600

    def expires_at(self, finished_at: float | None) -> float | None:
        """When a job that ended at ``finished_at`` is removed with its files.

        None when it has not ended, or is kept for ever.
        """
        return None if finished_at is None or self.keep_s is None else finished_at + self.keep_s


class WebhookSettings(_Section):
    """Messages to other servers when a job has ended."""

    url: str | None = Field(
        None, description="Receives the events video.completed and video.failed of every job, as signed POST requests."
    )
    secret: SecretStr | None = Field(
        None, description="The secret that signs these requests: whsec_ and base64, or plain text."
    )
    allow_private: bool = Field(
        False,
        description="Allow webhooks to private and loopback addresses; API clients can then reach the inner network.",
    )
    give_up_after_h: float = Field(
        72.0, gt=0, description="Hours after which a message that cannot be delivered is dropped."
    )


class ClientSettings(_Section):
    """The service that ``kinema jobs`` calls."""

    url: str = Field("http://127.0.0.1:8000", description="Address of the service that `kinema jobs` calls.")
    api_key: SecretStr | None = Field(None, description="API key that `kinema jobs` sends.")


class WorkerSettings(_Section):
    """What runs on the device."""

    max_active: int = Field(
        8,
        ge=1,
        description="How many videos share the device by taking turns; each keeps some 50 MB in memory. "
        "With a small number, a short video may have to wait until a long one is finished.",
    )
    max_in_memory: int | None = Field(
        None,
        ge=1,
        description="How many of these videos keep their latents on the device; the others wait as checkpoints in the "
        "host's memory. By default all do.",
    )
    policy: Literal["shortest", "fifo", "round-robin"] = Field(
        "shortest",
        description="Which video's step runs next: shortest takes the one with the least remaining work, fifo the "
        "oldest, round-robin each in turn.",
    )
    storage_patience_s: float = Field(
        60.0,
        ge=0,
        description="Seconds that a worker waits for a storage that does not answer, before the video fails.",
    )
    checkpoint_s: float = Field(
        10.0,
        ge=0,
        description="Seconds between two checkpoints of a video. When a worker dies, at most this much is computed "
        "again; inf: no checkpoints.",
    )
    max_step_s: float = Field(
        900.0,
        gt=0,
        description="When one step on the device takes longer, `kinema worker` ends, so that it is started again.",
    )


class ClusterSettings(_Section):
    """How `kinema frontend` and `kinema worker` find and reach each other."""

    discovery: Literal["etcd", "file"] = Field(
        "etcd", description="Where workers are registered: etcd, or file when all processes are on one machine."
    )
    etcd_endpoints: str | None = Field(
        None,
        description="Addresses of etcd, separated by commas; by default ETCD_ENDPOINTS, else http://127.0.0.1:2379.",
    )
    file_dir: Path | None = Field(
        None, description="Folder of file discovery, the same for all processes; by default a folder in data_dir."
    )
    namespace: str = Field(
        "kinema",
        pattern=r"^[a-z0-9_-]+$",
        description="Frontends see only the workers of their own namespace. Allowed: small letters, digits, - and _.",
    )
    host: str | None = Field(
        None,
        description="Address at which the other processes reach this one; by default the first address that is found.",
    )
    lease_s: float = Field(
        10.0,
        ge=2,
        description="Seconds after which a dead worker is no longer registered; etcd may be away for as long.",
    )
    silence_s: float = Field(
        10.0,
        ge=2,
        description="Seconds without a message after which a worker counts as lost; its videos continue elsewhere.",
    )
    drain_s: float = Field(
        600.0,
        ge=0,
        description="Seconds for which a worker that is told to stop still works on the videos that it has begun.",
    )
    max_waiting: int = Field(
        16, ge=0, description="How many requests of Dynamo's own frontend may wait at a worker; further ones get a 429."
    )
    max_message_mb: float = Field(
        32.0, ge=1, description="Largest message between frontend and worker, in MB; the same for all processes."
    )


class WanSettings(_Section):
    """What the wan engine alone keeps to."""

    transformer: Path | None = Field(
        None,
        description="A file that the wan engine reads in place of the model's folder transformer: .safetensors (bf16, "
        "fp16, fp32, or FP8 with scales; diffusers' names or Wan's own) or .gguf.",
    )
    transformer_2: Path | None = Field(
        None,
        description="The same for the second expert of a model with two (Wan 2.2 A14B), in place of transformer_2.",
    )
    attention: Literal["auto", "fa3", "cudnn", "sdpa", "fa3-fp8"] = Field(
        "auto",
        description="Kernel of the wan engine's self-attention: fa3 is FlashAttention 3 (package fa3-fwd), cudnn is "
        "cuDNN's, sdpa lets torch choose. auto takes fa3 on Hopper, the faster of fa3 and cudnn on other GPUs, and "
        "sdpa on a CPU. fa3-fp8 is FlashAttention 3 with 8-bit numbers: it is faster, and the video differs.",
    )
    linears: Literal["dtype", "fp8"] = Field(
        "dtype",
        description="Number type of the products in the large layers of the wan engine's transformer: dtype is "
        "engine.dtype; fp8 is 8-bit, faster on GPUs from sm_89 on and half the memory, and the video differs.",
    )
    step_cache: bool = Field(
        False,
        description="Compute only every second step in the middle of a video and derive the others: the wan engine "
        "needs two thirds of the time, and the video differs.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Run each step of the wan engine as one recorded CUDA graph; takes memory for each video size in "
        "use.",
    )
    gpus: int = Field(
        1,
        ge=1,
        description="How many GPUs make each video together (wan engine), beginning with engine.device; each holds a "
        "transformer, or with engine.wan.parallel = shard a part of it.",
    )
    parallel: Literal["auto", "cfg", "ulysses", "shard"] = Field(
        "auto",
        description="How several GPUs share a video: with cfg each of two GPUs computes one of the two passes of "
        "guidance, with ulysses each computes a part of the picture; auto is cfg for guided videos on two GPUs, else "
        "ulysses; shard is auto with a part of the transformer on each GPU, for a model that is larger than one.",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="How many GB of each GPU the wan engine takes at most, with what CUDA itself takes; by default "
        "what is free at the start. A model that does not fit is refused then. Not for a CPU.",
    )
    loras: Path | None = Field(
        None,
        description="Folder with LoRAs for the wan engine, as safetensors files; requests name them, and files that "
        "appear there are found without a restart.",
    )


class DiffusersSettings(_Section):
    """What the diffusers engine alone keeps to."""

    vae_tiling: bool = Field(
        False,
        description="Let the VAE of the diffusers engine decode a large picture by overlapping tiles: it takes less "
        "memory, and the video differs a little.",
    )
    transformer: Path | None = Field(
        None,
        description="A file that the diffusers engine reads in place of the model's folder transformer: .safetensors, "
        "or .gguf, whose blocks are restored as they are used.",
    )
    quantization: Literal["none", "torchao_int8", "torchao_fp8", "bitsandbytes_8bit", "bitsandbytes_4bit"] = Field(
        "none",
        description="Let this library quantise the weights of the diffusers engine's transformer and text encoders "
        "while it reads them: they take a half or a quarter of the memory, and the video differs. bitsandbytes needs a "
        "CUDA GPU, and 4bit is NF4.",
    )
    compile: bool = Field(
        False,
        description="Let torch compile the blocks of the diffusers engine's transformer. The first video of a shape "
        "takes longer, later ones less; what was compiled is kept in engine.kernels_dir.",
    )
    loras: Path | None = Field(
        None,
        description="Folder with LoRAs for the diffusers engine, as safetensors files; requests name them, and files "
        "that appear there are found without a restart.",
    )


class SglangSettings(_Section):
    """What the sglang engine alone keeps to."""

    backend: Literal["auto", "sglang", "diffusers"] = Field(
        "auto",
        description="sglang uses SGLang's own pipelines, diffusers uses those of diffusers inside SGLang; auto is "
        "sglang on a GPU and diffusers on a CPU.",
    )
    num_gpus: int | None = Field(
        None,
        ge=1,
        description="How many GPUs SGLang uses for one video; by default as many as the following settings need "
        "together.",
    )
    tp_size: int | None = Field(
        None, ge=1, description="How many GPUs share the weights of each layer (tensor parallel); by default 1."
    )
    sp_degree: int | None = Field(
        None,
        ge=1,
        description="How many GPUs share the tokens of a video (sequence parallel); by default all that remain.",
    )
    ulysses_degree: int | None = Field(
        None,
        ge=1,
        description="How many GPUs of sp_degree exchange attention heads (Ulysses); by default SGLang chooses.",
    )
    cfg_parallel: bool | None = Field(
        None, description="Run the two passes of guidance on two GPUs; by default SGLang chooses."
    )
    attention: str | None = Field(
        None, description="SGLang's attention backend, for instance fa or torch_sdpa; by default SGLang chooses."
    )
    lora: str | None = Field(None, description="A LoRA that SGLang adds to the model: a file, a folder or a hub name.")
    lora_scale: float = Field(1.0, description="How strongly lora is added.")
    offload: bool | None = Field(
        None,
        description="Keep parts of the model in the host's memory while they are not used; by default SGLang chooses.",
    )
    silence_s: float = Field(
        600.0,
        gt=0,
        description="When no step ends for this many seconds, the video of the sglang engine fails and SGLang is "
        "restarted.",
    )
    start_s: float = Field(1800.0, gt=0, description="Seconds that SGLang may take to load the model.")


# The engines that keep to a setting of the section ``engine``, where not all of them do. Folders of caches are left
# out, since they change neither a video nor the memory that it takes.
_SHARED = {
    "dtype": ("wan", "diffusers", "sglang"),
    "vae_dtype": ("wan", "diffusers", "sglang"),
    "weights": ("wan", "diffusers"),
    "offload": ("wan", "diffusers"),
}


class EngineSettings(_Section):
    """The model, and the device that it runs on.

    What one engine alone keeps to is in the section of its name. A setting that the chosen engine does not keep to
    stops the start.
    """

    name: Literal["auto", "wan", "diffusers", "sglang", "fake"] = Field(
        "auto",
        description="wan runs Wan models; diffusers runs the video pipelines of that library; auto is wan for the "
        "models that it runs, else diffusers; sglang runs Wan models with SGLang; fake makes test patterns without a "
        "model.",
    )
    model: str = Field(
        DEFAULT_MODEL, description="A bundled name, or a folder or hub name of a checkpoint in the format of diffusers."
    )
    served_name: str | None = Field(
        None,
        description="What clients call the model; by default the name of its folder, or its name on the hub.",
    )
    aliases: str = Field(
        "",
        description="Further names of the model that requests may use, separated by commas, or a list in TOML. Videos "
        "that wait under such a name are made by this model too.",
    )
    device: str = Field(
        "auto", description="auto takes cuda if there is a GPU, else cpu; or the name of a torch device."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number type of the transformer's weights; auto is bfloat16 on cuda and float32 on cpu."
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number type in which the VAE decodes; auto is float32 on cpu and float16 on cuda, or bfloat16 "
        "there if a value is too large for float16. A video that overflows float16 is finished in bfloat16.",
    )
    weights: Literal["dtype", "fp8"] = Field(
        "dtype",
        description="Number type in which the wan engine keeps the large layers of its transformer and text encoder, "
        "and the diffusers engine those of its transformer: dtype is engine.dtype; fp8 is 8-bit, half the memory of "
        "bfloat16 on any device, and the video differs. Products are still of engine.dtype, except where "
        "engine.wan.linears is fp8.",
    )
    offload: Literal["auto", "none", "text", "blocks", "networks"] = Field(
        "auto",
        description="What is kept in the host's memory and brought to the GPU while it computes (wan and diffusers "
        "engines): text is the encoders of texts and pictures, blocks are also the blocks of the transformer, none is "
        "nothing. networks (diffusers alone) are encoders and transformers, each whole, and one lies on the GPU at a "
        "time. auto takes the first of none, text and blocks with which the model's usual video fits; with the "
        "diffusers engine, the first with which the weights leave a quarter of the free memory. The video is the same.",
    )
    weights_cache: bool = Field(
        True,
        description="Keep a bfloat16 copy of a float32 checkpoint; it has half the size, and later starts read it "
        "instead. false: no copy is made.",
    )
    weights_cache_dir: Path | None = Field(
        None,
        description="Folder of these copies, and of the digests of LoRAs; by default weights-cache in data_dir. "
        "`kinema generate` keeps them only when this folder is set.",
    )
    kernels_dir: Path | None = Field(
        None,
        description="Folder of compiled GPU kernels: a first start takes seconds to compile them, and later starts "
        "read them. By default kernels in data_dir; `kinema generate` keeps them where Triton does. The environment "
        "variable TRITON_CACHE_DIR, where it is set, comes first.",
    )
    wan: WanSettings = WanSettings()
    diffusers: DiffusersSettings = DiffusersSettings()
    sglang: SglangSettings = SglangSettings()

    @property
    def alias_names(self) -> tuple[str, ...]:
        """The aliases, each by itself."""
        return _separated(self.aliases)

    def given(self, engine: str) -> list[str]:
        """The keys of the section of one engine that are not at their defaults."""
        section: _Section | None = getattr(self, engine, None)
        return [] if section is None else [f"engine.{engine}.{name}" for name in _changed(section)]

    def of_others(self) -> dict[str, tuple[str, ...]]:
        """The keys that are not at their defaults and that the engine ``name`` does not keep to, each with the engines
        that do."""
        shared = {name: _SHARED[name] for name in _changed(self) if name in _SHARED}
        found = {f"engine.{name}": engines for name, engines in shared.items() if self.name not in engines}
        for engine in ("wan", "diffusers", "sglang"):
            if engine != self.name:
                found |= dict.fromkeys(self.given(engine), (engine,))
        return found

    @field_validator("aliases", mode="before")
    @classmethod
    def _aliases_from_list(cls, value: object) -> object:
        return _joined(value)

    @field_validator("served_name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None:
            _require_name(value)
        return value

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, value: str) -> str:
        for name in _separated(value):
            _require_name(name)
        return value


class Settings(BaseModel):
    """All sections. Each part of the service gets only its own section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(
        Path("kinema-data"),
        description="Folder for the database and the videos; other users of the machine cannot read it.",
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="console: log lines for people; json: one JSON object per line."
    )
    server: ServerSettings = ServerSettings()
    inputs: InputSettings = InputSettings()
    jobs: JobSettings = JobSettings()
    storage: StorageSettings = StorageSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    worker: WorkerSettings = WorkerSettings()
    cluster: ClusterSettings = ClusterSettings()
    engine: EngineSettings = EngineSettings()
    client: ClientSettings = ClientSettings()

    @field_validator("data_dir", mode="before")
    @classmethod
    def _check_named(cls, value: object) -> object:
        if value == "":  # a path would be the working directory
            raise ValueError("give the name of a folder, for instance kinema-data")
        return value

    @field_validator("data_dir")
    @classmethod
    def _check_folder(cls, value: Path) -> Path:
        if "\0" in str(value) or os.fsencode(value) != str(value).encode(errors="replace"):
            raise ValueError("the name of a folder must be UTF-8")
        return value

    @property
    def database_url(self) -> str:
        return self.jobs.database_url or sqlite_url(self.data_dir.resolve() / "kinema.db")

    @property
    def queue(self) -> JobSettings:
        """The jobs' section with the shares of the API keys filled in."""
        return self.jobs.shared_by(self.server.num_keys)

    @property
    def storage_url(self) -> str:
        return self.storage.url or f"file://{self.data_dir.resolve() / 'files'}"

    @property
    def transport(self) -> ClusterSettings:
        """The cluster's section with every default filled in."""
        return self.cluster.model_copy(
            update={
                "file_dir": self.cluster.file_dir or self.data_dir.resolve() / "discovery",
                "etcd_endpoints": self.cluster.etcd_endpoints or os.environ.get("ETCD_ENDPOINTS") or DEFAULT_ETCD,
            }
        )

    @property
    def loading(self) -> EngineSettings:
        """The engine's section with every default filled in."""
        folder = self.engine.weights_cache_dir or self.data_dir.resolve() / "weights-cache"
        kernels = self.engine.kernels_dir or self.data_dir.resolve() / "kernels"
        return self.engine.model_copy(update={"weights_cache_dir": folder, "kernels_dir": kernels})
