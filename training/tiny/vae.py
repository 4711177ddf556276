"""Train the tiny autoencoder: .venv/bin/python -m training.tiny.vae --out runs/tiny --seconds 300

Most of the time goes to small windows around the shapes, the rest to whole clips. A quarter of the batch moves before a
drifting pattern and a fifth has a second shape, so that pictures from elsewhere survive too.
Writes OUT/vae.pt: averaged weights, the latents' statistics, the quality reached, and what resuming needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.tiny import world
from training.tiny.fast import FastVae
from training.tiny.networks import LATENT_CHANNELS, make_vae
from training.tiny.optimiser import Optimiser, average_decay, learning_rate_share
from training.tiny.stream import Batch, Format, Numbers, batches

SCENE_PX = 128  # the short side of the scene that windows are cut from
WINDOWS = [Format(9, 64, 64)]
WINDOW_BATCH = [128]
WHOLE = [Format(17, 128, 128, 0.8), Format(17, 96, 160, 0.1), Format(5, 256, 256, 0.1)]
WHOLE_BATCH = [24, 24, 20]
WINDOW_SHARE = 0.6  # of the time
WARM_UP_STEPS = 100
KL_WEIGHT = 5e-4


def paint_batch(numbers: Numbers, second: Numbers, form: Format, is_window: bool) -> tuple[Tensor, Tensor]:
    """Frames (n, 3, f, h, w) in [-1, 1] and their loss weights (n, 1, f, h, w), all randomness on the device."""
    n, num_frames = numbers.path.shape[:2]
    device = numbers.path.device
    scene_px = SCENE_PX if is_window else form.short_side
    offset = _window(numbers.path, form, scene_px) if is_window else torch.zeros(n, 2, device=device)
    size = form.height, form.width
    rows = (torch.arange(form.height, device=device) + 0.5 + offset[:, 1:]) / (SCENE_PX if is_window else form.height)
    frames = world.backdrop(numbers.background, rows.clamp(0, 1))[:, :, None, :, None]
    frames = frames.expand(-1, -1, num_frames, -1, form.width)
    is_patterned = torch.rand(n, 1, 1, 1, 1, device=device) < 0.25
    frames = torch.where(is_patterned, _pattern(n, num_frames, *size, device), frames)
    near = torch.full((n, num_frames, *size), 1e4, device=device)
    for shape, probability in ((second, 0.2), (numbers, 1.0)):
        distance = world.distances(shape.path, shape.counts, size, scene_px, offset)
        distance = distance + 1e4 * (torch.rand(n, 1, 1, 1, device=device) >= probability)
        is_odd = torch.rand(n, 1, device=device) < 0.3
        rgb = torch.where(is_odd, torch.rand(n, 3, device=device) * 2 - 1, shape.rgb)
        frames = world.paint(frames, rgb, distance)
        near = torch.minimum(near, distance)
    return frames, 1 + 3 * torch.sigmoid((4 - near) / 1.5)[:, None]


def _window(path: Tensor, form: Format, scene_px: int) -> Tensor:
    """Where each window begins, (n, 2): around its shape as it stands in the middle of the clip."""
    centre = path[:, path.shape[1] // 2, :2] * scene_px + torch.randn(len(path), 2, device=path.device) * 14
    room = torch.tensor([scene_px - form.width, scene_px - form.height], device=path.device)
    begin = centre - torch.tensor([form.width / 2, form.height / 2], device=path.device)
    return torch.minimum(begin.clamp_min(0), room)


def _pattern(n: int, num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Two crossing waves that drift, in three random colours, (n, 3, f, h, w)."""
    t = torch.arange(num_frames, device=device)[:, None, None]
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    frames = torch.rand(n, 3, 1, 1, 1, device=device) * 2 - 1
    for _ in range(2):
        angle, pace, phase = (torch.rand(3, n, 1, 1, 1, device=device) * 6.2832).unbind(0)
        rate = 0.1 + 0.5 * torch.rand(n, 1, 1, 1, device=device) ** 2
        wave = torch.sin((x * angle.cos() + y * angle.sin()) * rate + t * pace * 0.1 + phase)
        frames = torch.lerp(frames, torch.rand(n, 3, 1, 1, 1, device=device) * 2 - 1, (0.5 + 0.5 * wave)[:, None])
    return frames


