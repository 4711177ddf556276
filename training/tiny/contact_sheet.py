"""Draw docs/clips.png: twelve clips of a bundled model, five frames of each beside its prompt.

.venv/bin/python -m training.tiny.contact_sheet --out docs/clips.png
.venv/bin/python -m training.tiny.contact_sheet --model tiny-wan-i2v --out docs/clips-i2v.png
The second has six clips of a first frame, and six of a first and a last one, by sentences that training never used.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kinema.engines.base import NO_INPUTS, Engine, Frames, Inputs, UInt8Array
from kinema.engines.registry import create_engine
from kinema.media.planes import to_rgb
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from training.tiny.evaluate import draw_ends, draw_pictures

PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square moving up on a beige background",
    "a yellow star spinning on a navy background",
    "a green ball bounces on a white background",
    "a pink heart growing on a gray background",
    "an orange triangle moving left on a black background",
    "a purple diamond moving down on a white background",
    "a cyan ring orbiting on a navy background",
    "a white cross spinning on a gray background",
    "a red heart shrinking on a white background",
    "in the sky, a yellow star rises slowly",
    "an orange ball rolls to the right on the grass",
)
COLUMNS = 2
SHOWN_FRAMES = 5
GAP = 8
CAPTION_HEIGHT = 26


@dataclass(frozen=True)
class Scene:
    """What is asked for, and how the sheet calls it."""

    prompt: str
    caption: str
    inputs: Inputs = NO_INPUTS


def scenes_of_pictures() -> list[Scene]:
    """Rendered pictures that are animated, and pairs of them that are led from one to the other."""
    single = [(np.asarray(picture), wanted[0].prompt) for picture, wanted in draw_pictures(6, seed=5)]
    pairs = [(np.asarray(first), np.asarray(last), wanted.prompt) for first, last, wanted in draw_ends(6, 33, seed=6)]
    return [
        *(Scene(prompt, f"first frame: {prompt}", Inputs(first_frame=first)) for first, prompt in single),
        *(Scene(text, f"first and last: {text}", Inputs(first_frame=a, last_frame=b)) for a, b, text in pairs),
    ]


def make_frames(engine: Engine, scene: Scene, seed: int) -> UInt8Array:
    """The default clip of the model, (f, h, w, 3)."""
    can = engine.capabilities
    image_size = None if scene.inputs is NO_INPUTS else can.preset.size
    request = resolve(GenerationOptions(prompt=scene.prompt, seed=seed), can, image_size).request
    made = [out.data for out in engine.generate(request, scene.inputs) if isinstance(out, Frames)]
    frames = np.concatenate(made)
    return frames if frames.ndim == 4 else np.stack([to_rgb(planes) for planes in frames])


def draw_strip(frames: UInt8Array, prompt: str) -> Image.Image:
    """Evenly spaced frames from the first to the last, the prompt above them."""
    chosen = frames[np.linspace(0, len(frames) - 1, SHOWN_FRAMES).round().astype(int)]
    height, width = frames.shape[1:3]
    strip = Image.new("RGB", (SHOWN_FRAMES * (width + 2) - 2, height + CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((0, 4), prompt, fill=(40, 40, 40), font=ImageFont.load_default(15))
    for i, frame in enumerate(chosen):
        strip.paste(Image.fromarray(frame), (i * (width + 2), CAPTION_HEIGHT))
    return strip


def draw_sheet(strips: list[Image.Image]) -> Image.Image:
    """The strips in columns on white."""
    width, height = strips[0].size
    rows = -(-len(strips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + 2 * GAP), rows * (height + GAP) + GAP), "white")
    for i, strip in enumerate(strips):
        row, column = divmod(i, COLUMNS)
        sheet.paste(strip, (GAP + column * (width + 2 * GAP), GAP + row * (height + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/clips.png"))
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(EngineSettings(model=arguments.model))
    engine.load()
    is_text = engine.capabilities.is_text_to_video
    scenes = [Scene(prompt, prompt) for prompt in PROMPTS] if is_text else scenes_of_pictures()
    strips = [draw_strip(make_frames(engine, scene, arguments.seed), scene.caption) for scene in scenes]
    draw_sheet(strips).quantize(192).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
