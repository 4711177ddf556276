"""Train the transformer and its text encoder: .venv/bin/python -m training.tiny.denoiser --out runs/tiny --seconds 900

Flow matching on latents of OUT/vae.pt: the network sees a mixture of clip and noise and predicts noise minus clip.
A third of the clips come with a clean first frame (image to video), a tenth without words (guidance).
`torchrun --nproc-per-node 2 -m training.tiny.denoiser ...` trains on two devices (see `ranks`).
Writes OUT/denoiser.pt; `--resume` goes on from it, `--start-from FOLDER` from an exported checkpoint's weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.tiny.fast import Changed, FastTextEncoder, FastTransformer, FastVae, Text, embed_text
from training.tiny.language import END, MAX_TOKENS, Speaker, vocabulary
from training.tiny.latents import Encoder, Ring
from training.tiny.networks import LATENT_CHANNELS, make_text_encoder, make_transformer, make_vae
from training.tiny.optimiser import Optimiser, average_decay, learning_rate_share
from training.tiny.ranks import Ranks
from training.tiny.stream import CAPTIONS, Format, batches

# Shares of the steps; every step has about as many tokens, hence more of the smaller clips.
ALL_FORMATS = [
    Format(33, 128, 128, 0.38),
    Format(25, 128, 128, 0.08),
    Format(17, 128, 128, 0.16),
    Format(9, 128, 128, 0.08),
    Format(5, 128, 128, 0.04),
    Format(1, 128, 128, 0.02),
    Format(65, 128, 128, 0.03),
    Format(33, 96, 160, 0.04),
    Format(33, 160, 96, 0.04),
    Format(17, 192, 192, 0.05),
    Format(9, 256, 256, 0.05),
    Format(17, 256, 256, 0.03),
]
GIVEN_SHARE = 0.35  # image to video
WORDLESS_SHARE = 0.1
DIRECTION_SHARE = {False: 0.05, True: 0.5}  # sentences of motion alone, without and with a given frame
SHIFT = 3.0  # as the shipped scheduler's flow_shift
WARM_UP_STEPS = 200
PREFILL_BATCHES = 120
RING_BATCHES = 500


class Trainer:
    file = "denoiser.pt"
    ring_channels = LATENT_CHANNELS

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.ranks = Ranks()
        self.options, self.device = options, torch.device(options.device)
        self.formats = [form for form in ALL_FORMATS if form.num_tokens <= options.largest]
        self.shares = np.array([form.share for form in self.formats])
        self.path = Path(options.out) / self.file
        self.transformer, self.text_encoder = self._networks()
        self.fast = FastTransformer(self.transformer, options.compile)
        self.fast_text = FastTextEncoder(self.text_encoder)
        self.optimiser = make_optimiser(self.trained, options)
        self.encode = self._encoder()
        self.step, self.spent_s = 0, 0.0
        self.losses: list[Tensor] = []
        if options.resume and self.path.exists():
            self._resume()
        self.rng = np.random.default_rng([options.seed, self.step])  # the same formats at the same steps on all ranks
        seed = options.seed + 1 + self.step + 7919 * self.ranks.rank
        torch.manual_seed(seed)  # other clips, noise and words on each
        self.wordless = self._wordless_tokens()
        fresh = [max(1, options.fresh_tokens // form.num_tokens) for form in self.formats]
        self.sizes = [max(2, options.tokens // form.num_tokens) for form in self.formats]
        self.rings = [
            Ring.empty(form, n * max(2, round(RING_BATCHES * form.share)), self.ring_channels, self.device)
            for form, n in zip(self.formats, fresh, strict=True)
        ]
        self.source = batches(self.formats, fresh, True, seed, self.device.type == "cuda")

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        """The networks that learn, by the names that they are saved under."""
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def _networks(self) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
        if self.options.start_from:
            folder = self.options.start_from
            transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
            encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
        else:
            transformer, encoder = make_transformer(), make_text_encoder(len(vocabulary()))
        return transformer.to(self.device).train(), encoder.to(self.device).train()

    def _encoder(self) -> Encoder:
        saved = Path(self.options.out) / "vae.pt"
        if not saved.exists():
            return encoder_of(self.options.start_from, self.device)
        state = torch.load(saved, map_location="cpu", weights_only=False)
        vae = make_vae()
        vae.load_state_dict(state["model"])
        return make_encoder(vae, state["latents_mean"], state["latents_std"], self.device)

    def _resume(self) -> None:
        saved = torch.load(self.path, map_location=self.device, weights_only=False)
        for name, network in self.trained.items():
            network.load_state_dict(saved["training"][name])
        self.optimiser.load_state_dict(saved["training"]["optimiser"])
        self.step, self.spent_s = saved["steps"], saved["seconds"]
        self._saved_s = self.spent_s

    def _wordless_tokens(self) -> Tensor:
        """The empty prompt (most of the time) and negative prompts, int32 (n, MAX_TOKENS)."""
        speaker = Speaker(np.random.default_rng(3))
        empty = np.array([END] + [0] * (MAX_TOKENS - 1), dtype=np.int32)
        rows = [empty] * 384 + [speaker.tokens(speaker.negative()) for _ in range(128)]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def run(self) -> None:
        total_s = self.options.total_seconds or self.spent_s + self.options.seconds
        began, before_s, first = time.monotonic(), self.spent_s, self.step
        last = (began, first)
        while sum(r.written > 0 for r in self.rings) < len(self.rings) or self._batches_added < self.options.prefill:
            self._refill()
        self._log(f"rings filled after {time.monotonic() - began:.1f}s")
        while (elapsed := self.ranks.agree(time.monotonic() - began)) < self.options.seconds:
            self.spent_s = before_s + elapsed
            if self.step % self.options.fresh_every == 0:
                self._refill()
            progress = self.spent_s / total_s
            loss = self._train_step(int(self.rng.choice(len(self.shares), p=self.shares / self.shares.sum())), progress)
            self.losses.append(loss)
            if self.spent_s - self._saved_s > self.options.save_every:
                self.save()
            if self.step % self.options.log_every == 0 or self.step - first in (1, 10, 50):
                mean = float(torch.stack(self.losses).mean())
                pace = (time.monotonic() - last[0]) / (self.step - last[1]) * 1e3
                self._log(f"step {self.step} {self.spent_s:.0f}s loss {mean:.4f} {pace:.1f} ms/step")
                last, self.losses = (time.monotonic(), self.step), []

    _batches_added = 0
    _saved_s = 0.0

    def _log(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line, flush=True)

    def _refill(self) -> None:
        batch = next(self.source)
        self.rings[batch.format_index].add(self.encode(batch, self.formats[batch.format_index]), batch.tokens)
        self._batches_added += 1

    def _train_step(self, index: int, progress: float) -> Tensor:
        clips, tokens = self.rings[index].draw(self.sizes[index])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self._loss(clips, tokens)
        torch.autograd.backward(loss)
        self.ranks.average_gradients(self.optimiser.parameters)
        self.step += 1
        share = learning_rate_share(progress, self.step / WARM_UP_STEPS) * self.options.lr_scale
        self.optimiser.step(share, average_decay(self.step, self.options.average))
        return loss.detach()

    def _choose_words(self, tokens: Tensor, num_given: int) -> Tensor:
        """One of each clip's captions, or none; the first num_given clips come with their first frame."""
        n, device = len(tokens), tokens.device
        words = choose_words(tokens, torch.arange(n, device=device) < num_given)
        wordless = self.wordless[torch.randint(len(self.wordless), (n,), device=device)]
        return torch.where(torch.rand(n, 1, device=device) < WORDLESS_SHARE, wordless, words)

    def _loss(self, clean: Tensor, tokens: Tensor) -> Tensor:
        n, _, num_frames = clean.shape[:3]
        num_given = round(GIVEN_SHARE * n) if num_frames > 1 else 0
        sigma = draw_sigmas(n, clean.device)
        is_given = torch.arange(n, device=clean.device) < num_given
        noise = torch.randn_like(clean)
        is_kept = kept_latents(is_given, num_frames)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        mixed = torch.where(is_kept, clean, mixed)
        text = self._text(self._choose_words(tokens, num_given))
        predicted = self.fast(mixed, sigma * 1000, is_given, text, self._changed())
        error = (predicted.float() - (noise - clean)).square()
        share = 1 - num_given / (n * num_frames)
        return torch.where(is_kept, 0.0, error).mean() / share

    def _changed(self) -> Changed | None:
        """Weights that stand in for the transformer's own."""
        return None

    def _text(self, tokens: Tensor) -> Text:
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = self.fast_text(tokens)
        return embed_text(self.transformer, hidden, (tokens != 0).sum(1))

    def save(self) -> None:
        self._saved_s = self.spent_s
        if self.ranks.rank != 0:
            return
        training = self._copies() | {"optimiser": copy_of(self.optimiser.state_dict())}
        self.optimiser.swap_averages()
        state = self._copies()
        self.optimiser.swap_averages()
        write_state(state | {"training": training, "steps": self.step, "seconds": self.spent_s}, self.path)

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        return {name: _copy(network) for name, network in self.trained.items()}


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    """Its tensors, apart from those that training goes on to change."""
    copied: dict[str, Any] = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), state)
    return copied


