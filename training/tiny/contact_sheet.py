"""Draw docs/clips.png: twelve clips of the bundled model, five frames of each beside its prompt.

.venv/bin/python -m training.tiny.contact_sheet --out docs/clips.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kinema.engines.base import Engine, Frames, UInt8Array
from kinema.engines.registry import create_engine
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings

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


def make_frames(engine: Engine, prompt: str, seed: int) -> UInt8Array:
    """The default clip of the bundled model, (f, h, w, 3)."""
    request = resolve(GenerationOptions(prompt=prompt, seed=seed), engine.capabilities).request
    return np.concatenate([out.data for out in engine.generate(request) if isinstance(out, Frames)])


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
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(EngineSettings())
    engine.load()
    strips = [draw_strip(make_frames(engine, prompt, arguments.seed), prompt) for prompt in PROMPTS]
    draw_sheet(strips).quantize(192).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
