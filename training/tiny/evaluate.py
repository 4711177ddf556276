"""Judge an exported checkpoint: .venv/bin/python -m training.tiny.evaluate --model src/kinema/engines/wan/tiny

Stock diffusers pipelines generate, `detector` looks. Every prompt is new to the model:
sentences are drawn from the reserved sixteenth of the grammar, which training redraws (`language.is_reserved`), or from
forms that the grammar does not have (`FOREIGN`); half of the clips asked for are of (shape, colour, motion) triples
that training never rendered (`world.is_held_out`).
A model that needs a first frame (tiny-wan-i2v) is given a first frame, or the first and the last one of such a clip.
With `--lora` and `--timesteps` it judges LoRAs and tiers, for instance a distill to four steps:

    .venv/bin/python -m training.tiny.evaluate --lora LORA.safetensors \\
        --timesteps 1000 900 750 500 --default-guidance 1 --grid-prompts 0

Prints tables and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from numpy.typing import NDArray
from PIL import Image

from kinema.engines.wan.checkpoint import Checkpoint, inspect
from training.tiny import world
from training.tiny.detector import STEADY, Sighting, is_steady, look
from training.tiny.language import Speaker
from training.tiny.lora import merge

FOREIGN = [
    "could you film {n} as it {v}, {p}, thank you",
    "look: {n}! {p}, and it {v}.",
    "once upon a time {n} lived {p}; all day long it {v}",
    "{p}; {n}; it {v}; nothing else",
    "my daughter would love to watch how {n} {v} {p} today",
    "test clip 7 {n} {v} {p} end",
]
NAMED = [
    ("a red circle moving right on a black background", "red circle black right"),
    ("a blue square moving up on a white background", "blue square white up"),
    ("a yellow star spinning on a navy background", "yellow star navy spin"),
    ("a green ball bounces on the grass", "green circle grass bounce"),
    ("a purple heart growing on a beige background", "purple heart beige grow"),
    ("an orange triangle falls from the sky", "orange triangle sky down"),
    ("a cyan ring orbits on a gray background", "cyan ring gray orbit"),
    ("a pink diamond moving left on a white background", "pink diamond white left"),
    ("a white cross shrinking on a navy background", "white cross navy shrink"),
    ("a black square standing still on a white background", "black square white still"),
    ("A small red ball rolling to the left on the grass", "red circle grass left"),
    ("a big yellow star rising slowly in the night sky", "yellow star navy up"),
]
FPS_SIZE = 128
FIELDS = ("shape", "colour", "background", "motion")
HOLLOW = 0.1  # an outlined shape shows at least so much of what is behind it
JOINT = {"colour+background+motion": FIELDS[1:], "all": FIELDS}


@dataclass(frozen=True)
class Wanted:
    """A prompt and what its clip should show; image is the first frame for image to video."""

    prompt: str
    shape: str
    colour: str
    background: str
    motion: str
    is_held_out: bool = False


def draw_wanted(n: int, seed: int) -> list[Wanted]:
    """n prompts, half of them of held-out triples, one in six in a form the grammar does not have."""
    rng = np.random.default_rng(seed)
    speaker = Speaker(np.random.default_rng(seed + 1))
    wanted = []
    for is_held_out, count in ((True, n // 2), (False, n - n // 2)):
        clips = world.sample_clips(rng, count, 5, held_out=is_held_out)
        for i in rng.permutation(count):
            fields = _fields(clips, i)
            prompt = speaker.describe(clips, i, reserved=True, whole=True)
            if speaker.chance(1 / 6):
                prompt = _foreign(speaker, clips, i, fields)
            wanted.append(Wanted(prompt, *fields, is_held_out))
    return [wanted[i] for i in rng.permutation(n)]


def _fields(clips: world.Clips, i: int) -> tuple[str, str, str, str]:
    return (
        world.SHAPES[clips.shape[i]],
        list(world.COLOURS)[clips.colour[i]],
        list(world.BACKGROUNDS)[clips.background[i]],
        world.MOTIONS[clips.motion[i]],
    )


def _foreign(speaker: Speaker, clips: world.Clips, i: int, fields: tuple[str, str, str, str]) -> str:
    shape, colour, background, motion = fields
    noun = speaker.noun(shape, colour, world.SIZES[clips.size[i]])
    action = speaker.verb(motion, world.SPEEDS[clips.speed[i]], 1)
    return speaker.pick(FOREIGN).format(n=noun, v=action, p=speaker.place(background))


def score(wanted: list[Wanted], seen: list[Sighting]) -> dict[str, float]:
    """Shares of clips in which each field, and several together, are as wanted."""
    right = {f: np.array([getattr(w, f) == getattr(s, f) for w, s in zip(wanted, seen, strict=True)]) for f in FIELDS}
    shares = {field: float(values.mean()) for field, values in right.items()}
    for name, fields in JOINT.items():
        shares[name] = float(np.all([right[f] for f in fields], axis=0).mean())
    shares["hollow"] = float(np.mean([s.hollow > HOLLOW for s in seen]))
    return shares


class ListedEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's method at given timesteps, of which the pipelines know nothing."""

    listed: list[float]

    def set_timesteps(self, num_inference_steps: int, device: str | None = None) -> None:
        assert num_inference_steps == len(self.listed)
        super().set_timesteps(sigmas=[time / 1000 for time in self.listed], device=device)


