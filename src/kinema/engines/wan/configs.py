"""The parts of a checkpoint's JSON files that Kinema reads, checked when they are read.

They decide what a model can make and how this engine computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kinema.engines.wan.other_names import similar_files
from kinema.engines.wan.safetensors_header import START_BYTES, in_place_of_file
from kinema.errors import ConfigError, InvalidRequest
from kinema.request.json_text import parse_file

M = TypeVar("M", bound=BaseModel)

# Memory and time are taken by what a file says, so it is bounded, far above any published model.
Width = Annotated[int, Field(ge=1, le=2**20)]
Channels = Annotated[int, Field(ge=1, le=2**14)]
Count = Annotated[int, Field(ge=1, le=1024)]
Factor = Annotated[int, Field(ge=1, le=64)]
Side = Annotated[int, Field(ge=1, le=2048)]
# As of a request.
Shift = Annotated[float, Field(ge=0.01, le=100)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]

# Published files have a few kB; the list of the shards of a large model has 100 kB.
_MAX_JSON_BYTES = 4 * 2**20
_MAX_JSON_DEPTH = 16
# A value or a name of a file is quoted up to this length.
_MAX_QUOTED_CHARS = 80
_MAX_PATH_CHARS = 300


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class IndexConfig(_Config):
    """``model_index.json``."""

    boundary_ratio: float | None = Field(None, ge=0, le=1)
    expand_timesteps: bool = False


class TransformerConfig(_Config):
    """``transformer/config.json``; the defaults are those of WanTransformer3DModel."""

    num_attention_heads: Count
    attention_head_dim: Count
    ffn_dim: Width = 13_824
    num_layers: Count = 40
    in_channels: Channels
    out_channels: Channels
    patch_size: tuple[Factor, Factor, Factor]
    text_dim: Width = 4096
    freq_dim: Channels = 256
    rope_max_seq_len: Channels = 1024
    eps: Epsilon = 1e-6
    # All published models have these norms.
    cross_attn_norm: Literal[True] = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    # Image-to-video models that also attend to CLIP's image states have both, and those that take two pictures have a
    # table of the positions of all their states.
    image_dim: Width | None = None
    added_kv_proj_dim: Width | None = None
    pos_embed_seq_len: Annotated[int, Field(ge=2, le=2**14)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Image states become as wide as tokens, and then keys and values."""
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise ValueError("image_dim and added_kv_proj_dim belong together")
        if self.added_kv_proj_dim not in (None, self.width):
            raise ValueError(f"added_kv_proj_dim must be the width of a token, which is {self.width}")
        if self.image_dim is None and self.pos_embed_seq_len is not None:
            raise ValueError("pos_embed_seq_len belongs to a model with image_dim")
        return self

    @property
    def has_image_channels(self) -> bool:
        """Whether it reads more channels than it predicts: those of given frames."""
        return self.in_channels != self.out_channels

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_pictures(self) -> int:
        """How many pictures' states the model attends to."""
        if self.image_dim is None:
            return 0
        return 1 if self.pos_embed_seq_len is None else 2


