"""Train the LoRA `outlined`: .venv/bin/python -m training.tiny.style --out runs/tiny --seconds 160 --compile

Flow matching as in `denoiser`, on clips whose shapes are drawn as outlines; the words do not say so. Only the LoRA is
trained, for an exported checkpoint (`--start-from`).
Writes OUT/outlined.safetensors, and OUT/outlined.pt from which `--resume` goes on.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel

from training.tiny.denoiser import Trainer, make_parser, train
from training.tiny.fast import Changed
from training.tiny.latents import Encoder
from training.tiny.lora import Adapter


class StyleTrainer(Trainer):
    """The denoiser's training, with everything frozen but a LoRA."""

    file = "outlined.pt"

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        return {"lora": self.adapter}

    def _networks(self) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
        transformer, encoder = super()._networks()
        self.adapter = Adapter(transformer.requires_grad_(False), self.options.rank)
        return transformer, encoder.requires_grad_(False)

    def _encoder(self) -> Encoder:
        encoder = super()._encoder()
        encoder.is_outlined = True
        return encoder

    def _changed(self) -> Changed:
        return self.adapter.weights()

    def save(self) -> None:
        super().save()
        if self.ranks.rank == 0:
            self.optimiser.swap_averages()
            self.adapter.save(self.path.with_suffix(".safetensors"))
            self.optimiser.swap_averages()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rank", type=int, default=6)
    parser.set_defaults(start_from="src/kinema/engines/wan/tiny", adam_lr=2e-3, average=0.99, seconds=160)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    train(StyleTrainer(parse(arguments)))


if __name__ == "__main__":
    main()
