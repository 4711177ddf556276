"""Read a pipeline's weights: in which types, by which quantiser, and a transformer from a file of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kinema.engines.diffusers.families import DENOISERS
from kinema.engines.diffusers.model_folder import Model
from kinema.engines.wan.checkpoint import is_component
from kinema.engines.wan.lora.header import told
from kinema.engines.wan.safetensors_header import read_header
from kinema.engines.wan.weight_files import GGUF, files_in_folder, names_in_folder, variant_of
from kinema.errors import ConfigError

# The library that quantises, and the numbers that it keeps.
Quantization = Literal["torchao_int8", "torchao_fp8", "bitsandbytes_8bit", "bitsandbytes_4bit"]
_TEXT_ENCODERS = "text_encoder"
# The types of a file's tensors that a network may be read in.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_pipeline(
    model: Model, dtype: torch.dtype, vae_dtype: torch.dtype, quantization: Quantization | None = None
) -> Any:  # noqa: ANN401 - of diffusers
    """The pipeline of the folder, from safetensors only. Raises OSError or ValueError for a folder that is broken."""
    import diffusers  # noqa: PLC0415 - seconds, and not for a pipeline that is given

    quantised = {} if quantization is None else _quantised_parts(model, quantization, dtype)
    more = _read_encoders(model, dtype, quantised)
    if model.transformer is not None:
        more["transformer"] = _read_file(model, dtype)
    if quantised:
        more["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=quantised)
    pipeline = getattr(diffusers, model.pipeline).from_pretrained(
        model.path,
        dtype={"default": dtype, "vae": vae_dtype},
        use_safetensors=True,
        variant=model.variant(),
        local_files_only=True,
        **more,
    )
    for name, network in pipeline.components.items():
        if isinstance(network, diffusers.ModelMixin) and not (name == "transformer" and model.transformer is not None):
            _check_whole(model, name, network)
    return pipeline


def _read_encoders(model: Model, dtype: torch.dtype, quantised: Mapping[str, Any]) -> dict[str, Any]:
    """The networks of transformers, as a pipeline reads them. That library knows which tensors it has drawn random
    numbers for, and tells a pipeline nothing. Raises ConfigError for such."""
    import transformers  # noqa: PLC0415 - its caller's import has brought it

    read = {}
    for name, entry in model.index.items():
        if not is_component(model.index, name) or entry[0] != "transformers":
            continue
        kind: Any = getattr(transformers, entry[1], None)
        is_network = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if not is_network:
            continue
        read[name], info = kind.from_pretrained(
            model.path / name,
            dtype=dtype,
            use_safetensors=True,
            variant=variant_of(files_in_folder(model.path, name)[0]),
            local_files_only=True,
            output_loading_info=True,
            quantization_config=quantised.get(name),
        )
        if missing := info["missing_keys"]:
            raise _lacks(model, name, missing)
    return read


def _check_whole(model: Model, name: str, network: nn.Module) -> None:
    """Raises ConfigError for weights that the folder's files lack: the library would draw random ones in their place.

    A tensor may have an older name in them.
    """
    if type(network).__name__ != model.index[name][1]:  # the pipeline has put it together of several
        return
    stored, needed = names_in_folder(model.path, name), {name for name, _ in network.named_parameters()}
    missing = needed - stored
    if len(missing) > len(stored - needed):
        raise _lacks(model, name, missing)


def _lacks(model: Model, name: str, missing: Iterable[str]) -> ConfigError:
    return ConfigError(f"the model folder {model.path}: {name} lacks some of its weights: {told(sorted(missing))}")


def _read_file(model: Model, dtype: torch.dtype) -> nn.Module:
    """The transformer in a file of its own, with the config of the folder. Raises ConfigError for another one."""
    import diffusers  # noqa: PLC0415 - its caller has imported it

    assert model.transformer is not None
    name = str(model.index["transformer"][1])
    where = f"engine.diffusers.transformer = {str(model.transformer)!r}"
    network = getattr(diffusers, name)
    if not hasattr(network, "from_single_file"):
        raise ConfigError(f"{where}: diffusers reads no {name} from one file; leave the setting out")
    is_gguf = model.transformer.suffix.lower() == GGUF
    try:
        read: nn.Module = network.from_single_file(
            str(model.transformer),
            config=str(model.path),
            subfolder="transformer",
            dtype=dtype if is_gguf else _stored_dtype(model.transformer, dtype),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype) if is_gguf else None,
            local_files_only=True,
        )
    except NotImplementedError as exc:  # a tensor that was never read is moved
        raise ConfigError(f"{where} is not the {name} of {model.name}: it lacks some of its weights") from exc
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as exc:
        reason = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise ConfigError(f"{where} is not the {name} of {model.name}: {reason}") from exc
    if any(tensor.is_meta for tensor in read.parameters()):
        raise ConfigError(f"{where} is not the {name} of {model.name}: it lacks some of its weights")
    return read if is_gguf else _as_from_folder(read, model, dtype)


def _stored_dtype(file: Path, otherwise: torch.dtype) -> torch.dtype:
    """The type that most of a file's bytes have; ``otherwise`` where that is none that is computed in."""
    num_bytes: Counter[str] = Counter()
    for entry in read_header(file).entries.values():
        num_bytes[entry.dtype] += entry.size
    return _DTYPES.get(max(num_bytes, key=num_bytes.__getitem__, default=""), otherwise)


def _as_from_folder(read: nn.Module, model: Model, dtype: torch.dtype) -> nn.Module:
    """A network as the library reads it from a folder. From a file it gives all tensors one type, also those that its
    class keeps in float32 and those that are computed, like the frequencies of positions."""
    from accelerate import init_empty_weights  # noqa: PLC0415 - with such a file alone

    kind: Any = type(read)
    with init_empty_weights():
        network: nn.Module = kind.from_config(kind.load_config(str(model.path), subfolder="transformer"))
    kept = kind._keep_in_fp32_modules or ()
    tensors = {
        name: tensor.to(torch.float32 if set(kept).intersection(name.split(".")) else dtype)
        for name, tensor in read.state_dict().items()
    }
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def _quantised_parts(model: Model, quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """How each network that denoises or reads texts is quantised: by the same means, which both libraries have."""
    import diffusers  # noqa: PLC0415 - its caller has imported it
    import transformers  # noqa: PLC0415 - seconds

    parts = {}
    for name, entry in model.index.items():
        if not isinstance(entry, list) or entry[0] is None or not name.startswith((*DENOISERS, _TEXT_ENCODERS)):
            continue
        library = transformers if entry[0] == "transformers" else diffusers
        parts[name] = _config(library, quantization, dtype)
    return parts


def _config(library: Any, quantization: Quantization, dtype: torch.dtype) -> Any:  # noqa: ANN401 - of two libraries
    match quantization:
        case "bitsandbytes_8bit":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        case "bitsandbytes_4bit":
            return library.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case "torchao_int8":
            from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - only where it is chosen

            return library.TorchAoConfig(Int8WeightOnlyConfig())
        case "torchao_fp8":
            from torchao.quantization import Float8WeightOnlyConfig  # noqa: PLC0415 - the same

            return library.TorchAoConfig(Float8WeightOnlyConfig())