class VaeConfig(_Config):
    """``vae/config.json``; the defaults are those of AutoencoderKLWan, and so is the spelling."""

    base_dim: Channels = 96
    decoder_base_dim: Channels | None = None
    z_dim: Count = 16
    dim_mult: tuple[Factor, ...] = Field((1, 2, 4, 4), min_length=1, max_length=8)
    num_res_blocks: Factor = 2
    # No published model has attention besides that in the middle.
    attn_scales: tuple[()] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: Channels = 3
    out_channels: Channels = 3
    patch_size: Factor | None = None
    scale_factor_spatial: Factor = 8
    scale_factor_temporal: Factor = 4
    # Of Wan 2.1's VAE.
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Every level but the last halves the size, and each latent channel has its mean."""
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one value less than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std must have z_dim = {self.z_dim} numbers")
        if min(self.latents_std) <= 0:
            raise ValueError("latents_std must be greater than 0")
        return self

    @property
    def factors(self) -> tuple[int, int]:
        """How many pixels of a side, and frames, its layers make of one latent."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1), 2 ** sum(self.temperal_downsample)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels before the first level and after each of them."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels before the first level, which is the smallest in space, and after each of them."""
        base = self.decoder_base_dim or self.base_dim
        return tuple(base * factor for factor in (self.dim_mult[-1], *self.dim_mult[::-1]))


class TextEncoderConfig(_Config):
    """``text_encoder/config.json``; the defaults are those of UMT5Config."""

    model_type: Literal["umt5"] = "umt5"
    vocab_size: Width = 250_112
    d_model: Width = 512
    d_kv: Count = 64
    d_ff: Width = 1024
    num_layers: Count = 8
    num_heads: Count = 6
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**14)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=2**20)] = 128
    layer_norm_epsilon: Epsilon = 1e-6
    # Another one would be another network.
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"


class ImageEncoderConfig(_Config):
    """``image_encoder/config.json``; the defaults are those of CLIPVisionConfig."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    # The states are those before the last layer.
    num_hidden_layers: Annotated[int, Field(ge=2, le=1024)] = 12
    num_attention_heads: Count = 12
    num_channels: Literal[3] = 3
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Heads are equal parts of a token, and a picture has a patch."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.patch_size > self.image_size:
            raise ValueError("patch_size must not be larger than image_size")
        return self

    @property
    def num_tokens(self) -> int:
        """The number of states of a picture: one for each patch, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ShortestEdge(_Config):
    """The size of a picture by its shorter side."""

    model_config = ConfigDict(extra="forbid")

    shortest_edge: Side = 224


class CropSize(_Config):
    """The part of a picture that is kept."""

    height: Side = 224
    width: Side = 224


class ImageProcessorConfig(_Config):
    """``image_processor/preprocessor_config.json``; the defaults are those of CLIPImageProcessor."""

    do_resize: Literal[True] = True
    size: ShortestEdge = ShortestEdge()
    # Bicubic.
    resample: Literal[3] = 3
    do_center_crop: Literal[True] = True
    crop_size: CropSize = CropSize()
    do_rescale: Literal[True] = True
    rescale_factor: float = Field(1 / 255, gt=0, le=1)
    do_normalize: Literal[True] = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What is kept lies within the picture."""
        if max(self.crop_size.height, self.crop_size.width) > self.size.shortest_edge:
            raise ValueError("crop_size must not be larger than size")
        if min(self.image_std) <= 0:
            raise ValueError("image_std must be greater than 0")
        return self


class _SolverConfig(_Config):
    """What the solvers' configs share.

    A dynamic shift is refused, since it would be computed from the video's size in place of the request's
    ``flow_shift``.
    """

    num_train_timesteps: int = Field(1000, ge=10, le=100_000)
    shift_terminal: float | None = Field(None, ge=0, lt=1)
    use_dynamic_shifting: Literal[False] = False
    # No published model has noise levels of these kinds.
    use_karras_sigmas: Literal[False, None] = False
    use_exponential_sigmas: Literal[False, None] = False
    use_beta_sigmas: Literal[False, None] = False


class UniPCConfig(_SolverConfig):
    """``scheduler/scheduler_config.json`` of a UniPCMultistepScheduler; the defaults are its own."""

    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    flow_shift: Shift | None = None
    solver_order: Literal[1, 2] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: Literal[True] = True
    thresholding: Literal[False] = False
    disable_corrector: tuple[()] = ()
    solver_p: None = None
    lower_order_final: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @classmethod
    def of(cls, num_train_timesteps: int) -> Self:
        """The defaults, for flow matching."""
        return cls(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=num_train_timesteps)

    @property
    def own_shift(self) -> float | None:
        """The shift that the file names."""
        return self.flow_shift


class FlowMatchConfig(_SolverConfig):
    """``scheduler/scheduler_config.json`` of a FlowMatchEulerDiscreteScheduler or a FlowMatchLCMScheduler; the defaults
    are their own.
    """

    shift: Shift | None = None
    # Of the first alone: a step gives new noise, as the second does.
    stochastic_sampling: bool = False
    # Mochi alone has them.
    invert_sigmas: Literal[False] = False
    # Of the second alone: latents that grow from step to step.
    scale_factors: tuple[()] | None = None

    @property
    def own_shift(self) -> float | None:
        """The shift that the file names."""
        return self.shift


SolverName = Literal["unipc", "euler", "lcm"]
SolverConfig = UniPCConfig | FlowMatchConfig
SOLVER_NAMES: tuple[SolverName, ...] = get_args(SolverName)
# What diffusers calls them.
SOLVER_CLASSES: dict[str, type[UniPCConfig] | type[FlowMatchConfig]] = {
    "UniPCMultistepScheduler": UniPCConfig,
    "FlowMatchEulerDiscreteScheduler": FlowMatchConfig,
    "FlowMatchLCMScheduler": FlowMatchConfig,
}


