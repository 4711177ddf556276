"""From a name in the settings to an engine, importing the chosen one only.

Importing this file loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from kinema.engines.base import Engine
from kinema.engines.deferred import DeferredEngine
from kinema.engines.diffusers.compiled import refuse_moved_blocks, require_compiler
from kinema.engines.diffusers.model_folder import Model as DiffusersModel
from kinema.engines.diffusers.model_folder import inspect as inspect_for_diffusers
from kinema.engines.hardware import has_nvidia, wake_gpu
from kinema.engines.sglang import arguments as sglang
from kinema.engines.wan.checkpoint import BUNDLED, PIPELINES, Checkpoint, inspect, pipeline_of
from kinema.engines.wan.configs import reading_files
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.ranks.plan import plan_of
from kinema.engines.wan.transformer.shapes import shapes
from kinema.engines.wan.weight_files import GGUF
from kinema.errors import ConfigError
from kinema.imports import without_collector
from kinema.request.capabilities import Capabilities
from kinema.settings import DiffusersSettings, EngineSettings

if TYPE_CHECKING:
    from kinema.engines.wan.engine import WanEngine
    from kinema.engines.wan.loading import LoadComponents, LoadTransformers
    from kinema.engines.wan.placement import OffloadSetting

log = logging.getLogger(__name__)

# Found without loading them, so that a server without them says so before it opens anything.
_WAN_PACKAGES = ("torch", "tokenizers", "ftfy")
_DIFFUSERS_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
# Beside copies of weights.
_LORA_DIGESTS = "lora-digests.json"


def create_engine(settings: EngineSettings) -> Engine:
    """The engine that the settings name, not loaded yet, and its libraries not imported. Without a
    ``weights_cache_dir`` no copies of weights are kept.

    Raises ConfigError when what it needs is not installed, or when it refuses the model.
    """
    settings, reason = _chosen(settings)
    if reason is not None:
        log.info("engine.name = 'auto': the engine is %s, since %s", settings.name, reason)
    match settings.name:
        case "fake":
            return _create_fake(settings)
        case "sglang":
            return _create_sglang(settings)
        case "diffusers":
            return _create_diffusers(settings)
        case _:
            return _create_wan(settings)


def with_engine(settings: EngineSettings) -> EngineSettings:
    """The settings with the engine that ``auto`` means for their model: wan where it runs the model, else diffusers.

    A setting of the section ``engine.wan`` means that one. Raises ConfigError when the model is not found, and for a
    setting that the engine does not have.
    """
    return _chosen(settings)[0]


def _chosen(settings: EngineSettings) -> tuple[EngineSettings, str | None]:
    """The settings with their engine, and why ``auto`` is that one; None where the settings name it."""
    if settings.name != "auto":
        _check_own(settings, f"engine.name is {settings.name!r}")
        return settings, None
    name, reason = _choice(settings)
    chosen = settings.model_copy(update={"name": name})
    _check_own(chosen, f"engine.name = 'auto' is {name!r} here, since {reason}")
    return chosen, reason


def _check_own(settings: EngineSettings, why: str) -> None:
    """Raises ConfigError for settings that the engine would ignore."""
    for key, engines in settings.of_others().items():
        owners = " and ".join(engines)
        raise ConfigError(
            f"{key} is a setting of {owners}, and {why}; leave it out, or choose engine.name = {engines[0]!r}"
        )


def _choice(settings: EngineSettings) -> tuple[str, str]:
    """The engine for the settings' model, and why. A model that neither engine runs is wan's to refuse when it says
    that it is a Wan model, and diffusers' when it does not."""
    if settings.model in BUNDLED:
        return "wan", f"{settings.model} is a Wan model"
    if of_wan := settings.given("wan"):
        return "wan", f"{of_wan[0]} is a setting of that engine"
    pipeline = pipeline_of(settings.model)
    if pipeline is not None and pipeline not in PIPELINES:
        return "diffusers", f"the model's pipeline is {pipeline}"
    try:
        find_checkpoint(settings)
    except ConfigError as refusal:
        if pipeline is not None and _is_for_diffusers(settings.model):
            return "diffusers", f"wan does not run it: {refusal.message}"
    return "wan", f"the model's pipeline is {pipeline or 'not named'}"


def _is_for_diffusers(model: str) -> bool:
    try:
        inspect_for_diffusers(model)
    except ConfigError:
        return False
    return True


# What the settings say of one model, and of no other.
_OF_ONE_MODEL = {"served_name": None, "aliases": ""}
_FILES_OF_ONE_MODEL = {"transformer": None, "transformer_2": None}


