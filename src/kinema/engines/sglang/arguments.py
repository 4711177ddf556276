"""From our words to the library's: settings to ``DiffGenerator.from_pretrained``, a request to ``generate``.

What a checkpoint can make is read from its own files, as for the wan engine. The library knows defaults by the names of
published models (some of them over HTTP), and rounds sizes in silence, so every value of a request is passed to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kinema.engines.hardware import has_nvidia
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.configs import solver_name
from kinema.errors import ConfigError, InvalidRequest
from kinema.request.capabilities import Capabilities, Tier
from kinema.request.request import GenerationRequest
from kinema.settings import EngineSettings

Backend = Literal["sglang", "diffusers"]

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Whatever the folder says, the library computes UniPC.
_SOLVER = "unipc"
_TEXT, _IMAGE = "WanPipeline", "WanImageToVideoPipeline"
# By these names the library finds the configuration of a folder whose own name it does not know. Its TI2V has a VAE of
# 16 pixels to a latent; with another VAE it would make videos of another size.
_TI2V, _TI2V_SCALE = "Wan2.2-TI2V-5B-Diffusers", 16
_A14B = {_TEXT: "Wan2.2-T2V-A14B-Diffusers", _IMAGE: "Wan2.2-I2V-A14B-Diffusers"}
# The parts that may wait in the host's memory.
_OFFLOADS = ("dit_cpu_offload", "text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload")


def is_on_cpu(settings: EngineSettings) -> bool:
    """Whether the library computes on the CPU; ``auto`` is a GPU where one exists."""
    return settings.device == "cpu" or (settings.device == "auto" and not has_nvidia())


def backend_of(settings: EngineSettings) -> Backend:
    """The library's backend. ``auto`` is chosen here, since the library's own ``auto`` changes to diffusers without a
    word, and its own pipelines need kernels that are not published for a CPU.
    """
    if settings.sglang.backend != "auto":
        return settings.sglang.backend
    return "diffusers" if is_on_cpu(settings) else "sglang"


def num_gpus(settings: EngineSettings) -> int:
    """The number of GPUs: the setting, or else the product of the degrees."""
    if settings.sglang.num_gpus is not None:
        return settings.sglang.num_gpus
    sequence = settings.sglang.sp_degree or settings.sglang.ulysses_degree or 1
    return (settings.sglang.tp_size or 1) * sequence * (2 if settings.sglang.cfg_parallel else 1)


def capabilities_of(checkpoint: Checkpoint, settings: EngineSettings) -> Capabilities:
    """What the library can make of a checkpoint.

    Raises ConfigError for a pipeline or a solver that the library does not have, and for a ``kinema.json`` that does
    not fit.
    """
    can, pipeline = checkpoint.capabilities(), _pipeline(checkpoint)
    _check_base(checkpoint)
    _check_solver(checkpoint)
    is_native = backend_of(settings) == "sglang"
    # Both backends read the shift from the solver's file, the diffusers backend the boundary from the index.
    flow_shift = float(checkpoint.solver.get("flow_shift") or 1.0)
    own = {
        "flow_shift": flow_shift,
        "boundary_ratio": checkpoint.index.get("boundary_ratio"),
    }
    return can.model_copy(
        update={
            "engine": "sglang",
            "is_text_to_video": pipeline == _TEXT,
            # Among the text pipelines only the library's own for TI2V reads a first frame.
            "is_image_to_video": pipeline == _IMAGE or (is_native and _is_ti2v(checkpoint)),
            "is_first_last_frame_to_video": False,
            "is_video_to_video": False,
            "is_interleaved": False,
            "has_checkpoints": False,
            "has_previews": False,
            "fixed_options": ("flow_shift",) if is_native else ("flow_shift", "boundary_ratio"),
            "preset": can.preset.model_copy(update=own),
            "tiers": tuple(tier for tier in can.tiers if not _reason_against(tier, flow_shift)),
            # All frames come after the library has decoded them.
            "geometry": can.geometry.model_copy(update={"chunk_frames": None}),
        }
    ).named(settings.served_name, settings.alias_names)


def arguments_of(checkpoint: Checkpoint, settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained``, as far as they are known outside of the library's process.

    Raises ConfigError when the settings do not fit each other.
    """
    _check(settings)
    on_cpu = is_on_cpu(settings)
    chosen: dict[str, Any] = {
        "model_path": str(checkpoint.path.resolve()),
        "model_id": _model_id(checkpoint),
        "backend": backend_of(settings),
        "num_gpus": num_gpus(settings),
        "tp_size": settings.sglang.tp_size,
        "sp_degree": settings.sglang.sp_degree,
        "ulysses_degree": settings.sglang.ulysses_degree,
        "enable_cfg_parallel": settings.sglang.cfg_parallel,
        "attention_backend": settings.sglang.attention,
        "lora_path": settings.sglang.lora,
        # bfloat16 is the library's default on every device, and slow on a CPU.
        "dit_precision": _PRECISIONS.get(settings.dtype, "fp32" if on_cpu else "bf16"),
        "vae_precision": _PRECISIONS.get(settings.vae_dtype),
        **dict.fromkeys(_OFFLOADS, settings.sglang.offload),
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    if settings.sglang.lora is not None:
        given["lora_scale"] = settings.sglang.lora_scale
    if given["backend"] == "sglang":
        given["flow_shift"] = capabilities_of(checkpoint, settings).preset.flow_shift
    # The library's own warm-up would make videos of 832x480; the worker makes a probe itself.
    return {**given, "warmup_mode": "off", "log_level": "warning"}


def environment_of(settings: EngineSettings) -> dict[str, str]:
    """The environment of the library's process: its device, no progress bars in the log, loopback for its ranks."""
    environment = {"TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if is_on_cpu(settings):
        return {**environment, "CUDA_VISIBLE_DEVICES": "", "SGLANG_DIFFUSION_PLATFORM_OVERRIDE": "cpu"}
    _, _, number = settings.device.partition(":")
    return {**environment, "CUDA_VISIBLE_DEVICES": number} if number else environment


def parameters_of(request: GenerationRequest, pictures: Mapping[str, Path]) -> dict[str, Any]:
    """The parameters of ``DiffGenerator.generate``; ``pictures`` are files by the names of ``Inputs``.

    ``diffusers_kwargs`` repeats what the diffusers backend would drop: an empty negative prompt, a single frame, and
    the second expert's guidance.
    """
    shape = {"width": request.width, "height": request.height, "num_frames": request.num_frames}
    parameters: dict[str, Any] = {
        **shape,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "fps": request.fps,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        # Else the library would make the film longer, so that its latent frames can be shared among the GPUs.
        "adjust_frames": False,
        "save_output": False,
        "return_frames": True,
        "suppress_logs": True,
        "diffusers_kwargs": {**shape, "negative_prompt": request.negative_prompt},
    }
    if request.guidance_scale_2 is not None:
        parameters["guidance_scale_2"] = request.guidance_scale_2
        parameters["diffusers_kwargs"]["guidance_scale_2"] = request.guidance_scale_2
    if request.boundary_ratio is not None:
        parameters["boundary_ratio"] = request.boundary_ratio
    if "first_frame" in pictures:
        parameters["image_path"] = str(pictures["first_frame"])
    return parameters


def _check(settings: EngineSettings) -> None:
    gpus, backend = num_gpus(settings), backend_of(settings)
    if gpus > 1 and backend == "sglang" and settings.device not in ("auto", "cuda"):
        raise ConfigError(
            f"engine.device = {settings.device!r}: {gpus} GPUs for one video need auto or cuda; CUDA_VISIBLE_DEVICES "
            "says which ones"
        )
    if backend == "sglang":
        return
    needless = {
        "lora": settings.sglang.lora is not None,
        "attention": settings.sglang.attention is not None,
        "num_gpus, tp_size, sp_degree, ulysses_degree or cfg_parallel": gpus > 1,
    }
    for name, is_set in needless.items():
        if is_set:
            raise ConfigError(
                f"engine.sglang.{name}: these are for SGLang's own pipelines, and diffusers' would run here; leave it "
                "out, or set engine.sglang.backend = 'sglang' on a GPU"
            )


def _pipeline(checkpoint: Checkpoint) -> str:
    found = checkpoint.index.get("_class_name")
    if found not in (_TEXT, _IMAGE):
        raise ConfigError(
            f"the model folder {checkpoint.path}: model_index.json: _class_name is {found!r}; the sglang engine runs "
            f"{_TEXT} and {_IMAGE}"
        )
    return str(found)


def _check_base(checkpoint: Checkpoint) -> None:
    """The library reads one folder."""
    if checkpoint.base is not None:
        raise ConfigError(
            f"the model folder {checkpoint.path}: kinema.json: base names another model's parts, and the sglang engine "
            "reads a folder that has all of them"
        )


def _check_solver(checkpoint: Checkpoint) -> None:
    """The library computes UniPC, whatever the folder says."""
    if solver_name(checkpoint.solver) != _SOLVER:
        raise ConfigError(
            f"the model folder {checkpoint.path}: scheduler/scheduler_config.json: _class_name is "
            f"{checkpoint.solver['_class_name']!r}; the sglang engine runs UniPCMultistepScheduler"
        )


def refused_tiers(checkpoint: Checkpoint, settings: EngineSettings) -> dict[str, str]:
    """The tiers of the checkpoint that the library does not run, by their names, and why. Raises ConfigError."""
    shift = capabilities_of(checkpoint, settings).preset.flow_shift
    tiers = {tier.name: _reason_against(tier, shift) for tier in checkpoint.capabilities().tiers}
    return {name: reason for name, reason in tiers.items() if reason}


def _reason_against(tier: Tier, flow_shift: float | None) -> str | None:
    """Why the library does not run a tier; None when it does."""
    if tier.solver not in (None, _SOLVER):
        return f"its solver is {tier.solver}, and the sglang engine runs {_SOLVER}"
    if tier.timesteps is not None:
        return "it lists timesteps, and the sglang engine takes even steps"
    if tier.loras:
        return "it has LoRAs, and the sglang engine takes none by request"
    if tier.flow_shift not in (None, flow_shift):
        return f"its flow_shift is {tier.flow_shift:g}, and the sglang engine has {flow_shift:g}"
    return None


def check_request(request: GenerationRequest) -> None:
    """Raises InvalidRequest for steps that the library does not take."""
    if request.solver not in (None, _SOLVER) or request.timesteps is not None:
        raise InvalidRequest(f"the sglang engine runs {_SOLVER} with even steps, and no other solver or timesteps")


def _is_ti2v(checkpoint: Checkpoint) -> bool:
    return checkpoint.is_expand_timesteps and checkpoint.vae.scale_factor_spatial == _TI2V_SCALE


def _model_id(checkpoint: Checkpoint) -> str | None:
    """The published model whose configuration fits; None where the pipeline's class says enough."""
    if "/" in checkpoint.name:
        return checkpoint.name
    if _is_ti2v(checkpoint):
        return _TI2V
    return _A14B[_pipeline(checkpoint)] if checkpoint.has_two_experts else None
