"""Find a checkpoint by its name and say, without torch, what it can make and whether it is whole.

A checkpoint is a folder in the diffusers layout. The bundled tiny model is one, and so is every
``Wan-AI/...-Diffusers`` repository of the hub. Its small JSON files say what the model can make, so a bad folder stops
the start in milliseconds, before a weight is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kinema.engines.wan.configs import (
    SOLVER_CLASSES,
    ImageEncoderConfig,
    ImageProcessorConfig,
    IndexConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    quoted,
    read_json,
    read_solver,
    reading_files,
    validated,
)
from kinema.engines.wan.presets import (
    MAX_TEXT_TOKENS,
    OVERRIDES,
    check_preset,
    check_tiers,
    limits_of,
    preset_of,
    tiers_of,
)
from kinema.engines.wan.single_file import config_of, read_transformer
from kinema.engines.wan.tokenizer_files import check_tokenizer
from kinema.engines.wan.weight_files import files_in_folder, refuse_quantised
from kinema.errors import ConfigError
from kinema.request.capabilities import Capabilities
from kinema.request.geometry import Geometry

BUNDLED = {"tiny-wan": Path(__file__).parent / "tiny", "tiny-wan-i2v": Path(__file__).parent / "tiny_i2v"}
# What a ``kinema.json`` may name as its base: a whole model of the package. So a folder from a stranger neither names a
# place of this machine nor starts a download.
_BASES = {"tiny-wan": BUNDLED["tiny-wan"]}
_BASE_KEY = "base"
# The files that are downloaded from the hub: weights as safetensors only, never a pickle, and only those in folders.
# Beside model_index.json, repositories may have the same model once more, as one file for other programs.
_HUB_FILES = ["*.json", "*/*.safetensors", "*/*.model", "*/*.txt"]
_NO_LIMIT = 10**9
# What diffusers calls a Wan checkpoint whose frames, if any are given, come among the tokens or in channels.
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
# Wan models with pipelines of their own, and the engine that runs each of them; None where no engine here does.
_OTHER_KINDS = {"VACE": "diffusers", "Animate": None, "S2V": None}
# The parts of a pipeline that are known, and the libraries whose classes they are. Any other one is code of a model's
# own, or belongs to a pipeline that no engine here knows.
_COMPONENTS = (
    *("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
    *("image_encoder", "image_processor"),
)
_LIBRARIES = ("diffusers", "transformers")
# The files in which transformers and diffusers look for code of the folder's own.
_CODE_KEY = "auto_map"
_CODE_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "scheduler_config.json")
_SOLVER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with its configs parsed.

    ``name`` is what clients call the model, unless the settings say otherwise: the bundled or hub name, or the folder's
    own name without its path, which is no client's business. ``base`` is the folder of the model whose components
    this one uses where it lacks them. ``solver`` is the scheduler's config as it was read. ``files`` has the file that
    is read in place of a transformer's folder, by the folder's name. ``cache`` is a folder where smaller copies of the
    weights may be kept (``weights_cache.py``).
    """

    name: str
    path: Path
    index: dict[str, Any]
    transformer: TransformerConfig
    # The low-noise expert of Wan 2.2 A14B.
    transformer_2: TransformerConfig | None
    text_encoder: TextEncoderConfig
    vae: VaeConfig
    solver: dict[str, Any]
    overrides: dict[str, Any]
    base: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    cache: Path | None = None
    # CLIP's, for a model whose transformer attends to pictures.
    image_encoder: ImageEncoderConfig | None = None
    image_processor: ImageProcessorConfig | None = None

    @property
    def is_expand_timesteps(self) -> bool:
        """Whether every token has its own timestep, so that a clean first frame can stand among noisy ones (Wan 2.2
        TI2V).
        """
        return bool(self.index.get("expand_timesteps", False))

    @property
    def num_image_keys(self) -> int:
        """How many states of pictures a transformer attends to; 0 without an image encoder."""
        return 0 if self.image_encoder is None else self.transformer.num_pictures * self.image_encoder.num_tokens

    @property
    def has_two_experts(self) -> bool:
        return self.transformer_2 is not None

    @property
    def transformers(self) -> dict[str, TransformerConfig]:
        """The transformer, or the two experts, by the name of its folder."""
        second = {} if self.transformer_2 is None else {"transformer_2": self.transformer_2}
        return {"transformer": self.transformer, **second}

    @property
    def loras(self) -> Path | None:
        """The folder of the LoRAs that came with the model, if there is one."""
        folder = self.path / "loras"
        return folder if folder.is_dir() else None

    @property
    def stored_bytes(self) -> int:
        """The size of all files of weights, as they are published. Raises ConfigError when one is missing."""
        return sum(
            file.stat().st_size for component in self.components_with_weights for file in self.weight_files(component)
        )

    @property
    def components_with_weights(self) -> list[str]:
        """All but the tokenizer and the solver."""
        image_encoder = ["image_encoder"] if is_component(self.index, "image_encoder") else []
        return [*self.transformers, "vae", "text_encoder", *image_encoder]

    def weight_files(self, component: str) -> list[Path]:
        """The component's file of weights, or all its shards. Raises ConfigError when one is missing."""
        own = self.files.get(component)
        return files_in_folder(self.root_of(component), component) if own is None else [own]

    def root_of(self, component: str) -> Path:
        """The model folder that the component's folder is in: this one's, or the base's."""
        return _root_of(self.path, self.base, component)

    @property
    def has_image_channels(self) -> bool:
        """Whether given frames come in channels beside the latents (Wan 2.1 and 2.2 image-to-video)."""
        return self.transformer.has_image_channels

    def differences(self) -> Iterator[str]:
        """A sentence for each value of the files that is not what the engine goes by. Raises ConfigError."""
        where = f"the model folder {self.path}"
        if self.has_two_experts and self.capabilities().preset.boundary_ratio is None:
            yield (
                f"{where}: model_index.json has two transformers and no boundary_ratio, so the second one takes no "
                f"step; {OVERRIDES} or a request may give it"
            )
        stated = read_json(self.root_of("tokenizer"), "tokenizer/tokenizer_config.json").get("model_max_length")
        # A tokenizer without a limit has 1e30.
        if isinstance(stated, int) and stated < _NO_LIMIT and stated != MAX_TEXT_TOKENS:
            yield (
                f"{where}: tokenizer/tokenizer_config.json: model_max_length is {stated}; prompts are read up to "
                f"{MAX_TEXT_TOKENS} tokens, as the Wan pipelines of diffusers do"
            )

    @property
    def geometry(self) -> Geometry:
        """A token is a patch of latents. The decoder makes of each latent frame after the first a chunk."""
        frames, *sides = self.transformer.patch_size
        return Geometry(
            token_pixels=math.prod(side * self.vae.scale_factor_spatial for side in sides),
            token_frames=frames * self.vae.scale_factor_temporal,
            chunk_frames=self.vae.scale_factor_temporal,
        )

    def capabilities(self) -> Capabilities:
        """What the model can make. Raises ConfigError for a ``kinema.json`` that does not fit."""
        overrides = dict(self.overrides)
        values = {
            "model": self.name,
            "engine": "wan",
            "is_text_to_video": not self.has_image_channels,
            "is_image_to_video": self.has_image_channels or self.is_expand_timesteps,
            # The first model that attends to pictures has learned to see one, and no last one beside it.
            "is_first_last_frame_to_video": self.has_image_channels and self.transformer.num_pictures != 1,
            # An edit gives a film as noisy latents, and no frame that must stay as it is.
            "is_video_to_video": not self.has_image_channels,
            "has_two_experts": self.has_two_experts,
            "encodes_whole_film": self.has_image_channels,
            "description": overrides.pop("description", ""),
            "tiers": tiers_of(self.path, overrides.pop("tiers", {})),
            "preset": preset_of(
                self.name, self.path, self.index, self.transformer, read_solver(self.solver), overrides
            ),
            "limits": limits_of(self.path, self.transformer, self.vae, overrides),
            "geometry": self.geometry,
        }
        can = validated(Capabilities, values, self.path, OVERRIDES)
        check_preset(self.path, can)
        check_tiers(self.path, can, read_solver(self.solver).num_train_timesteps)
        return can


