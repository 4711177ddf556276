"""Every option of Kinema, once: its name, type, default and what it does.

``settings_sources.py`` says where the values come from. These two files alone read the environment.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

DEFAULT_MODEL = "tiny-wan"
DEFAULT_ETCD = "http://127.0.0.1:2379"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """The HTTP side."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens the service to the network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        None, description="The address that clients see, used in answered URLs; by default the one they called."
    )
    max_body_mb: float = Field(32.0, gt=0, description="Larger request bodies are refused with 413.")
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Accepted API keys, separated by commas; each sees its own videos alone. Empty: nobody is asked.",
    )


class JobSettings(_Section):
    """The queue and its database."""

    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the job database; by default an SQLite file in the data folder."
    )
    max_queued: int = Field(100, ge=1, description="Jobs of a model that may wait; one more is answered with 429.")
    max_queued_s: float | None = Field(
        None, gt=0, description="Predicted seconds of work that may wait for a model; more is answered with 429."
    )
    max_queued_per_key: int | None = Field(
        None, ge=1, description="The same as max_queued for the jobs of one API key."
    )
    max_queued_s_per_key: float | None = Field(
        None, gt=0, description="The same as max_queued_s for the jobs of one API key."
    )
    max_attempts: int = Field(3, ge=1, description="A job whose worker was lost this many times fails.")
    retry_s: float = Field(
        1.0, ge=0, description="Seconds before a job is tried again whose worker was lost; doubled with every loss."
    )
    lease_s: float = Field(
        10.0, gt=0, description="A job whose server died is started again after this many seconds at most."
    )


class StorageSettings(_Section):
    """Where finished files go."""

    url: str | None = Field(
        None,
        description="fsspec URL of a folder, for instance s3://bucket/videos; by default in the data folder. "
        "Each job database needs a folder of its own: files of jobs that it does not know are removed.",
    )
    public_url: str | None = Field(
        None,
        description="Where that folder is served over HTTP, for answers to NVIDIA Dynamo's own frontend; "
        "object stores sign links by themselves.",
    )


class RetentionSettings(_Section):
    """How long finished jobs and their files are kept."""

    keep_h: float | None = Field(
        168.0,
        gt=0,
        description="Hours after its end that a job is kept with its files, said as `expires_at`; inf: for ever.",
    )
    max_disk_gb: float | None = Field(
        None, gt=0, description="When stored videos take more, the oldest finished jobs are removed."
    )
    sweep_every_s: float = Field(60.0, gt=0, description="Seconds between two looks for what has expired.")

    @property
    def keep_s(self) -> float | None:
        """``keep_h`` in seconds; None: for ever."""
        return None if self.keep_h is None or math.isinf(self.keep_h * 3600) else self.keep_h * 3600

    def expires_at(self, finished_at: float | None) -> float | None:
        """When a job that ended then is removed with its files; None for one that has not ended or is kept for ever."""
        return None if finished_at is None or self.keep_s is None else finished_at + self.keep_s


class WebhookSettings(_Section):
    """Telling other servers when a job has ended."""

    url: str | None = Field(None, description="Gets video.completed and video.failed of every job, as signed POSTs.")
    secret: SecretStr | None = Field(None, description="Signs them: whsec_ and base64, or plain text.")
    allow_private: bool = Field(
        False, description="Also deliver to private and loopback addresses; opens the inner network to API clients."
    )
    give_up_after_h: float = Field(72.0, gt=0, description="Hours after which an undelivered message is dropped.")


class ClientSettings(_Section):
    """Which service the commands that speak to one mean: ``kinema jobs``."""

    url: str = Field("http://127.0.0.1:8000", description="Address of the service that `kinema jobs` speaks to.")
    api_key: SecretStr | None = Field(None, description="API key that `kinema jobs` sends to that service.")


class WorkerSettings(_Section):
    """What runs on the device."""

    max_active: int = Field(
        8,
        ge=1,
        description="Generations that share the device by taking turns; each holds its latents in memory, some 50 MB. "
        "With fewer, a short one may wait for a place behind long ones.",
    )
    max_in_memory: int | None = Field(
        None, ge=1, description="So many of them keep their latents on the device, the others wait as checkpoints."
    )
    policy: Literal["shortest", "fifo", "round-robin"] = Field(
        "shortest", description="Whose step runs next: least remaining work, the oldest, or each in turn."
    )
    storage_patience_s: float = Field(
        60.0, ge=0, description="How long a worker waits for storage that is away, before the video fails."
    )
    checkpoint_s: float = Field(
        10.0,
        ge=0,
        description="Seconds between checkpoints of a video: so much at most is computed again when a worker dies; "
        "inf: none are made.",
    )
    max_step_s: float = Field(
        900.0, gt=0, description="`kinema worker` ends, to be started anew, when one step on the device takes longer."
    )


class ClusterSettings(_Section):
    """How `kinema frontend` and `kinema worker` find and reach each other."""

    discovery: Literal["etcd", "file"] = Field(
        "etcd", description="Where workers are registered: etcd, or file for processes of one machine."
    )
    etcd_endpoints: str | None = Field(
        None, description="Addresses of etcd, separated by commas; by default ETCD_ENDPOINTS, else the local one."
    )
    file_dir: Path | None = Field(
        None, description="The folder of file discovery, the same for all processes; by default in the data folder."
    )
    namespace: str = Field(
        "kinema",
        pattern=r"^[a-z0-9_-]+$",
        description="Frontends see the workers of their own namespace alone; small letters, digits, - and _.",
    )
    host: str | None = Field(
        None, description="Address of this process that the others reach it at; by default the first that is found."
    )
    lease_s: float = Field(
        10.0, ge=2, description="Seconds that a dead worker stays registered, and that etcd may be away unnoticed."
    )
    silence_s: float = Field(
        10.0, ge=2, description="A worker without a sign of life for so long is lost, and its videos run elsewhere."
    )
    drain_s: float = Field(
        600.0, ge=0, description="Seconds that a worker which is told to end goes on with what it has begun."
    )
    max_waiting: int = Field(
        16, ge=0, description="Requests of Dynamo's own frontend that may wait at a worker; one more gets a 429."
    )
    max_message_mb: float = Field(
        32.0, ge=1, description="Largest message between frontend and worker; the same for all processes."
    )


