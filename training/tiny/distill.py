"""Train the LoRA `draft`: .venv/bin/python -m training.tiny.distill --out runs/tiny --seconds 460 --compile

With it four steps without guidance do what the model otherwise does in twenty steps with guidance.

The teacher is an exported checkpoint (`--start-from`) at its defaults. First it makes clips for `--teacher-seconds`, of
which the latents at five noise levels are kept. Then the student, which is the same network with a LoRA, learns

1. from the teacher's latents at one level to lead to those at the next one,
2. in all four steps at once, to lead from the noise to the teacher's clip. Beside that its clips are pulled to where
   the guided teacher finds them more likely than a critic does, which learns what the student's clips are like:
   distribution matching distillation, https://arxiv.org/abs/2405.14867. This keeps outlines sharp where the first
   error alone would mix them.

It begins with checks, since it is of no use with a teacher that computes wrongly: the fast forward is compared with
diffusers' own, and the teacher's clips must be what their prompts say. bfloat16 gives way to float32, and compiled code
to plain code, when they fail.

Writes OUT/draft.safetensors, the best so far by the detector, and OUT/draft.pt from which `--resume` goes on.
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.tiny import world
from training.tiny.denoiser import (
    ALL_FORMATS,
    GIVEN_SHARE,
    choose_words,
    copy_of,
    draw_sigmas,
    encoder_of,
    kept_latents,
    write_state,
)
from training.tiny.detector import look
from training.tiny.evaluate import FIELDS, JOINT, Wanted, draw_pictures, draw_wanted, score
from training.tiny.fast import TEXT_LENGTH, Changed, FastTextEncoder, FastTransformer, Text, embed_text
from training.tiny.language import END, MAX_TOKENS, encode
from training.tiny.lora import Adapter
from training.tiny.optimiser import Optimiser, average_decay, learning_rate_share
from training.tiny.stream import Batch, Format, batches

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # of the student
TEACHER_STEPS = 12  # judged as good as 20; every third ends at one of SIGMAS
GUIDANCE = 3.0
CRITIC_RANK = 64
WARM_UP_STEPS = 50
MEASURED_FRAMES = 33
LEAST_SHARE = 0.8  # of the teacher's clips that are right in all; 0.89 are
LARGEST_ERROR = 0.05  # of the fast forward in bfloat16, as a share of what diffusers gives; 0.01 is usual
LAST_S = 45  # the last save and the last clips; a look at 208 clips takes 12 s, most of it on the CPU


@dataclass(frozen=True)
class Paths:
    """What the teacher made in one format: latents (n, 5, 16, f, h, w) float16 at SIGMAS, tokens (n, MAX_TOKENS), and
    which clips came with their first frame (n,)."""

    latents: Tensor
    tokens: Tensor
    is_given: Tensor

    def draw(self, n: int) -> Paths:
        index = torch.randint(len(self.tokens), (n,), device=self.tokens.device)
        return Paths(self.latents[index], self.tokens[index], self.is_given[index])


class Distiller:
    def __init__(self, options: argparse.Namespace, pool: ProcessPoolExecutor | None) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device, self.pool = options, torch.device(options.device), pool
        self.ends = time.monotonic() + options.seconds
        self.is_half = options.precision == "bfloat16"
        self.best = -1.0
        self.best_lora: dict[str, Tensor] = {}
        self.path = Path(options.out) / "draft.pt"
        self.formats = [form for form in ALL_FORMATS if form.num_tokens <= options.largest]
        folder = options.start_from
        self.model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        self.model = self.model.float().to(self.device).requires_grad_(False)
        text = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
        self.fast_text = FastTextEncoder(text.to(self.device).requires_grad_(False))
        self.fast = self.plain = FastTransformer(self.model)
        self.encode = self.decoder = encoder_of(folder, self.device)
        self.student, self.critic = Adapter(self.model, options.rank), Adapter(self.model, CRITIC_RANK)
        self.optimiser = Optimiser({"lora": self.student}, set(), options.lr, 0.0)
        self.critic_optimiser = Optimiser({"critic": self.critic}, set(), options.critic_lr, 0.0)
        self.step, self.spent_s, self.saved_s = 0, 0.0, 0.0
        if options.resume and self.path.exists():
            self._resume()
        torch.manual_seed(options.seed + 1 + self.step)
        self.rng = np.random.default_rng([options.seed, self.step])
        self.paths: dict[int, Paths] = {}
        self._critic_steps = 0
        self._nan = torch.tensor(torch.nan, device=self.device)

    def _resume(self) -> None:
        saved = torch.load(self.path, map_location=self.device, weights_only=False)
        for name in ("student", "critic", "optimiser", "critic_optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.spent_s, self.saved_s = saved["steps"], saved["seconds"], saved["seconds"]
        self.best = saved["best"]

    def save(self) -> None:
        """Keep the state, and the averaged LoRA if its clips are the best so far."""
        self.optimiser.swap_averages()
        share = self.measure()
        if share >= self.best:
            self.best, self.best_lora = share, copy_of(self.student.state_dict())
            self.student.save(self.path.with_suffix(".safetensors"))
        self.optimiser.swap_averages()
        parts = {name: getattr(self, name) for name in ("student", "critic", "optimiser", "critic_optimiser")}
        state = copy_of({name: part.state_dict() for name, part in parts.items()})
        write_state(state | {"steps": self.step, "seconds": self.spent_s, "best": self.best}, self.path)

    def take_best(self) -> None:
        """Go back to the LoRA that was kept, if this run made it."""
        if self.best_lora:
            self.student.load_state_dict(self.best_lora)

    # The teacher

    def check_teacher(self) -> None:
        """Go on in float32 when bfloat16 fails; end when that fails too. Clips are looked at only if the device decodes
        them as a CPU does, else they are decoded there."""
        self._check_decoder()
        is_sound = self._is_sound()
        if self.is_half and not is_sound:
            print("bfloat16 computes wrongly here: everything is float32", flush=True)
            self.is_half = False
            is_sound = self._is_sound()
        if not is_sound:
            raise SystemExit("the teacher computes wrongly here, in float32 too: nothing can be learned from it")

    def _is_sound(self) -> bool:
        error = self._forward_error()
        print(f"the {'bfloat16' if self.is_half else 'float32'} forward is {error:.1%} off diffusers'", flush=True)
        return error < LARGEST_ERROR and self.measure(is_teacher=True) >= LEAST_SHARE

    @torch.no_grad()
    def _check_decoder(self) -> None:
        latents = torch.randn(2, self.model.config.in_channels, 3, 16, 16)
        slow = encoder_of(self.options.start_from, torch.device("cpu"))
        error = (self._decoded(latents.to(self.device)).cpu() - slow.fast.decode(latents * slow.std + slow.mean)).abs()
        print(
            f"the decoder is {float(error.mean()):.4f} off that of a CPU, {float(error.max()):.3f} at most", flush=True
        )
        if not error.mean() < 0.01:  # of a range of 2
            self.decoder = slow

    @torch.no_grad()
    def _forward_error(self) -> float:
        """Of the fast forward against that of diffusers in float32, as a share of its root mean square."""
        paths = self._some_noise()
        timestep = torch.linspace(100, 1000, len(paths.tokens), device=self.device)
        latents = paths.latents[:, 0].float()
        hidden = self.fast_text(paths.tokens) * (paths.tokens != 0)[..., None]
        hidden = F.pad(hidden, (0, 0, 0, TEXT_LENGTH - hidden.shape[1]))
        expected = self.model(latents, timestep, hidden).sample
        actual = self._velocity(latents, timestep, paths.is_given, self._text(paths.tokens))
        error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        return float(error) if torch.isfinite(error) else torch.inf

    def _some_noise(self) -> Paths:
        """Noise as the latents of all levels, with the prompts that `measure` has."""
        tokens = self._reserved()[1][:16]
        shape = (len(tokens), len(SIGMAS), self.model.config.in_channels, *self.formats[0].latent_shape)
        generator = torch.Generator("cpu").manual_seed(1)
        latents = torch.randn(shape, generator=generator).to(self.device)
        return Paths(latents, tokens, torch.zeros(len(tokens), dtype=torch.bool, device=self.device))

    def film(self) -> None:
        """Let the teacher make clips for the time given."""
        began, count = time.monotonic(), 0
        sizes = [max(2, self.options.teacher_tokens // form.num_tokens) for form in self.formats]
        source = batches(self.formats, sizes, True, self.options.seed + 1 + self.step, self.device.type == "cuda")
        made: dict[int, list[Paths]] = {i: [] for i in range(len(self.formats))}
        while not any(made.values()) or time.monotonic() < min(began + self.options.teacher_seconds, self.ends):
            batch = next(source)
            made[batch.format_index].append(self._film_batch(batch, self.formats[batch.format_index]))
            count += len(batch.tokens)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        for i, parts in made.items():
            if parts:
                fields = (torch.cat([getattr(p, f) for p in parts]) for f in ("latents", "tokens", "is_given"))
                self.paths[i] = Paths(*fields)
        print(f"the teacher made {count} clips in {time.monotonic() - began:.0f}s", flush=True)

    @torch.no_grad()
    def _film_batch(self, batch: Batch, form: Format) -> Paths:
        n, (num_frames, height, width) = len(batch.tokens), form.latent_shape
        order = torch.randperm(n, device=self.device)  # the clips of a batch come sorted by shape
        is_given = order < (round(GIVEN_SHARE * n) if num_frames > 1 else 0)
        tokens = choose_words(batch.tokens.to(self.device), is_given)
        noise = torch.randn(n, self.model.config.in_channels, num_frames, height, width, device=self.device)
        numbers = replace(batch.numbers, path=batch.numbers.path[:, :1])
        noise[:, :, :1] = torch.where(
            is_given.view(-1, 1, 1, 1, 1), self.encode(replace(batch, numbers=numbers), form), noise[:, :, :1]
        )
        noise = noise.half().float()  # the student begins with the same
        kept = self._film_from(noise, tokens, is_given, TEACHER_STEPS, TEACHER_STEPS // (len(SIGMAS) - 1))
        return Paths(torch.stack(kept, dim=1), tokens, is_given)

    @torch.no_grad()
    def _film_from(self, noise: Tensor, tokens: Tensor, is_given: Tensor, num_steps: int, every: int) -> list[Tensor]:
        """The noise and the latents after every so many steps, float16."""
        solver = UniPCMultistepScheduler.from_pretrained(self.options.start_from, subfolder="scheduler")
        solver.set_timesteps(num_steps, device=self.device)
        solver.set_begin_index(0)  # else it looks for the first step on the device
        is_kept = kept_latents(is_given, noise.shape[2])
        text = _joined(self._text(tokens), self._wordless(len(tokens)))
        latents, kept = noise, [noise.half()]
        for i, timestep in enumerate(solver.timesteps):
            velocity = self._guided(latents, timestep.float().expand(len(noise)), is_given, text)
            latents = torch.where(is_kept, noise, solver.step(velocity, timestep, latents).prev_sample)
            if (i + 1) % every == 0:
                kept.append(latents.half())
        return kept

    def _guided(self, latents: Tensor, timestep: Tensor, is_given: Tensor, text: Text) -> Tensor:
        """The teacher's velocity with guidance; text has the prompts' keys and then the empty prompt's."""
        both = self._velocity(
            torch.cat([latents, latents]), torch.cat([timestep, timestep]), torch.cat([is_given, is_given]), text
        )
        words, without = both.chunk(2)
        return without + GUIDANCE * (words - without)

    def _velocity(
        self, latents: Tensor, timestep: Tensor, is_given: Tensor, text: Text, changed: Changed | None = None
    ) -> Tensor:
        forward = self.fast if torch.is_grad_enabled() else self.plain
        with self._precision():
            return forward(latents, timestep, is_given, text, changed).float()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half)

    @torch.no_grad()
    def _text(self, tokens: Tensor) -> Text:
        hidden = self.fast_text(tokens)
        with self._precision():
            return embed_text(self.model, hidden, (tokens != 0).sum(1))

    def _wordless(self, n: int) -> Text:
        tokens = torch.zeros(1, MAX_TOKENS, dtype=torch.int32, device=self.device)
        tokens[0, 0] = END
        text = self._text(tokens)
        return Text(text.keys.expand(n, -1, -1), text.bias)

    # The student

    def compile(self) -> None:
        """Compile the forward that has gradients, unless its gradients differ from those of the plain one."""
        began = time.monotonic()
        index = next(iter(self.paths))
        paths = self.paths[index].draw(self._batch_size(index, self.options.tokens))
        text = self._text(paths.tokens)
        expected = self._gradients(paths, text)
        try:
            self.fast = FastTransformer(self.model, is_compiled=True)
            actual = self._gradients(paths, text)
            likeness = float(F.cosine_similarity(actual, expected, dim=0))
        except Exception as exc:  # the compiler's errors are of many kinds; none is a reason to end
            print(f"nothing is compiled: {exc!r:.300}", flush=True)
            likeness = 0.0
        print(
            f"compiled in {time.monotonic() - began:.0f}s; its gradients are {likeness:.3f} like the plain", flush=True
        )
        if not likeness > 0.98:
            self.fast = self.plain

    def _gradients(self, paths: Paths, text: Text) -> Tensor:
        torch.autograd.backward(self._single_error(paths, text))
        gradients = torch.cat([p.grad.flatten() for p in self.student.up if p.grad is not None])
        self.student.zero_grad()
        return gradients

    def run(self) -> None:
        began, before_s, first = time.monotonic(), self.spent_s, self.step
        total_s = self.options.total_seconds or max(1.0, before_s + self.ends - LAST_S - began)
        losses, last = [], (began, first)
        shares = np.array([self.formats[i].share for i in self.paths])
        while self.step == first or time.monotonic() < self.ends - LAST_S:
            self.spent_s = before_s + time.monotonic() - began
            progress = self.spent_s / total_s
            index = int(self.rng.choice(list(self.paths), p=shares / shares.sum()))
            losses.append(self._train_step(index, progress))
            if self.spent_s - self.saved_s > self.options.save_every:
                self.save()
                self.saved_s = before_s + time.monotonic() - began
            if self.step % self.options.log_every == 0 or self.step - first in (1, 10, 50):
                values = " ".join(f"{v:.4f}" for v in torch.stack(losses).nanmean(0).tolist())
                pace = (time.monotonic() - last[0]) / (self.step - last[1]) * 1e3
                print(f"step {self.step} {self.spent_s:.0f}s losses {values} {pace:.0f} ms/step", flush=True)
                last, losses = (time.monotonic(), self.step), []

    def _train_step(self, index: int, progress: float) -> Tensor:
        """The errors of this step, (4,): of single steps, of whole clips, the pull, the critic's; NaN where none is."""
        self.step += 1
        single_share = self.options.single_share
        if progress < single_share:
            paths = self.paths[index].draw(self._batch_size(index, self.options.tokens))
            error = self._single_error(paths, self._text(paths.tokens))
            torch.autograd.backward(error)
            rate = learning_rate_share(progress / single_share, self.step / WARM_UP_STEPS)
            rate = max(rate, self.options.whole_lr) if self.step > WARM_UP_STEPS else rate
            errors = {0: error}
        else:
            paths = self.paths[index].draw(self._batch_size(index, self.options.whole_tokens))
            rate = self.options.whole_lr * learning_rate_share((progress - single_share) / (1 - single_share), 1)
            errors = self._whole_step(paths, self._text(paths.tokens))
        if 3 not in errors or len(errors) > 1:
            self.optimiser.step(rate, average_decay(self.step, self.options.average))
        return torch.stack([errors[i].detach() if i in errors else self._nan for i in range(4)])

    def _batch_size(self, index: int, num_tokens: int) -> int:
        return max(2, num_tokens // self.formats[index].num_tokens)

    def _whole_step(self, paths: Paths, text: Text) -> dict[int, Tensor]:
        """Gradients of whole clips, and the critic's own steps; at first the critic alone learns, from the teacher."""
        if self._critic_steps < self.options.critic_warm_up:
            return {3: self._train_critic(paths.latents[:, -1].float(), paths.is_given, text)}
        clips = self._roll(paths.latents[:, 0].float(), paths.is_given, text, self.student.weights())
        error = _robust(clips - paths.latents[:, -1].float())
        pull = self._pull(clips, paths.is_given, text)
        torch.autograd.backward(error * self.options.error_weight + pull)
        for _ in range(self.options.critic_steps):
            critic_error = self._train_critic(clips.detach(), paths.is_given, text)
        return {1: error, 2: pull, 3: critic_error}

    def _single_error(self, paths: Paths, text: Text) -> Tensor:
        """Of the velocity that leads from the teacher's latents at a level to those at the next."""
        n = len(paths.tokens)
        level = torch.arange(n, device=self.device) % (len(SIGMAS) - 1)
        row = torch.arange(n, device=self.device)
        here, there = paths.latents[row, level].float(), paths.latents[row, level + 1].float()
        sigmas = torch.tensor(SIGMAS, device=self.device)
        width = (sigmas[level + 1] - sigmas[level]).view(-1, 1, 1, 1, 1)
        predicted = self._velocity(here, sigmas[level] * 1000, paths.is_given, text, self.student.weights())
        is_kept = kept_latents(paths.is_given, here.shape[2])
        return _robust(torch.where(is_kept, 0.0, predicted - (there - here) / width))

    def _roll(self, noise: Tensor, is_given: Tensor, text: Text, changed: Changed) -> Tensor:
        """The student's clips."""
        is_kept, latents = kept_latents(is_given, noise.shape[2]), noise
        for sigma, below in pairwise(SIGMAS):
            timestep = torch.full((len(noise),), sigma * 1000, device=self.device)
            velocity = self._velocity(latents, timestep, is_given, text, changed)
            latents = torch.where(is_kept, noise, latents + (below - sigma) * velocity)
        return latents

    def _pull(self, clips: Tensor, is_given: Tensor, text: Text) -> Tensor:
        """Its gradient leads to where the guided teacher finds the clips likelier than the critic does."""
        clean = clips.detach()
        is_kept = kept_latents(is_given, clean.shape[2])
        with torch.no_grad():
            even = 0.02 + 0.96 * torch.rand(len(clean), device=self.device)
            sigma = 3 * even / (1 + 2 * even)
            level = sigma.view(-1, 1, 1, 1, 1)
            mixed = torch.where(is_kept, clean, torch.lerp(clean, torch.randn_like(clean), level))
            both = _joined(text, self._wordless(len(clean)))
            likely = self._guided(mixed, sigma * 1000, is_given, both)
            own = self._velocity(mixed, sigma * 1000, is_given, text, self.critic.weights())
            distance = (clean - (mixed - level * likely)).abs()
            size = torch.where(is_kept, 0.0, distance).mean((1, 2, 3, 4), keepdim=True).clamp_min(0.02)
            push = torch.where(is_kept, 0.0, level * (likely - own) / size)
        return (push * clips).mean()

    def _train_critic(self, clean: Tensor, is_given: Tensor, text: Text) -> Tensor:
        """Flow matching on the student's clips."""
        sigma, noise = draw_sigmas(len(clean), self.device), torch.randn_like(clean)
        is_kept = kept_latents(is_given, clean.shape[2])
        mixed = torch.where(is_kept, clean, torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1)))
        predicted = self._velocity(mixed, sigma * 1000, is_given, text, self.critic.weights())
        error = torch.where(is_kept, 0.0, predicted - (noise - clean)).square().mean()
        torch.autograd.backward(error)
        self._critic_steps += 1
        self.critic_optimiser.step(min(1.0, self._critic_steps / WARM_UP_STEPS), 0.0)
        return error.detach()

    # Its clips

    @torch.no_grad()
    def measure(self, is_teacher: bool = False) -> float:
        """The share of right clips of reserved prompts, which are not those of `evaluate`; 1 when none are made."""
        if self.pool is None or not self.options.measure:
            return 1.0
        wanted, tokens = self._reserved()
        shape = Format(MEASURED_FRAMES, 128, 128).latent_shape
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(len(wanted), self.model.config.in_channels, *shape, generator=generator).to(self.device)
        is_given = torch.zeros(len(wanted), dtype=torch.bool, device=self.device)
        result = self._judge(wanted, tokens, noise, is_given, is_teacher, "text")
        return (result["all"] + result["shape"]) / 2

    @torch.no_grad()
    def measure_images(self, is_teacher: bool = False) -> None:
        """The same with first frames."""
        if self.pool is None or not self.options.measure:
            return
        pairs = [
            (picture, w) for picture, asked in draw_pictures(max(1, self.options.measure // 8), seed=177) for w in asked
        ]
        frames = torch.stack([torch.from_numpy(np.array(picture)) for picture, _ in pairs]).to(self.device)
        frames = (frames.float() / 127.5 - 1).permute(0, 3, 1, 2)[:, :, None]
        shape = Format(MEASURED_FRAMES, 128, 128).latent_shape
        generator = torch.Generator("cpu").manual_seed(1)
        noise = torch.randn(len(pairs), self.model.config.in_channels, *shape, generator=generator).to(self.device)
        noise[:, :, :1] = self.encode.latents(frames)
        is_given = torch.ones(len(pairs), dtype=torch.bool, device=self.device)
        wanted = [w for _, w in pairs]
        self._judge(wanted, self._tokens(wanted), noise, is_given, is_teacher, "image")

    def _judge(
        self, wanted: list[Wanted], tokens: Tensor, noise: Tensor, is_given: Tensor, is_teacher: bool, kind: str
    ) -> dict[str, float]:
        if is_teacher:
            latents = self._film_from(noise, tokens, is_given, 20, 20)[-1].float()
        else:
            latents = self._roll(noise, is_given, self._text(tokens), self.student.weights())
        clips = np.concatenate([self._frames(part) for part in latents.split(16)])
        result = score(wanted, list(self.pool.map(look, clips, chunksize=4)))  # type: ignore[union-attr]
        cells = " ".join(f"{name} {100 * result[name]:.1f}" for name in (*FIELDS, *JOINT))
        print(f"{'teacher' if is_teacher else f'step {self.step}'}, {kind}: {cells}", flush=True)
        return result

    def _reserved(self) -> tuple[list[Wanted], Tensor]:
        wanted = draw_wanted(max(2, self.options.measure), seed=77)
        return wanted, self._tokens(wanted)

    def _tokens(self, wanted: list[Wanted]) -> Tensor:
        rows = [encode(w.prompt) for w in wanted]
        padded = [[*ids, *[0] * (MAX_TOKENS - len(ids))] for ids in rows]
        return torch.tensor(padded, dtype=torch.int32).to(self.device)

    def _frames(self, latents: Tensor) -> np.ndarray:
        return world.to_uint8(self._decoded(latents.to(self.decoder.device)))

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.decoder.fast.decode(latents * self.decoder.std + self.decoder.mean)


def _joined(words: Text, without: Text) -> Text:
    return Text(torch.cat([words.keys, without.keys]), words.bias)


def _robust(difference: Tensor) -> Tensor:
    """The mean of a Huber-like error: it cares less than a square for what cannot be foreseen."""
    return (difference.square() + 0.3**2).sqrt().mean() - 0.3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny")
    parser.add_argument("--start-from", default="src/kinema/engines/wan/tiny", help="folder of the exported checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=["bfloat16", "float32"],
        default="bfloat16" if torch.cuda.is_available() else "float32",
    )
    parser.add_argument("--teacher-seconds", type=float, default=80, help="in which the teacher makes clips")
    parser.add_argument("--seconds", type=float, default=460, help="of this run in all, from its start to its end")
    parser.add_argument("--total-seconds", type=float, help="of the whole schedule, when it is split over several runs")
    parser.add_argument("--single-share", type=float, default=0.4, help="of the schedule, for single steps")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--whole-lr", type=float, default=0.25, help="share of --lr with which whole clips begin")
    parser.add_argument("--critic-lr", type=float, default=1e-3)
    parser.add_argument("--critic-warm-up", type=int, default=100, help="steps of the critic alone, before whole clips")
    parser.add_argument("--critic-steps", type=int, default=2, help="of the critic for each of the student")
    parser.add_argument("--error-weight", type=float, default=0.5, help="of the distance to the teacher's clips")
    parser.add_argument("--average", type=float, default=0.99, help="decay of the running average of the weights")
    parser.add_argument("--tokens", type=int, default=98304, help="latent tokens per step: 170 clips")
    parser.add_argument("--whole-tokens", type=int, default=40960, help="latent tokens per step of whole clips")
    parser.add_argument("--teacher-tokens", type=int, default=73728, help="latent tokens of the teacher's batches")
    parser.add_argument("--largest", type=int, default=10**9, help="leave out formats of more latent tokens than this")
    parser.add_argument("--measure", type=int, default=208, help="reserved prompts looked at with each save; 0: none")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=float, default=60, help="seconds between saves")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    options = parse(arguments)
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        pool.submit(abs, 0).result()  # starts the workers before there is a device context to inherit
        distiller = Distiller(options, pool)
        distiller.check_teacher()
        distiller.measure_images(is_teacher=True)
        distiller.film()
        if options.compile:
            distiller.compile()
        distiller.run()
        distiller.save()
        distiller.take_best()
        distiller.measure_images()


if __name__ == "__main__":
    main()