class Studio:
    """Both pipelines over one set of weights."""

    def __init__(self, folder: str, device: str, batch: int, pool: ProcessPoolExecutor) -> None:
        checkpoint = inspect(folder)
        self.needs_image = checkpoint.has_image_channels
        self.text = WanPipeline.from_pretrained(checkpoint.root_of("vae")).to(device)
        self.text.set_progress_bar_config(disable=True)
        self.image = _image_pipeline(checkpoint, self.text).to(device)
        self.image.set_progress_bar_config(disable=True)
        self.device, self.batch, self.pool = device, batch, pool
        self.is_outlined = False

    def add_loras(self, files: list[str]) -> None:
        """Each is FILE or FILE=SCALE."""
        for file in files:
            path, _, scale = file.partition("=")
            for pipeline in (self.text, self.image):
                merge(pipeline.transformer, Path(path), float(scale or 1))

    def use_timesteps(self, timesteps: list[float]) -> None:
        for pipeline in (self.text, self.image):
            pipeline.scheduler = ListedEuler()
            pipeline.scheduler.listed = timesteps

    def film(self, prompts: list[str], options: dict[str, Any], seed: int = 0) -> NDArray[np.uint8]:
        """Clips (n, f, h, w, 3) uint8 of prompts, in batches; the noise depends on the seed and the batch alone."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            generator = torch.Generator("cpu").manual_seed(seed * 1000 + start)
            frames = self.text(prompt=prompts[start : start + self.batch], generator=generator, **options).frames
            parts.append(_bytes(frames))
        return np.concatenate(parts)

    def animate(
        self,
        image: Image.Image,
        prompts: list[str],
        options: dict[str, Any],
        seed: int,
        last_image: Image.Image | None = None,
    ) -> NDArray[np.uint8]:
        given = {"image": image, "last_image": last_image, "generator": torch.Generator("cpu").manual_seed(seed)}
        return _bytes(self.image(prompt=prompts, **given, **options).frames)

    def look_at(self, clips: NDArray[np.uint8]) -> list[Sighting]:
        return list(self.pool.map(partial(look, is_outlined=self.is_outlined), clips, chunksize=4))


def _image_pipeline(checkpoint: Checkpoint, text: WanPipeline) -> WanImageToVideoPipeline:
    """The transformer of the checkpoint; what its folder lacks is that of its base."""
    if checkpoint.base is None:
        return WanImageToVideoPipeline.from_pretrained(checkpoint.path)
    transformer = WanTransformer3DModel.from_pretrained(checkpoint.path, subfolder="transformer")
    shared = {name: text.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return WanImageToVideoPipeline(transformer=transformer, **shared)


def _bytes(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.round(np.asarray(frames) * 255).clip(0, 255).astype(np.uint8)


def draw_pictures(n: int, seed: int) -> list[tuple[Image.Image, list[Wanted]]]:
    """Rendered first frames with the shape near the middle, each with four motions asked for in new sentences."""
    rng = np.random.default_rng(seed)
    speaker = Speaker(np.random.default_rng(seed + 1))
    clips = world.sample_clips(rng, n, 1, held_out=False)
    clips.path[..., :2] = 0.5 + rng.uniform(-0.08, 0.08, clips.path[..., :2].shape)
    clips.path[..., 2] = rng.uniform(0.13, 0.2, clips.path.shape[:2])
    clips.path[..., 3] = 0
    pictures = world.to_uint8(world.render(clips, FPS_SIZE, FPS_SIZE))[:, 0]
    chosen = []
    for i in rng.permutation(n):
        shape, colour, background, _ = _fields(clips, i)
        able = [
            m for m in range(len(world.MOTIONS)) if not (world.MOTIONS[m] == "spin" and shape in ("circle", "ring"))
        ]
        wanted = []
        for motion in rng.choice(able, size=4, replace=False):
            clips.motion[i], clips.speed[i] = motion, 0
            prompt = speaker.direct(clips, i, reserved=True)
            wanted.append(Wanted(prompt, shape, colour, background, world.MOTIONS[motion]))
        chosen.append((Image.fromarray(pictures[i]), wanted))
    return chosen


def draw_ends(n: int, num_frames: int, seed: int) -> list[tuple[Image.Image, Image.Image, Wanted]]:
    """First and last frames of n rendered clips, half of them of held-out triples, with a sentence for the motion."""
    rng = np.random.default_rng(seed)
    speaker = Speaker(np.random.default_rng(seed + 1))
    chosen = []
    for is_held_out, count in ((True, n // 2), (False, n - n // 2)):
        clips = world.sample_clips(rng, count, num_frames, held_out=is_held_out)
        pictures = world.to_uint8(world.render(clips, FPS_SIZE, FPS_SIZE)[:, :, [0, -1]])
        for i, (first, last) in enumerate(pictures):
            say = speaker.direct if speaker.chance(0.5) else speaker.describe
            wanted = Wanted(say(clips, i, reserved=True), *_fields(clips, i), is_held_out)
            chosen.append((Image.fromarray(first), Image.fromarray(last), wanted))
    return chosen


def judge_text(studio: Studio, wanted: list[Wanted], options: dict[str, Any]) -> dict[str, Any]:
    seen = studio.look_at(studio.film([w.prompt for w in wanted], options))
    result: dict[str, Any] = {"clips": len(wanted)} | score(wanted, seen)
    for name, is_held_out in (("held_out", True), ("rendered", False)):
        pairs = [(w, s) for w, s in zip(wanted, seen, strict=True) if w.is_held_out == is_held_out]
        result[f"all, {name} triples"] = score([w for w, _ in pairs], [s for _, s in pairs])["all"] if pairs else None
    result["misses"] = [
        {"prompt": w.prompt, "wanted": " ".join(getattr(w, f) for f in FIELDS), "seen": asdict(s)}
        for w, s in zip(wanted, seen, strict=True)
        if any(getattr(w, f) != getattr(s, f) for f in FIELDS)
    ]
    return result


def judge_image(studio: Studio, num_pictures: int, options: dict[str, Any]) -> dict[str, Any]:
    """PSNR of the first frame against the given picture, and how often the motion asked for is the one seen."""
    wanted, clips, qualities = [], [], []
    for i, (picture, asked) in enumerate(draw_pictures(num_pictures, seed=77)):
        videos = studio.animate(picture, [w.prompt for w in asked], options, seed=i)
        qualities += [psnr(video[0], picture) for video in videos]
        wanted += asked
        clips.append(videos)
    seen = studio.look_at(np.concatenate(clips))
    return {
        "clips": len(wanted),
        "first_frame_psnr_mean": float(np.mean(qualities)),
        "first_frame_psnr_worst": float(np.min(qualities)),
    } | score(wanted, seen)


def judge_ends(studio: Studio, num_clips: int, options: dict[str, Any]) -> dict[str, Any]:
    """PSNR of both given frames, the motion seen, and of ways and changes of size how many are steady between them."""
    drawn = draw_ends(num_clips, options["num_frames"], seed=78)
    clips = np.concatenate(
        [studio.animate(first, [w.prompt], options, i, last) for i, (first, last, w) in enumerate(drawn)]
    )
    wanted = [w for _, _, w in drawn]
    firsts = [psnr(clip[0], first) for clip, (first, _, _) in zip(clips, drawn, strict=True)]
    lasts = [psnr(clip[-1], last) for clip, (_, last, _) in zip(clips, drawn, strict=True)]
    steady = [is_steady(clip) for clip, w in zip(clips, wanted, strict=True) if w.motion in STEADY]
    return {
        "clips": len(wanted),
        "first_frame_psnr_mean": float(np.mean(firsts)),
        "first_frame_psnr_worst": float(np.min(firsts)),
        "last_frame_psnr_mean": float(np.mean(lasts)),
        "last_frame_psnr_worst": float(np.min(lasts)),
        "steady_clips": len(steady),
        "steady": float(np.mean(steady)),
    } | score(wanted, studio.look_at(clips))


def psnr(frame: NDArray[np.uint8], given: Image.Image) -> float:
    error = frame.astype(np.float64) - np.asarray(given, dtype=np.float64)
    return float(10 * np.log10(255**2 / max(1e-3, (error**2).mean())))


def judge_named(studio: Studio, options: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The sentences that newcomers type, several seeds of each."""
    wanted = []
    for prompt, truth in NAMED:
        colour, shape, background, motion = truth.split()
        wanted += [Wanted(prompt, shape, colour, background, motion)] * seeds
    return judge_text(studio, wanted, options)