class EngineSettings(_Section):
    """Which model, on what."""

    name: Literal["wan", "sglang", "fake"] = Field(
        "wan", description="wan runs real models, sglang does so with SGLang; fake makes test patterns at once."
    )
    model: str = Field(
        DEFAULT_MODEL, description="A name, a folder or a hub name of a diffusers-format Wan checkpoint."
    )
    device: str = Field("auto", description="auto takes cuda when there is one, else cpu; or name a torch device.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the transformer's weights; auto is bfloat16 on cuda and float32 on cpu."
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type that the VAE decodes in; auto is float32 on cpu, and float16 on cuda while its numbers fit.",
    )
    attention: Literal["auto", "fa3", "cudnn", "sdpa", "fa3-fp8"] = Field(
        "auto",
        description="Kernel of the wan engine's self-attention: FlashAttention 3 (the package fa3-fwd), cuDNN's or the "
        "one that torch takes; auto measures the first two on cuda and is sdpa elsewhere. fa3-fp8 is FlashAttention 3 "
        "with 8-bit numbers: faster, and the video is another one.",
    )
    linears: Literal["dtype", "fp8"] = Field(
        "dtype",
        description="What the large layers of the wan engine's transformer multiply: numbers of engine.dtype, or 8-bit "
        "ones (fp8): faster from sm_89 on, with half the memory, and the video is another one.",
    )
    step_cache: bool = Field(
        False,
        description="Compute only every second step in the middle of a video, and read the others off those: the wan "
        "engine takes two thirds of the time, and the video is another one.",
    )
    cuda_graphs: bool = Field(
        True, description="Replay a step of the wan engine as one CUDA graph; costs memory for the shapes in use."
    )
    gpus: int = Field(
        1,
        ge=1,
        description="GPUs, from engine.device on, that the wan engine makes each video on; each holds a transformer.",
    )
    parallel: Literal["auto", "cfg", "ulysses"] = Field(
        "auto",
        description="How several GPUs share a video: cfg gives each of two one branch of guidance, ulysses each a part "
        "of the picture; auto is cfg for guided videos on two GPUs and ulysses otherwise.",
    )
    sglang_backend: Literal["auto", "sglang", "diffusers"] = Field(
        "auto",
        description="SGLang's own pipelines, or diffusers' in it; auto takes its own on a GPU and diffusers' on a CPU.",
    )
    sglang_num_gpus: int | None = Field(
        None, ge=1, description="GPUs that SGLang spreads one video over; by default as many as the next four make."
    )
    sglang_tp_size: int | None = Field(
        None, ge=1, description="So many GPUs share each layer's weights (tensor parallel); by default none do."
    )
    sglang_sp_degree: int | None = Field(
        None, ge=1, description="So many GPUs share a video's tokens (sequence parallel); by default what is left."
    )
    sglang_ulysses_degree: int | None = Field(
        None,
        ge=1,
        description="The part of sglang_sp_degree that exchanges attention heads; by default SGLang chooses.",
    )
    sglang_cfg_parallel: bool | None = Field(
        None, description="Whether the two passes of guidance run on two GPUs; by default SGLang chooses."
    )
    sglang_attention: str | None = Field(
        None, description="SGLang's attention backend, for instance fa or torch_sdpa; by default it chooses."
    )
    sglang_lora: str | None = Field(
        None, description="A LoRA that SGLang adds to the model: a file, folder or hub name."
    )
    sglang_lora_scale: float = Field(1.0, description="How strongly it is added.")
    sglang_offload: bool | None = Field(
        None, description="Whether the model's parts wait in the host's memory; by default SGLang chooses."
    )
    sglang_silence_s: float = Field(
        600.0,
        gt=0,
        description="A video of the sglang engine fails, and SGLang is started again, when no step ends for so long.",
    )
    sglang_start_s: float = Field(1800.0, gt=0, description="Seconds that SGLang may take to load the model.")
    weights_cache: bool = Field(
        True,
        description="Keep a bfloat16 copy of a float32 checkpoint, half its size, which later starts read in its "
        "place; false reads the checkpoint itself and keeps nothing.",
    )
    weights_cache_dir: Path | None = Field(
        None,
        description="The folder of these copies; by default weights-cache in the data folder. "
        "`kinema generate` keeps them only where one is given.",
    )


class Settings(BaseModel):
    """All sections. Each part of the service is handed its own section only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(Path("kinema-data"), description="Folder for the database and the videos.")
    log_format: Literal["console", "json"] = Field("console", description="Logs for people, or one JSON object a line.")
    server: ServerSettings = ServerSettings()
    jobs: JobSettings = JobSettings()
    storage: StorageSettings = StorageSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    worker: WorkerSettings = WorkerSettings()
    cluster: ClusterSettings = ClusterSettings()
    engine: EngineSettings = EngineSettings()
    client: ClientSettings = ClientSettings()

    @property
    def database_url(self) -> str:
        return self.jobs.database_url or f"sqlite:///{self.data_dir.resolve() / 'kinema.db'}"

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
        return self.engine.model_copy(update={"weights_cache_dir": folder})