@reading_files()
def inspect(name: str, *, files: Mapping[str, Path] | None = None, is_for_another_engine: bool = False) -> Checkpoint:
    """The checkpoint of this name: a bundled name, a folder, or a hub repository (downloaded when it is not cached).

    ``files`` are read in place of the transformers' folders. Raises ConfigError when it is not found, is incomplete
    (names the missing file), has code of its own, or is no Wan model; and for a model that this engine does not run,
    unless the checkpoint ``is_for_another_engine``.
    """
    name, path = locate(name)
    index = read_json(path, "model_index.json")
    if not is_for_another_engine:
        _check_pipeline(path, index)
    _check_components(path, index)
    base = _read_base(path)
    components = ["transformer", "vae", "text_encoder"]
    components += [name for name in ("transformer_2", "image_encoder") if is_component(index, name)]
    for component in components:
        if component not in (files or {}):
            root = _root_of(path, base, component)
            config = read_json(root, f"{component}/config.json")
            if not is_for_another_engine:
                refuse_quantised(root, component, config)
            files_in_folder(root, component)
    check_tokenizer(_root_of(path, base, "tokenizer"))
    checkpoint = read_configs(name, path, files)
    if not is_for_another_engine:
        _check_kind(checkpoint)
        _check_images(checkpoint)
    return checkpoint


