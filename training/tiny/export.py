"""Export the trained model: .venv/bin/python -m training.tiny.export --out runs/tiny --to src/kinema/engines/wan/tiny
With --image-to-video it writes tiny-wan-i2v: OUT/image_to_video.pt and no parts that it has of tiny-wan.

Takes OUT/vae.pt and OUT/denoiser.pt (or what is already in the folder, for a part that was not trained anew) and
writes the standard diffusers folder, float16, that `WanPipeline.from_pretrained` reads.
The model card and kinema.json beside it are written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from training.tiny.language import vocabulary
from training.tiny.networks import IMAGE_TRANSFORMER_CONFIG, make_text_encoder, make_transformer, make_vae

# Known to transformers 4 and 5 alike; 5 would write the new name of its base class.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", TOKENIZER_CLASS],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def export_vae(state: dict[str, Any], folder: Path) -> None:
    vae = make_vae()
    vae.load_state_dict(state["model"])
    vae.register_to_config(latents_mean=_rounded(state["latents_mean"]), latents_std=_rounded(state["latents_std"]))
    vae.half().save_pretrained(folder / "vae")


def export_denoiser(state: dict[str, Any], folder: Path) -> None:
    transformer, encoder = make_transformer(), make_text_encoder(len(vocabulary()))
    transformer.load_state_dict(state["transformer"])
    encoder.load_state_dict(state["text_encoder"])
    transformer.half().save_pretrained(folder / "transformer")
    encoder.half().save_pretrained(folder / "text_encoder")
    _edit(folder / "text_encoder" / "config.json", dtype="float32", torch_dtype="float32")


def export_image_to_video(state: dict[str, Any], folder: Path) -> None:
    """The transformer alone: `kinema.json` beside it names the model that has the other parts."""
    transformer = make_transformer(IMAGE_TRANSFORMER_CONFIG)
    transformer.load_state_dict(state["transformer"])
    transformer.half().save_pretrained(folder / "transformer")
    changes = {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": False, "image_encoder": [None, None]}
    _write(folder / "model_index.json", INDEX | changes)


def export_tokenizer(folder: Path) -> None:
    """Words of letters and digits, lower-cased; everything between them is dropped."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z0-9]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": TOKENIZER_CLASS, "model_max_length": 512, "clean_up_tokenization_spaces": False}
    config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    _write(folder / "tokenizer_config.json", config)


def export_pipeline(folder: Path) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2, solver_type="bh2"
    )
    scheduler.save_pretrained(folder / "scheduler")
    _write(folder / "model_index.json", INDEX)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _edit(path: Path, **changes: str) -> None:
    """Change a written config; None removes the key. The folder's own path is never kept."""
    value = json.loads(path.read_text()) | changes
    value.pop("_name_or_path", None)
    _write(path, value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="the folder where training wrote vae.pt and denoiser.pt")
    parser.add_argument("--to", default="src/kinema/engines/wan/tiny", help="the folder of the checkpoint")
    parser.add_argument("--image-to-video", action="store_true", help="the transformer that needs a first frame")
    options = parser.parse_args(arguments)
    trained, folder = Path(options.out), Path(options.to)
    if options.image_to_video:
        file = trained / "image_to_video.pt"
        if not file.exists():
            parser.error(f"--out {trained} has no {file.name}; name the folder where training wrote it")
        export_image_to_video(torch.load(file, map_location="cpu", weights_only=False), folder)
        return
    exports = {"vae.pt": (export_vae, "vae"), "denoiser.pt": (export_denoiser, "transformer")}
    found = [name for name in exports if (trained / name).exists()]
    if not found:
        parser.error(f"--out {trained} has neither vae.pt nor denoiser.pt; name the folder where training wrote them")
    for name, (_, part) in exports.items():
        if name not in found and not (folder / part).exists():
            parser.error(f"--out {trained} has no {name}, and --to {folder} has no {part} from an earlier export")
    for name in found:
        exports[name][0](torch.load(trained / name, map_location="cpu", weights_only=False), folder)
    export_tokenizer(folder / "tokenizer")
    export_pipeline(folder)


if __name__ == "__main__":
    main()