def sheet(clips: NDArray[np.uint8], columns: int = 6) -> Image.Image:
    """Each clip as a strip of a few of its frames, two strips a line."""
    picks = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    strips = [np.concatenate(list(clip[picks]), axis=1) for clip in clips]
    strips += [np.zeros_like(strips[0])] * (len(strips) % 2)
    return Image.fromarray(
        np.concatenate([np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)], axis=0)
    )


def row(name: str, result: dict[str, Any]) -> str:
    cells = [f"{100 * result[field]:6.1f}" for field in (*FIELDS, *JOINT, "hollow")]
    return f"{name:<34}{result['clips']:>5} " + " ".join(cells)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="src/kinema/engines/wan/tiny", help="the folder of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=208, help="for the default settings")
    parser.add_argument("--grid-prompts", type=int, default=104, help="for each other setting; 0 leaves them out")
    parser.add_argument("--pictures", type=int, default=26, help="first frames, four motions asked of each")
    parser.add_argument("--ends", type=int, default=104, help="clips with a first and a last frame, if the model can")
    parser.add_argument("--named-seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="*", default=[8, 12, 20, 30])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 3.0, 5.0])
    parser.add_argument("--default-steps", type=int, default=20)
    parser.add_argument("--default-guidance", type=float, default=3.0)
    parser.add_argument("--lora", nargs="*", default=[], help="FILE or FILE=SCALE, added to the transformer")
    parser.add_argument("--timesteps", type=float, nargs="*", help="take steps of Euler's method at these instead")
    parser.add_argument("--outlined", action="store_true", help="shapes are outlines; rings are not asked for")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", default="128x128", help="width x height")
    parser.add_argument("--batch", type=int, default=104 if torch.cuda.is_available() else 4)
    parser.add_argument("--report", default="runs/report.json")
    parser.add_argument("--sheet", help="write a contact sheet of the named prompts to this PNG")
    options = parser.parse_args(arguments)
    if not (Path(options.model) / "model_index.json").exists():
        parser.error(f"--model {options.model} has no model_index.json; name a folder that `export` wrote")
    Path(options.report).parent.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    options = parse(arguments)
    width, height = (int(part) for part in options.size.split("x"))
    pool = ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("fork"))
    pool.submit(abs, 0).result()  # starts the workers before there is a device context to inherit
    studio = Studio(options.model, options.device, options.batch, pool)
    studio.add_loras(options.lora)
    studio.is_outlined = options.outlined
    if options.timesteps:
        studio.use_timesteps(options.timesteps)
        options.default_steps = len(options.timesteps)

    def settings(steps: int, guidance: float) -> dict[str, Any]:
        fixed = {"height": height, "width": width, "num_frames": options.frames, "output_type": "np"}
        return fixed | {"num_inference_steps": steps, "guidance_scale": guidance}

    default = settings(options.default_steps, options.default_guidance)
    label = f"{options.default_steps} steps, guidance {options.default_guidance:g}"
    report: dict[str, Any] = {"default": {"steps": options.default_steps, "guidance": options.default_guidance}}
    print(f"{'':<34}clips  " + " ".join(f"{f[:6]:>6}" for f in (*FIELDS, "c+b+m", "all", "hollow")), flush=True)
    began = time.monotonic()

    def note(key: str, name: str, result: dict[str, Any]) -> None:
        report[key] = result
        print(row(name, result), f"  ({time.monotonic() - began:.0f}s)", flush=True)
        Path(options.report).write_text(json.dumps(report, indent=1))

    if studio.needs_image:
        options.prompts = options.named_seeds = options.grid_prompts = 0
    if options.prompts:
        wanted = draw_wanted(options.prompts, seed=2024)
        if options.outlined:
            wanted = [w for w in wanted if w.shape != "ring"]
        note("text", f"text to video, {label}", judge_text(studio, wanted, default))
    if options.named_seeds:
        note("named", "what newcomers type", judge_named(studio, default, options.named_seeds))
    if options.sheet and not studio.needs_image:
        sheet(studio.film([prompt for prompt, _ in NAMED], default)).save(options.sheet)
    if options.pictures:
        note("image", "image to video", judge_image(studio, options.pictures, default))
        print({key: round(value, 2) for key, value in report["image"].items() if "psnr" in key}, flush=True)
    if options.ends and studio.needs_image:
        note("ends", "first and last frame", judge_ends(studio, options.ends, default))
        measured = {key: value for key, value in report["ends"].items() if "psnr" in key or "steady" in key}
        print({key: round(value, 3) for key, value in measured.items()}, flush=True)
    wanted = draw_wanted(options.grid_prompts, seed=2025) if options.grid_prompts else []
    for steps in options.steps if wanted else []:
        for guidance in options.guidance:
            result = judge_text(studio, wanted, settings(steps, guidance))
            note(f"grid {steps} {guidance:g}", f"{steps} steps, guidance {guidance:g}", result)


if __name__ == "__main__":
    main()