def known_models(settings: EngineSettings) -> list[tuple[Capabilities, EngineSettings]]:
    """The models that can be served without a download, each with the settings that serve it: the bundled ones and the
    configured one. Needs no torch.

    Raises ConfigError when the configured model cannot be used.
    """
    settings = with_engine(settings)
    if settings.name == "fake":
        return [(capabilities_of(settings), settings)]
    bundled = [name for name in BUNDLED if name != settings.model]
    beside: dict[str, object] = {**_OF_ONE_MODEL, "wan": settings.wan.model_copy(update=_FILES_OF_ONE_MODEL)}
    if settings.name == "diffusers":  # the bundled models are Wan's
        beside |= {"name": "wan", "diffusers": DiffusersSettings()}
    each = [settings.model_copy(update={"model": name, **beside}) for name in bundled]
    if settings.name == "sglang":  # which reads whole folders
        each = [one for one in each if find_checkpoint(one).base is None]
    return [(capabilities_of(one), one) for one in [*each, settings]]


def capabilities_of(settings: EngineSettings, loras: Collection[str] = (), tier: str | None = None) -> Capabilities:
    """The capabilities of the engine that the settings name, without creating it. Needs no torch.

    Of the LoRAs of the wan engine they have those with these names and those of the tier, whose files are read if need
    be. Raises ConfigError when the model cannot be used, InvalidRequest for a LoRA that cannot.
    """
    settings = with_engine(settings)
    if settings.name == "fake":
        return _create_fake(settings).capabilities
    if settings.name == "sglang":
        return sglang.capabilities_of(find_checkpoint(settings), settings)
    if settings.name == "diffusers":
        model = _diffusers_model(settings)
        can, library = _named(model.capabilities(), settings), _diffusers_loras(settings, model)
        return can.model_copy(update={"loras": library.described(loras) if library and loras else ()})
    checkpoint = find_checkpoint(settings)
    can = _named(checkpoint.capabilities(), settings)
    of_tier = [name for one in can.tiers if one.name == tier for name in one.lora_names]
    library = library_of(settings, checkpoint) if loras or of_tier else None
    if library is not None and of_tier:
        loras = {*loras, *set(of_tier).intersection(library.names())}
    return can.model_copy(update={"loras": library.described(loras) if library else ()})


def lora_names(settings: EngineSettings) -> Sequence[str]:
    """The LoRAs that the settings' engine can use, by their names. Needs no torch. Raises ConfigError."""
    settings = with_engine(settings)
    if settings.name == "fake":
        return [lora.name for lora in capabilities_of(settings).loras]
    if settings.name == "diffusers":
        library = _diffusers_loras(settings, _diffusers_model(settings))
    else:
        library = library_of(settings, find_checkpoint(settings)) if settings.name == "wan" else None
    return [] if library is None else library.names()


def _named(can: Capabilities, settings: EngineSettings) -> Capabilities:
    return can.named(settings.served_name, settings.alias_names)


def find_checkpoint(settings: EngineSettings) -> Checkpoint:
    """The checkpoint that the settings name, for the wan or the sglang engine. Needs no torch. Raises ConfigError when
    it cannot be used."""
    _check_files(settings)
    files = {"transformer": settings.wan.transformer, "transformer_2": settings.wan.transformer_2}
    given = {name: file.expanduser() for name, file in files.items() if file is not None}
    return inspect(settings.model, files=given, is_for_another_engine=settings.name == "sglang")


def stored_bytes_of(settings: EngineSettings) -> int | None:
    """The size of the model's files of weights; None for an engine without a model. Needs no torch. Raises ConfigError
    when the model cannot be used.
    """
    settings = with_engine(settings)
    if settings.name == "fake":
        return None
    if settings.name == "diffusers":
        return _diffusers_model(settings).stored_bytes
    return find_checkpoint(settings).stored_bytes


def _create_fake(settings: EngineSettings) -> Engine:
    from kinema.engines.fake import FakeEngine  # noqa: PLC0415 - only when chosen

    # The default model belongs to the default engine; a name that somebody chose is kept.
    is_default = settings.model == EngineSettings().model
    name = settings.served_name or ("fake" if is_default else settings.model)
    return FakeEngine(name, aliases=[alias for alias in settings.alias_names if alias != name])


def _check_files(settings: EngineSettings) -> None:
    """Raises ConfigError where a transformer's file cannot be read here."""
    for name in _FILES_OF_ONE_MODEL:
        file = getattr(settings.wan, name)
        if file is not None and file.suffix.lower() == GGUF and importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"engine.wan.{name}: the package gguf is missing; pip install 'kinema[wan]'")