def read_solver(values: Mapping[str, Any]) -> SolverConfig:
    """The config of a solver of a known class."""
    return SOLVER_CLASSES[values["_class_name"]].model_validate(values)


def solver_name(values: Mapping[str, Any]) -> SolverName:
    """The name of a solver of a known class: ``lcm`` gives the clean latents new noise, whichever class does it."""
    if SOLVER_CLASSES[values["_class_name"]] is UniPCConfig:
        return "unipc"
    is_noisy = values["_class_name"] == "FlowMatchLCMScheduler" or values.get("stochastic_sampling")
    return "lcm" if is_noisy else "euler"


def check_steps(
    solver: str | None, timesteps: Sequence[float] | None, num_inference_steps: int, num_train_timesteps: int
) -> None:
    """Raises ValueError, with one sentence, unless there is this solver, and the timesteps are one for each step, from
    noisy to clean. None is the checkpoint's own solver, or even steps.

    Timesteps are those before the shift: ``flow_shift`` moves them, and 1 leaves them as they are.
    """
    if solver is not None and solver not in SOLVER_NAMES:
        raise ValueError(f"solver {quoted(solver)} is not known; accepted: {', '.join(SOLVER_NAMES)}")
    if timesteps is None:
        return
    if len(timesteps) != num_inference_steps:
        raise ValueError(f"timesteps has {len(timesteps)} numbers for {num_inference_steps} steps; give one for each")
    is_falling = all(before > after for before, after in pairwise(timesteps))
    if not (is_falling and timesteps[0] <= num_train_timesteps and timesteps[-1] > 0):
        raise ValueError(f"timesteps must fall from at most {num_train_timesteps} to more than 0")


class ShardList(_Config):
    """``*.safetensors.index.json``: the file of each weight."""

    weight_map: dict[str, str]


@contextmanager
def reading_files() -> Iterator[None]:
    """Raises ConfigError for a path that this user may not look at, or that the system refuses, such as a long one."""
    try:
        yield
    except OSError as exc:
        raise ConfigError(f"{str(exc.filename)[:_MAX_PATH_CHARS]} cannot be read: {exc.strerror or exc}") from exc


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The object in the file ``name`` of the folder ``root``. Raises ConfigError when it cannot be read, and when it is
    larger or nested deeper than any published one."""
    require(root, name)
    try:
        with (root / name).open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES // 2**20} MiB")
        if kind := in_place_of_file(data[:START_BYTES]):
            raise ValueError(f"it is {kind}")
        value = parse_file(data.decode("utf-8-sig"))
        if _is_deep(value):
            raise ValueError(f"it is nested deeper than {_MAX_JSON_DEPTH} levels")
    except (OSError, ValueError, InvalidRequest) as exc:
        raise ConfigError(f"the model folder {root}: {name} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"the model folder {root}: {name} is not a JSON object")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        lists = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [inner for one in lists for inner in one]
        if not level:
            return False
    return True


def quoted(value: object) -> str:
    """A value of a file, as a sentence names it."""
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}..."


def require(root: Path, name: str, *, is_part: bool = False) -> None:
    """Raises ConfigError when the folder does not have the file, with what it has in its place.

    What lies beside a file that ``is_part`` of several is another part.
    """
    if (root / name).is_file():
        return
    if not is_part and (there := similar_files(root, name)):
        raise ConfigError(
            f"the model folder {root} has no {name}, and has {', '.join(there)}, which is not read under this name; "
            "give a folder in the layout of diffusers, or rename what is the same file"
        )
    raise ConfigError(f"the model folder {root} is incomplete: {name} is missing")


def validated(model: type[M], values: dict[str, Any], root: Path, name: str, *, is_strict: bool = False) -> M:
    """The values, validated by a model. Raises ConfigError with one sentence that names the file and the key.

    With ``is_strict``, a number in quotes is refused.
    """
    try:
        return model.model_validate(values, strict=is_strict)
    except InvalidRequest as exc:
        raise ConfigError(f"the model folder {root}: {name}: {exc.message}") from exc
    except ValidationError as exc:
        raise ConfigError(f"the model folder {root}: {name}: {explain(exc)}") from exc


def explain(exc: ValidationError) -> str:
    """The key and value of a file that are not valid, and why."""
    error = exc.errors()[0]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if not key:  # of several values together
        return error["msg"].removeprefix("Value error, ")
    return f"{key} = {quoted(error['input'])}: {error['msg']}"
