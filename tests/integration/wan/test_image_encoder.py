"""Our image encoder and its processor give, bit for bit, what those of transformers give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.engines.wan.configs import ImageEncoderConfig, ImageProcessorConfig
from kinema.engines.wan.image_encoder import ImageEncoder, alias_of, shapes, to_pixels
from kinema.engines.wan.streaming import BlockStream

if TYPE_CHECKING:
    from transformers import CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES: list[dict[str, Any]] = [
    {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "gelu",
    },
    {  # patches that do not cover the picture, and the other activation
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 30,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-3,
    },
]
PUBLISHED = ImageProcessorConfig()
# Heights and widths, landscape and portrait, some of which give a longer side that is no whole number.
PICTURES = [(224, 224), (480, 832), (833, 477), (64, 64), (31, 500), (720, 1280), (1001, 333)]


def library_encoder(**size: Any) -> CLIPVisionModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    module = CLIPVisionModel(CLIPVisionConfig(**size)).eval()
    for parameter in module.parameters():  # biases and gains away from what they begin as
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def library_processor(**values: Any) -> CLIPImageProcessorPil:
    """The one that diffusers gets without torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**values)


def encoder(module: CLIPVisionModel, processor: ImageProcessorConfig = PUBLISHED) -> ImageEncoder:
    config = ImageEncoderConfig.model_validate(module.config.to_dict())
    stored = module.state_dict()
    return ImageEncoder(config, processor, {name: stored[alias_of(name)] for name in shapes(config)})


def picture(height: int, width: int) -> np.ndarray:
    """Noise, whose smaller versions have all values."""
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=["gelu", "quick gelu"])
@torch.inference_mode()
def test_every_bit_is_that_of_transformers(size: dict[str, Any], dtype: torch.dtype) -> None:
    """Of the states before the last layer, for one picture and for two."""
    module = library_encoder(**size).to(dtype)
    ours = encoder(module)
    for count in (1, 2):
        side = size["image_size"]
        pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        theirs = module(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(ours.states(pixels), theirs)


@pytest.mark.parametrize("size", SIZES, ids=["gelu", "quick gelu"])
def test_names_and_shapes_are_those_of_the_module(size: dict[str, Any]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in library_encoder(**size).state_dict().items()}
    found = shapes(ImageEncoderConfig.model_validate(size))
    assert {alias_of(name): shape for name, shape in found.items()} == expected


@pytest.mark.parametrize(("height", "width"), PICTURES)
def test_pixels_are_those_of_the_processor(height: int, width: int) -> None:
    data = picture(height, width)
    for values in (
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 31}, "image_std": [0.5] * 3},
    ):
        theirs = library_processor(**values)(images=Image.fromarray(data), return_tensors="pt").pixel_values
        assert torch.equal(to_pixels(ImageProcessorConfig.model_validate(values), data)[None], theirs)


def test_the_processors_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    library_processor().save_pretrained(tmp_path)
    text = (tmp_path / "preprocessor_config.json").read_text(encoding="utf-8")
    assert ImageProcessorConfig.model_validate_json(text) == PUBLISHED


def test_two_pictures_have_the_states_of_each_in_turn() -> None:
    """As diffusers joins them."""
    module = library_encoder(**SIZES[0])
    values = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    own, data = encoder(module, ImageProcessorConfig.model_validate(values)), [picture(64, 48), picture(64, 50)]
    pixels = library_processor(**values)(images=[Image.fromarray(one) for one in data], return_tensors="pt")
    with torch.inference_mode():
        theirs = module(**pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(own(data), theirs.flatten(0, 1)[None])


def test_layers_in_the_hosts_memory_have_the_same_bits() -> None:
    module = library_encoder(**SIZES[1])
    values = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    processor = ImageProcessorConfig.model_validate(values)
    whole, kept = encoder(module, processor), encoder(module, processor)
    stream = BlockStream(torch.device("cpu"), is_kept=False)
    with torch.inference_mode():
        kept.keep_in_host(stream)
    assert torch.equal(kept([picture(40, 60)]), whole([picture(40, 60)]))
    assert stream.num_bytes == 0
    assert 0 < kept.device_bytes < whole.device_bytes