@reading_files()
def _check_loras(settings: EngineSettings) -> None:
    """Raises ConfigError for a folder of LoRAs that is not there."""
    for name, folder in (("wan", settings.wan.loras), ("diffusers", settings.diffusers.loras)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"engine.{name}.loras = '{folder}' is no folder; give one with safetensors files")


def _create_sglang(settings: EngineSettings) -> Engine:
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError("engine.name = 'sglang': the package sglang is missing; pip install 'kinema[sglang]'")
    from kinema.engines.sglang.engine import SglangEngine  # noqa: PLC0415 - only when chosen

    return SglangEngine(find_checkpoint(settings), settings)


def _create_diffusers(settings: EngineSettings) -> Engine:
    require_diffusers("engine.name = 'diffusers'")
    model = _diffusers_model(settings)
    _check_diffusers(settings)
    for package in model.family.packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{model.name}: diffusers needs the package {package} for it; pip install {package}")
    can, library = _named(model.capabilities(), settings), _diffusers_loras(settings, model)
    for difference in model.stated.differences:
        log.warning("%s", difference)

    def make() -> Engine:
        with without_collector():
            from kinema.engines.diffusers.engine import DiffusersEngine  # noqa: PLC0415 - loads torch
            from kinema.engines.diffusers.memory import Savings  # noqa: PLC0415 - the same

        own = settings.diffusers
        quantization = None if own.quantization == "none" else own.quantization
        return DiffusersEngine(
            model,
            settings.device,
            settings.dtype,
            vae_dtype=settings.vae_dtype,
            savings=Savings(settings.offload, settings.weights, own.vae_tiling, quantization),
            is_compiled=own.compile,
            loras=library,
        )

    current = (lambda: can) if library is None else partial(library.added_to, can)
    return DeferredEngine(current, settings.device, make)


def _diffusers_model(settings: EngineSettings) -> DiffusersModel:
    file = settings.diffusers.transformer
    if file is not None and file.suffix.lower() == GGUF:
        _require(("gguf",), "engine.diffusers.transformer", "wan")
    return inspect_for_diffusers(settings.model, None if file is None else file.expanduser())


def _check_diffusers(settings: EngineSettings) -> None:
    """Raises ConfigError for settings of the diffusers engine that need a package, a GPU or a compiler that is not
    there, and for two that do not go together."""
    own = settings.diffusers
    quantised = None if own.quantization == "none" else f"engine.diffusers.quantization = {own.quantization!r}"
    in_8_bits = None if settings.weights == "dtype" else f"engine.weights = {settings.weights!r}"
    file = None if own.transformer is None else "engine.diffusers.transformer"
    loras = None if own.loras is None else "engine.diffusers.loras"
    for one, other in ((loras, quantised), (loras, in_8_bits), (quantised, in_8_bits), (file, quantised)):
        if one is not None and other is not None:
            raise ConfigError(f"{one}: not with {other}; leave one of them out")
    if loras is not None:
        _require(("peft",), loras, "diffusers")
    if quantised is not None:
        is_bitsandbytes = own.quantization.startswith("bitsandbytes")
        _require(("bitsandbytes" if is_bitsandbytes else "torchao",), quantised, "quantization")
        if is_bitsandbytes and (settings.device == "cpu" or not has_nvidia()):
            raise ConfigError(f"{quantised}: bitsandbytes needs a CUDA GPU; on a CPU, torchao_int8 runs")
        if is_bitsandbytes and settings.offload not in ("auto", "none"):
            raise ConfigError(f"{quantised}: not with engine.offload = {settings.offload!r}; leave one of them out")
    if own.compile:
        refuse_moved_blocks(settings.offload, own.quantization)
        keep_kernels(settings)
        require_compiler()


def _diffusers_loras(settings: EngineSettings, model: DiffusersModel) -> LoraLibrary | None:
    """The LoRAs of the settings' folder. The library says whether one fits when it is loaded. Raises ConfigError."""
    _check_loras(settings)
    if settings.diffusers.loras is None:
        return None
    kept = None if settings.weights_cache_dir is None else settings.weights_cache_dir / _LORA_DIGESTS
    return LoraLibrary(settings.diffusers.loras, None, kept, has_two_experts=model.has_two_experts)