def loss_of(fast: FastVae, frames: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss and the plain squared error; latents are disturbed so that small mistakes decode cleanly."""
    mean, log_variance = (part.float() for part in fast.encode(frames))
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    level = 0.1 * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
    decoded = fast.decode(latents + spread * level * torch.randn_like(mean)).float()
    error = decoded - frames
    total = (weight * (error.abs() + 2 * error.square())).mean()
    if frames.shape[2] > 1:
        total = total + 0.5 * (weight[:, :, 1:] * error.diff(dim=2).abs()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return total + KL_WEIGHT * kl, error.detach().square().mean()


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device(options.device)
        self.path = Path(options.out) / "vae.pt"
        self.vae = make_vae().to(self.device)
        self.fast = FastVae(self.vae, options.compile, options.channels_last)
        self.optimiser = make_optimiser(self.vae, options)
        self.step, self.spent_s = 0, 0.0
        if options.resume and self.path.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.path, map_location=self.device, weights_only=False)
        self.vae.load_state_dict(saved["training"]["model"])
        self.optimiser.load_state_dict(saved["training"]["optimiser"])
        self.step, self.spent_s = saved["training"]["step"], saved["training"]["spent_s"]

    def run(self) -> None:
        total_s = self.options.total_seconds or self.spent_s + self.options.seconds
        began, before_s = time.monotonic(), self.spent_s
        stages = [(True, WINDOWS, WINDOW_BATCH), (False, WHOLE, WHOLE_BATCH)]
        sources = [self._source(formats, sizes) for _, formats, sizes in stages]
        while time.monotonic() - began < self.options.seconds:
            progress = self.spent_s / total_s
            stage = int(progress > WINDOW_SHARE)
            mse = self._train_step(next(sources[stage]), stages[stage][1], stages[stage][0], progress)
            self.spent_s = before_s + time.monotonic() - began
            if self.step % self.options.log_every == 0:
                print(f"vae step {self.step} {self.spent_s:.0f}s psnr {_psnr(mse):.2f} dB", flush=True)

    def _source(self, formats: list[Format], sizes: list[int]) -> Iterator[Batch]:
        sizes = [max(1, int(size * self.options.batch_scale)) for size in sizes]
        return batches(formats, sizes, False, self.options.seed + self.step, self.device.type == "cuda")

    def _train_step(self, batch: Batch, formats: list[Format], is_window: bool, progress: float) -> Tensor:
        assert batch.second is not None
        numbers, second = batch.numbers.to(self.device), batch.second.to(self.device)
        frames, weight = paint_batch(numbers, second, formats[batch.format_index], is_window)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, mse = loss_of(self.fast, frames, weight)
        torch.autograd.backward(loss)
        self.step += 1
        share = learning_rate_share(progress, self.step / WARM_UP_STEPS)
        self.optimiser.step(share, average_decay(self.step, 0.998))
        return mse

    def save(self) -> None:
        training = {"model": _copy(self.vae), "optimiser": self.optimiser.state_dict()}
        training |= {"step": self.step, "spent_s": self.spent_s}
        training = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), training)
        self.optimiser.swap_averages()
        report = measure(self.fast, self.device, self.options.measure_clips)
        print({k: v for k, v in report.items() if k.startswith("psnr")}, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        summary = {"model": _copy(self.vae), "seconds": self.spent_s, "steps": self.step} | report
        torch.save(summary | ({} if self.options.final else {"training": training}), self.path)


def make_optimiser(vae: nn.Module, options: argparse.Namespace) -> Optimiser:
    """Muon turns the kernels inside; the first and last ones and all vectors are AdamW's."""
    edges = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv")
    matrices = {
        f"vae.{n}" for n, p in vae.named_parameters() if p.dim() >= 4 and p.shape[1] > 1 and not _is_in(n, edges)
    }
    return Optimiser({"vae": vae}, matrices, options.adam_lr, options.muon_lr)


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _psnr(mse: Tensor) -> float:
    return float(10 * torch.log10(4 / mse))


@torch.no_grad()
def measure(fast: FastVae, device: torch.device, num_clips: int) -> dict[str, Any]:
    """Statistics of the latents per channel and the quality over whole clips of the world, in float32."""
    rng = np.random.default_rng(7)
    latents, qualities = [], []
    for _ in range(max(1, num_clips // 8)):
        frames = world.render(world.sample_clips(rng, 8, 17), SCENE_PX, SCENE_PX, device)
        mean, _ = fast.encode(frames)
        error = (fast.decode(mean).clamp(-1, 1) - frames).square().mean(dim=(1, 2, 3, 4))
        latents.append(mean.transpose(0, 1).flatten(1))
        qualities += [_psnr(e) for e in error]
    flat = torch.cat(latents, dim=1)
    assert flat.shape[0] == LATENT_CHANNELS
    return {
        "latents_mean": flat.mean(1).tolist(),
        "latents_std": flat.std(1).tolist(),
        "psnr_mean": float(np.mean(qualities)),
        "psnr_worst": float(np.min(qualities)),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=300, help="of this run; it saves and stops after them")
    parser.add_argument("--total-seconds", type=float, help="of the whole schedule, when it is split over several runs")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="1 fills a large GPU; 0.03 suits a small CPU")
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--final", action="store_true", help="leave out what only resuming needs")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--measure-clips", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(parse(arguments))
    trainer.run()
    trainer.save()


if __name__ == "__main__":
    main()