def read_configs(name: str, path: Path, files: Mapping[str, Path] | None = None) -> Checkpoint:
    """The checkpoint that a folder's configs describe, without a look for its weights; of ``files`` the headers are
    read. Raises ConfigError."""
    index = read_json(path, "model_index.json")
    validated(IndexConfig, index, path, "model_index.json")
    files = files or {}
    if "transformer_2" in files and not is_component(index, "transformer_2"):
        raise ConfigError(
            f"engine.wan.transformer_2 = {str(files['transformer_2'])!r} is for a model with two experts, and the "
            f"model in {path} has one transformer; give the file as engine.wan.transformer"
        )
    base = _read_base(path)
    root = partial(_root_of, path, base)

    def transformer(component: str) -> TransformerConfig:
        return _transformer(root(component), component, files)

    first = transformer("transformer")
    return Checkpoint(
        name=name,
        path=path,
        index=index,
        transformer=first,
        transformer_2=transformer("transformer_2") if is_component(index, "transformer_2") else None,
        text_encoder=_read_text_encoder(root("text_encoder")),
        vae=_read_vae(root("vae")),
        solver=_read_solver(root("scheduler")),
        overrides={key: value for key, value in _read_overrides(path).items() if key != _BASE_KEY},
        base=base,
        files=dict(files),
        **(_read_images(path) if first.image_dim is not None and is_component(index, "image_encoder") else {}),
    )


@reading_files()
def pipeline_of(name: str) -> str | None:
    """The class of pipeline that the model of this name says that it is of; None where it names none. Raises
    ConfigError when the model is not found."""
    found = read_json(locate(name)[1], "model_index.json").get("_class_name")
    return found if isinstance(found, str) else None


def _read_overrides(root: Path) -> dict[str, Any]:
    return read_json(root, OVERRIDES) if (root / OVERRIDES).exists() else {}


def _read_base(root: Path) -> Path | None:
    """The folder of the model that ``kinema.json`` names as the base; None without one. Raises ConfigError."""
    name = _read_overrides(root).get(_BASE_KEY)
    if name is None:
        return None
    if not isinstance(name, str) or name not in _BASES:
        raise ConfigError(
            f"the model folder {root}: {OVERRIDES}: {_BASE_KEY} = {quoted(name)}; it may be one of: {', '.join(_BASES)}"
        )
    return _BASES[name]


def _root_of(root: Path, base: Path | None, component: str) -> Path:
    return root if base is None or (root / component).is_dir() else base


