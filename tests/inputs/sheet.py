"""A contact sheet of every kind of picture and film: the numbers in the file, what is taken for them, what is said.

``python -m tests.inputs.sheet docs/inputs.png`` makes that of the documentation.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, ImageDraw, ImageFont

from kinema.errors import InvalidRequest
from kinema.media.boxes import only_pictures
from kinema.media.film import open_film, rate_note
from kinema.media.images import open_image
from kinema.media.png_chunks import SIGNATURE, cleaned
from tests.inputs.films import FILMS, Film
from tests.inputs.pictures import PICTURES, Picture

COLUMNS = 4
CELL = (312, 128)
REFUSED_HEIGHT = 40
# Each picture has this much room.
ROOM = (136, 72)
# Grey, so that white is seen.
GROUND, INK, PALE, BAD = "#e9ecef", "#1b1f24", "#4b5563", "#b3261e"
# How many characters of the small letters fit into a cell.
LINE_CHARS = 54


@dataclass(frozen=True)
class Cell:
    """``given`` is what a reader shows that knows of numbers alone, where there is one."""

    name: str
    given: Image.Image | None
    taken: Image.Image | None
    said: str


def cells_of_pictures() -> Iterator[Cell]:
    for name, picture in PICTURES.items():
        try:
            opened = open_image(picture.data)
            taken = Image.fromarray(opened.fit(opened.size).pixels)
        except InvalidRequest as exc:
            yield Cell(name, None, None, f"refused: {_problem(exc)}")
            continue
        yield Cell(
            name, _numbers(picture), taken, "; ".join(note.removeprefix("input_reference ") for note in opened.notes)
        )


def cells_of_films() -> Iterator[Cell]:
    for name, film in FILMS.items():
        try:
            opened = open_film(film.data)
            frames = list(opened.frames(opened.shape.size, film.fps))
        except InvalidRequest as exc:
            yield Cell(name, None, None, f"refused: {_problem(exc)}")
            continue
        shape = f"{float(opened.shape.seconds):.3g} s at {film.fps} fps"
        sound = ["with sound"] if opened.has_sound else []
        rate = rate_note(opened.shape, film.fps)
        said = [shape, *sound, *(note.removeprefix("the video ") for note in opened.notes), *([rate] if rate else [])]
        yield Cell(name, _stored(film), Image.fromarray(frames[0]), "; ".join(said))


def _problem(exc: InvalidRequest) -> str:
    return exc.message.split("; ")[0].removeprefix("input_reference ").removeprefix("video ")


def _numbers(picture: Picture) -> Image.Image:
    """The numbers in the file, as colours of sRGB."""
    data = cleaned(picture.data).data if picture.data.startswith(SIGNATURE) else picture.data
    return Image.open(io.BytesIO(data)).convert("RGB")


def _stored(film: Film) -> Image.Image:
    """The first frame as it is stored, by the matrix of ordinary films."""
    data = only_pictures(film.data) if film.data[4:8] == b"ftyp" else film.data  # without what is cut off
    with av.open(io.BytesIO(data)) as container:
        frame: npt.NDArray[np.uint8] = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return Image.fromarray(frame)


def draw_part(title: str, cells: list[Cell], top: int, onto: Image.Image) -> int:
    """Draw the cells below ``top``, those of refused files last and small; returns where they end."""
    draw = ImageDraw.Draw(onto)
    draw.text((16, top + 8), title, INK, ImageFont.load_default(20))
    draw.text((116, top + 15), "left: the numbers in the file; right: what is taken for them", PALE, _small())
    top += 44
    for is_refused, height in ((False, CELL[1]), (True, REFUSED_HEIGHT)):
        shown = [cell for cell in cells if (cell.taken is None) == is_refused]
        for number, cell in enumerate(shown):
            row, column = divmod(number, COLUMNS)
            _draw(draw, onto, cell, 16 + column * CELL[0], top + row * height)
        top += -(-len(shown) // COLUMNS) * height
    return top


def _draw(draw: ImageDraw.ImageDraw, onto: Image.Image, cell: Cell, left: int, top: int) -> None:
    draw.text((left, top), cell.name, INK, ImageFont.load_default(13))
    text_top, colour = top + 18, BAD
    if cell.given is not None and cell.taken is not None:
        for number, picture in enumerate((cell.given, cell.taken)):
            scale = min(ROOM[0] / picture.width, ROOM[1] / picture.height)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            place = left + number * (ROOM[0] + 8), top + 18
            onto.paste(picture.resize(size, Image.Resampling.NEAREST), place)
        text_top, colour = text_top + ROOM[1] + 2, PALE
    text = "\n".join(textwrap.wrap(cell.said, LINE_CHARS)[:3])
    draw.multiline_text((left, text_top), text, colour, _small(), spacing=1)


def _small() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(10.5)


def main(path: str) -> None:
    """Write the sheet as a PNG."""
    pillow_heif.register_heif_opener()  # for the numbers in the files
    parts = {"Pictures": list(cells_of_pictures()), "Films": list(cells_of_films())}
    whole = Image.new("RGB", (16 + COLUMNS * CELL[0], 8000), GROUND)
    end = 0
    for title, cells in parts.items():
        end = draw_part(title, cells, end, whole) + 8
    whole.crop((0, 0, whole.width, end)).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