def _create_wan(settings: EngineSettings) -> Engine:
    require_wan()
    cache = settings.weights_cache_dir if settings.weights_cache else None
    checkpoint = replace(find_checkpoint(settings), cache=cache)
    # It refuses what cannot be split, before torch is imported.
    plan_of(settings.wan.gpus, settings.wan.parallel, checkpoint, _offload_of_wan(settings))
    can, library = _named(checkpoint.capabilities(), settings), library_of(settings, checkpoint)
    for difference in checkpoint.differences():
        log.warning("%s", difference)
    _log_missing(can, () if library is None else library.names())
    current = (lambda: can) if library is None else partial(library.added_to, can)
    return DeferredEngine(current, settings.device, partial(create_wan, settings, checkpoint, loras=library))


def _offload_of_wan(settings: EngineSettings) -> OffloadSetting:
    if settings.offload == "networks":
        raise ConfigError(
            "engine.offload = 'networks' is a way of the diffusers engine alone; give auto, none, text or blocks, or "
            "choose engine.name = 'diffusers'"
        )
    return settings.offload


def _log_missing(can: Capabilities, loras: Collection[str]) -> None:
    """One line for each tier whose LoRAs are not there."""
    for tier in can.tiers:
        if missing := tier.lora_names - set(loras):
            names = ", ".join(sorted(missing))
            log.warning("the tier %s is not offered: there is no LoRA that fits with the name %s", tier.name, names)


def library_of(settings: EngineSettings, checkpoint: Checkpoint) -> LoraLibrary | None:
    """The LoRAs of the checkpoint and of the settings' folder, as far as they fit; None where neither has a folder.
    Raises ConfigError."""
    _check_loras(settings)
    if settings.wan.loras is None and checkpoint.loras is None:
        return None
    kept = None if settings.weights_cache_dir is None else settings.weights_cache_dir / _LORA_DIGESTS
    fitting = {name: shapes(config) for name, config in checkpoint.transformers.items()}
    return LoraLibrary(settings.wan.loras, fitting, kept, own=checkpoint.loras)


def require_wan() -> None:
    """Raises ConfigError when a package that the wan engine needs is not installed."""
    _require(_WAN_PACKAGES, "engine.name = 'wan'", "wan")


def require_diffusers(wanted: str) -> None:
    """Raises ConfigError when a package that the diffusers engine needs, which is ``wanted``, is not installed."""
    _require(_DIFFUSERS_PACKAGES, wanted, "diffusers")


def require_reference() -> None:
    """Raises ConfigError when the libraries that the wan engine is compared with are not installed."""
    _require(("diffusers", "transformers"), "--against diffusers", "reference")


def _require(packages: Sequence[str], chosen: str, extra: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{chosen}: the package {package} is missing; pip install 'kinema[{extra}]'")


def keep_kernels(settings: EngineSettings) -> None:
    """Let Triton and torch.compile keep what they compile in the folder that the settings name, for this process and
    those of other ranks.

    Both take their folders from the environment alone. A folder that cannot be written is left out, with a line in the
    log: kernels then lie where they always do.
    """
    root = settings.kernels_dir
    if root is None:
        return
    folders = {"TRITON_CACHE_DIR": root} if has_nvidia() else {}
    if settings.diffusers.compile:
        folders["TORCHINDUCTOR_CACHE_DIR"] = root / "inductor"
    for name, folder in folders.items():
        if name in os.environ:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                os.environ[name] = str(folder)
        except OSError as exc:
            log.warning("compiled kernels are not kept in engine.kernels_dir: %s", exc)


def create_wan(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    load_components: LoadComponents | None = None,
    load_others: LoadTransformers | None = None,
    *,
    loras: LoraLibrary | None = None,
) -> WanEngine:
    """The wan engine for this checkpoint. ``load_components`` makes its components, and ``load_others`` the
    transformers of other ranks; by default both read its files. ``loras`` are by default those of ``library_of``.
    """
    keep_kernels(settings)
    started = time.perf_counter()
    if settings.device != "cpu":
        wake_gpu()
    with without_collector():
        from kinema.engines.wan.engine import WanEngine  # noqa: PLC0415 - loads torch, so only when chosen
        from kinema.engines.wan.loading import load_transformers  # noqa: PLC0415 - the same

    log.info("start: imports %.2f s", time.perf_counter() - started)
    return WanEngine(
        checkpoint,
        settings.device,
        settings.dtype,
        vae_dtype=settings.vae_dtype,
        attention=settings.wan.attention,
        linears=settings.wan.linears,
        offload=_offload_of_wan(settings),
        weights_dtype=settings.weights,
        has_step_cache=settings.wan.step_cache,
        has_graphs=settings.wan.cuda_graphs,
        gpus=settings.wan.gpus,
        parallel=settings.wan.parallel,
        memory_gb=settings.wan.memory_gb,
        loras=loras or library_of(settings, checkpoint),
        load_components=load_components,
        load_others=load_others or load_transformers,
    )