def _check_kind(checkpoint: Checkpoint) -> None:
    """Raises ConfigError for channels that no known model has."""
    root, latents = checkpoint.path, checkpoint.vae.z_dim
    with_image = checkpoint.vae.scale_factor_temporal + 2 * latents
    for name, transformer in checkpoint.transformers.items():
        file = f"the model folder {root}: {name}/config.json"
        if transformer.out_channels != latents:
            raise ConfigError(f"{file}: out_channels = {transformer.out_channels}, and the VAE has z_dim = {latents}")
        if transformer.in_channels not in (latents, with_image):
            raise ConfigError(
                f"{file}: in_channels = {transformer.in_channels}; the wan engine runs text-to-video with {latents}, "
                f"and image-to-video with {with_image}"
            )
        if transformer.in_channels != checkpoint.transformer.in_channels:
            first = checkpoint.transformer.in_channels
            raise ConfigError(f"{file}: in_channels = {transformer.in_channels}, and the first expert has {first}")


def _check_pipeline(root: Path, index: dict[str, Any]) -> None:
    """Raises ConfigError for a checkpoint that says that it is another pipeline's: its parts may be those of a Wan
    model, and be meant for another solver."""
    found = index.get("_class_name")
    if found is not None and found not in PIPELINES:
        accepted = ", ".join(PIPELINES)
        raise ConfigError(
            f"the model folder {root}: model_index.json: _class_name is {quoted(found)}; the wan engine runs {accepted}"
            f"{_also(found)}"
        )


def _also(class_name: object) -> str:
    """What to add to the refusal of a class of diffusers."""
    kind = next((kind for kind in _OTHER_KINDS if f"Wan{kind}" in str(class_name)), None)
    if kind is None:
        return ""
    engine = _OTHER_KINDS[kind]
    return f", and {f'the engine {engine}' if engine else 'no engine of this version'} runs Wan {kind}"


def _check_components(root: Path, index: dict[str, Any]) -> None:
    """Raises ConfigError for a part that no engine knows, and for code of the folder's own, which is never run."""
    for name, entry in index.items():
        if name.startswith("_") or not is_component(index, name):
            continue
        library = next(iter(entry), None)
        if name not in _COMPONENTS:
            raise ConfigError(
                f"the model folder {root}: model_index.json: {quoted(name)} is no part of a Wan pipeline; known are "
                f"{', '.join(_COMPONENTS)}"
            )
        if library not in _LIBRARIES:
            raise ConfigError(
                f"the model folder {root}: model_index.json: {name} is of the library {quoted(library)}; only "
                f"{' and '.join(_LIBRARIES)} are known, and code of a model's own is never run"
            )
    for component in _COMPONENTS:
        refuse_own_code(root, component)


def refuse_own_code(root: Path, component: str) -> None:
    """Raises ConfigError when a component's files name code of the folder's own."""
    for name in (f"{component}/{file}" for file in _CODE_FILES):
        if (root / name).is_file() and read_json(root, name).get(_CODE_KEY):
            raise ConfigError(
                f"the model folder {root}: {name}: {_CODE_KEY} names code of the model's own, which is never run; "
                "give a model of the libraries' own classes"
            )


def is_component(index: dict[str, Any], name: str) -> bool:
    """Whether the model has the component; model_index.json lists an absent one as [null, null]."""
    entry = index.get(name)
    return isinstance(entry, list) and entry != [None, None]


def locate(name: str) -> tuple[str, Path]:
    """The model's name and its folder, which is downloaded when it is a hub name. Raises ConfigError."""
    if name in BUNDLED:
        return name, BUNDLED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return _name_of(path), path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = ", ".join(BUNDLED)
        raise ConfigError(f"engine.model = {name!r}: no such folder; give a folder, a hub name or one of: {known}")
    return name, _download(name)


def _name_of(path: Path) -> str:
    """The folder's own name, or that of the link to it.

    A folder of the hub's cache (models--ORG--NAME/snapshots/COMMIT) is named by a commit, and called as on the hub.
    """
    folder = Path(os.path.abspath(path))
    kind, _, published = folder.parent.parent.name.partition("--")
    if folder.parent.name == "snapshots" and kind == "models" and published:
        return published.replace("--", "/", 1)
    return folder.name


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub names need the hub's client

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as exc:
        raise ConfigError(f"engine.model = {name!r}: hub names need pip install 'kinema[wan]'") from exc
    except Exception as exc:  # the hub client raises many kinds; all mean that there is no folder
        raise ConfigError(f"engine.model = {name!r}: no such folder, and the hub did not give it: {exc}") from exc


