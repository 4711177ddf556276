"""Train the transformer of tiny-wan-i2v: .venv/bin/python -m training.tiny.image_to_video --out runs/tiny --seconds 300

It learns to animate a first frame, or to lead from a first frame to a last one, which it reads in channels beside the
noise as Wan 2.2 I2V does. The autoencoder and the text encoder are those of `--start-from`, as they are.
Everything else is `denoiser`'s. Writes OUT/image_to_video.pt.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.tiny.denoiser import Trainer, draw_sigmas, make_parser, train
from training.tiny.fast import FastVae
from training.tiny.latents import Encoder, GivenEncoder
from training.tiny.networks import IMAGE_TRANSFORMER_CONFIG, LATENT_CHANNELS, MASK_CHANNELS, make_transformer


class ImageTrainer(Trainer):
    file = "image_to_video.pt"
    ring_channels = LATENT_CHANNELS + MASK_CHANNELS + LATENT_CHANNELS

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        return {"transformer": self.transformer}

    def _networks(self) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
        encoder = UMT5EncoderModel.from_pretrained(
            self.options.start_from, subfolder="text_encoder", dtype=torch.float32
        )
        transformer = make_transformer(IMAGE_TRANSFORMER_CONFIG)
        if self.options.go_on_from:
            exported = WanTransformer3DModel.from_pretrained(self.options.go_on_from, subfolder="transformer")
            transformer.load_state_dict(exported.float().state_dict())
        return transformer.to(self.device).train(), encoder.to(self.device).requires_grad_(False).eval()

    def _encoder(self) -> Encoder:
        vae = AutoencoderKLWan.from_pretrained(self.options.start_from, subfolder="vae").to(self.device)
        fast = FastVae(vae.requires_grad_(False), is_channels_last=self.device.type == "cuda")
        return GivenEncoder(fast, vae.config.latents_mean, vae.config.latents_std, self.device)

    def _loss(self, clips: Tensor, tokens: Tensor) -> Tensor:
        clean, given = clips[:, :LATENT_CHANNELS], clips[:, LATENT_CHANNELS:]
        n, device = len(clean), clean.device
        sigma, noise = draw_sigmas(n, device), torch.randn_like(clean)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        is_at_zero = torch.zeros(n, dtype=torch.bool, device=device)  # every token has the time of its clip
        text = self._text(self._choose_words(tokens, n))
        predicted = self.fast(torch.cat([mixed, given], dim=1), sigma * 1000, is_at_zero, text)
        return (predicted.float() - (noise - clean)).square().mean()


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    parser = make_parser(__doc__)
    parser.set_defaults(start_from="src/kinema/engines/wan/tiny")
    parser.add_argument("--go-on-from", help="folder of an exported tiny-wan-i2v, whose transformer learns on")
    train(ImageTrainer(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