def write_state(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)  # a run that is killed while saving leaves the former checkpoint whole


def make_encoder(vae: AutoencoderKLWan, mean: list[float], std: list[float], device: torch.device) -> Encoder:
    vae = vae.to(device).requires_grad_(False)
    return Encoder(FastVae(vae, is_channels_last=device.type == "cuda"), mean, std, device)


def encoder_of(folder: str, device: torch.device) -> Encoder:
    """With the autoencoder of an exported checkpoint."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    return make_encoder(vae, vae.config.latents_mean, vae.config.latents_std, device)


def choose_words(tokens: Tensor, is_given: Tensor) -> Tensor:
    """One of each clip's captions (n, CAPTIONS, MAX_TOKENS); is_given (n,) says which come with their first frame."""
    n, device = len(tokens), tokens.device
    direction = torch.where(is_given, DIRECTION_SHARE[True], DIRECTION_SHARE[False])
    which = torch.randint(CAPTIONS - 1, (n,), device=device)
    which = torch.where(torch.rand(n, device=device) < direction, CAPTIONS - 1, which)
    return tokens[torch.arange(n, device=device), which]


def kept_latents(is_given: Tensor, num_frames: int) -> Tensor:
    """Which latents stay as they are: the first frame of the clips that come with it; (n, 1, f, 1, 1)."""
    is_first = torch.arange(num_frames, device=is_given.device) == 0
    return (is_given[:, None] & is_first)[:, None, :, None, None]