def _transformer(root: Path, component: str, files: Mapping[str, Path]) -> TransformerConfig:
    """The config of a transformer: of its folder, which the file in its place must fit, or of the file alone."""
    is_described = (root / component / "config.json").is_file()
    published = _read_transformer(root, component) if is_described or component not in files else None
    if (file := files.get(component)) is None:
        assert published is not None
        return published
    setting = f"engine.wan.{component}"
    return config_of(read_transformer(file, setting), published, f"{setting} = {str(file)!r}")


def _read_transformer(root: Path, component: str) -> TransformerConfig:
    name = f"{component}/config.json"
    values = read_json(root, name)
    _check_class(values, ("WanTransformer3DModel",), root, name)
    return validated(TransformerConfig, values, root, name)


def _read_text_encoder(root: Path) -> TextEncoderConfig:
    name = "text_encoder/config.json"
    return validated(TextEncoderConfig, read_json(root, name), root, name)


def _read_vae(root: Path) -> VaeConfig:
    name = "vae/config.json"
    values = read_json(root, name)
    if "_class_name" in values:
        _check_class(values, ("AutoencoderKLWan",), root, name)
    return validated(VaeConfig, values, root, name)


def _read_images(root: Path) -> dict[str, Any]:
    """The configs of the image encoder and its processor."""
    encoder, processor = "image_encoder/config.json", "image_processor/preprocessor_config.json"
    return {
        "image_encoder": validated(ImageEncoderConfig, read_json(root, encoder), root, encoder),
        "image_processor": validated(ImageProcessorConfig, read_json(root, processor), root, processor),
    }


def _check_images(checkpoint: Checkpoint) -> None:
    """Raises ConfigError where the image encoder does not give what the transformer reads."""
    root, transformer = f"the model folder {checkpoint.path}", checkpoint.transformer
    encoder, processor = checkpoint.image_encoder, checkpoint.image_processor
    if any(other.image_dim != transformer.image_dim for other in checkpoint.transformers.values()):
        raise ConfigError(f"{root}: one of the two transformers has image_dim, or both have another one")
    if transformer.image_dim is None:
        return
    if not checkpoint.has_image_channels:
        raise ConfigError(f"{root}: transformer/config.json: the model has image_dim, and no channels of given frames")
    if encoder is None or processor is None:
        raise ConfigError(f"{root}: the transformer has image_dim, and model_index.json names no image_encoder")
    if encoder.hidden_size != transformer.image_dim:
        raise ConfigError(
            f"{root}: transformer/config.json: image_dim = {transformer.image_dim}, and the image encoder has "
            f"hidden_size = {encoder.hidden_size}"
        )
    if transformer.pos_embed_seq_len not in (None, 2 * encoder.num_tokens):
        raise ConfigError(
            f"{root}: transformer/config.json: pos_embed_seq_len = {transformer.pos_embed_seq_len}, and two pictures "
            f"have {2 * encoder.num_tokens} states"
        )
    crop = processor.crop_size
    if not crop.height == crop.width == encoder.image_size:
        raise ConfigError(
            f"{root}: image_processor/preprocessor_config.json: crop_size is {crop.height}x{crop.width}, and the image "
            f"encoder has image_size = {encoder.image_size}"
        )


def _read_solver(root: Path) -> dict[str, Any]:
    values = read_json(root, _SOLVER)
    found = _check_class(values, tuple(SOLVER_CLASSES), root, _SOLVER)
    validated(SOLVER_CLASSES[found], values, root, _SOLVER)
    return values


def _check_class(config: dict[str, Any], accepted: tuple[str, ...], root: Path, name: str) -> str:
    found = config.get("_class_name")
    if found not in accepted:
        raise ConfigError(
            f"the model folder {root}: {name}: _class_name is {quoted(found)}; the wan engine runs "
            f"{', '.join(accepted)}{_also(found)}"
        )
    return str(found)