def draw_sigmas(n: int, device: torch.device) -> Tensor:
    """Noise levels (n,): logit-normal three times in four, else uniform, then shifted; evenly spread over the batch."""
    even = (torch.arange(n, device=device) * 0.6180339887 + torch.rand(1, device=device)) % 1
    even = even.clamp(1e-4, 1 - 1e-4)
    bell = torch.sigmoid(torch.special.ndtri(even))
    sigma = torch.where(torch.rand(n, device=device) < 0.75, bell, even)
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def make_optimiser(networks: dict[str, torch.nn.Module], options: argparse.Namespace) -> Optimiser:
    """Muon turns the matrices of the blocks; embeddings, projections in and out, and vectors are AdamW's."""
    matrices = {
        f"{network}.{name}"
        for network, module in networks.items()
        for name, p in module.named_parameters()
        if "block" in name and p.dim() == 2 and "relative" not in name
    }
    return Optimiser(networks, matrices, options.adam_lr, options.muon_lr)


def _copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=900, help="of this run; it saves and stops after them")
    parser.add_argument("--total-seconds", type=float, help="of the whole schedule, when it is split over several runs")
    parser.add_argument("--tokens", type=int, default=98304, help="latent tokens per step and device: 170 clips")
    parser.add_argument(
        "--fresh-tokens", type=int, default=27648, help="latent tokens of newly encoded clips at a time"
    )
    parser.add_argument("--largest", type=int, default=10**9, help="leave out formats of more latent tokens than this")
    parser.add_argument("--fresh-every", type=int, default=4, help="steps between newly encoded batches")
    parser.add_argument("--prefill", type=int, default=PREFILL_BATCHES, help="batches encoded before the first step")
    parser.add_argument("--adam-lr", type=float, default=1.2e-3)
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="of both learning rates, for a gentle refinement")
    parser.add_argument("--average", type=float, default=0.9995, help="decay of the running average of the weights")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start-from", help="folder of an exported checkpoint to begin with")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--save-every", type=float, default=120, help="seconds between saves")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def train(trainer: Trainer) -> None:
    trainer.run()
    trainer.save()
    trainer.ranks.close()


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    train(Trainer(make_parser(__doc__).parse_args(arguments)))


if __name__ == "__main__":
    main()
