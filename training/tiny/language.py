"""How people talk about the world: a small grammar with many words for everything, and its tokenizer.

Each clip gets several descriptions. Whatever is left unsaid was drawn at random, with one exception: a moving shape is
always said to move, so a sentence without motion means standing still.
One sentence in sixteen, chosen by its checksum, is reserved: training redraws it, the evaluation uses nothing else.
This module knows the world's attributes as indices and nothing of pixels or networks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from training.tiny.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, SPEEDS, Clips

SHAPE_WORDS = {
    "circle": ["circle", "circle", "circle", "ball", "ball", "disc", "disk", "dot", "sphere", "orb"],
    "square": ["square", "square", "square", "box", "block", "cube", "tile"],
    "triangle": ["triangle", "triangle", "triangle", "pyramid", "wedge"],
    "star": ["star", "star", "star", "five pointed star", "star shape"],
    "heart": ["heart", "heart", "heart", "love heart", "heart shape"],
    "diamond": ["diamond", "diamond", "diamond", "rhombus", "lozenge", "kite"],
    "ring": ["ring", "ring", "ring", "donut", "doughnut", "hoop", "annulus"],
    "cross": ["cross", "cross", "cross", "plus", "plus sign", "plus shape"],
}
COLOUR_WORDS = {
    "red": ["red", "red", "red", "red", "crimson", "scarlet", "ruby", "bright red", "cherry red"],
    "green": ["green", "green", "green", "green", "emerald", "lime", "bright green", "forest green"],
    "blue": ["blue", "blue", "blue", "blue", "cobalt", "sapphire", "royal blue", "bright blue"],
    "yellow": ["yellow", "yellow", "yellow", "yellow", "golden", "gold", "lemon", "bright yellow"],
    "orange": ["orange", "orange", "orange", "orange", "tangerine", "amber", "bright orange"],
    "purple": ["purple", "purple", "purple", "purple", "violet", "lavender", "magenta", "lilac"],
    "pink": ["pink", "pink", "pink", "pink", "rose", "salmon", "light pink", "hot pink"],
    "cyan": ["cyan", "cyan", "cyan", "cyan", "turquoise", "teal", "aqua", "light blue"],
    "white": ["white", "white", "white", "white", "snow white", "ivory", "pale", "pure white"],
    "black": ["black", "black", "black", "black", "ebony", "jet black", "pitch black", "dark"],
}
PLAIN_BACKGROUND_WORDS = {
    "black": ["black", "black", "black", "dark", "pitch black", "solid black"],
    "white": ["white", "white", "white", "plain white", "bright white", "blank", "pure white"],
    "gray": ["gray", "gray", "grey", "grey", "silver", "neutral gray", "plain grey"],
    "navy": ["navy", "navy", "navy blue", "navy blue", "dark blue", "midnight blue", "deep blue", "blue"],
    "beige": ["beige", "beige", "beige", "tan", "cream", "sand", "sandy", "cream colored"],
    "sky": ["sky", "sky", "sky blue", "light blue", "blue sky", "pale blue"],
    "grass": ["grass", "grass", "green grass", "grassy", "meadow", "green", "lawn"],
}
PLAIN_PLACES = [
    "on a {} background", "on a {} background", "on a {} background", "on {} background", "against a {} background",
    "against a {} backdrop", "over a {} background", "with a {} background", "in front of a {} background",
    "in front of a {} wall", "on a {} backdrop", "{} background", "the background is {}", "across a {} background",
    "on a {} canvas", "on a {} screen",
]  # fmt: skip
SPECIAL_PLACES = {
    "black": ["in the dark", "in space", "in complete darkness", "on black", "in outer space"],
    "white": ["on white", "on white paper", "in a white room", "on a sheet of paper", "in the snow"],
    "gray": ["on gray", "on grey concrete", "on a gray wall", "in a gray room"],
    "navy": ["at night", "in the night", "under the night sky", "in the night sky", "on navy"],
    "beige": ["on the sand", "in the desert", "on the beach", "on beige paper", "on beige"],
    "sky": ["in the sky", "in the sky", "in a blue sky", "in the blue sky", "against the sky", "high in the sky",
            "in the clear sky", "with the sky behind", "in the air", "up in the sky", "in the clouds"],
    "grass": ["on the grass", "on the grass", "on grass", "on green grass", "on the green grass", "over the grass",
              "on a lawn", "on the lawn", "in a meadow", "in a green field", "on a grassy field", "in the park",
              "in the garden", "in a field", "above the grass", "outdoors on the grass"],
}  # fmt: skip

# Verbs as base, -s and -ing; phrases give the base and what follows it.
_VERB_FORMS = [
    "move moves moving, go goes going, slide slides sliding, travel travels traveling, drift drifts drifting",
    "roll rolls rolling, glide glides gliding, head heads heading, fly flies flying, float floats floating",
    "rise rises rising, ascend ascends ascending, climb climbs climbing, fall falls falling, drop drops dropping",
    "sink sinks sinking, descend descends descending, bounce bounces bouncing, hop hops hopping, jump jumps jumping",
    "grow grows growing, get gets getting, become becomes becoming, expand expands expanding, swell swells swelling",
    "inflate inflates inflating, increase increases increasing, shrink shrinks shrinking, run runs running",
    "contract contracts contracting, deflate deflates deflating, decrease decreases decreasing, spin spins spinning",
    "rotate rotates rotating, turn turns turning, twirl twirls twirling, whirl whirls whirling, orbit orbits orbiting",
    "circle circles circling, loop loops looping, stay stays staying, stand stands standing, hover hovers hovering",
    "remain remains remaining, sit sits sitting, rest rests resting",
]
_VERBS = {verb.split()[0]: verb.split() for line in _VERB_FORMS for verb in line.split(", ")}
_WAYS = ["move", "move", "move", "move", "go", "slide", "travel", "drift", "glide", "fly", "float", "head"]
MOTION_PHRASES = {
    "right": [f"{v} {d}" for v in [*_WAYS, "roll", "run"]
              for d in ("right", "right", "to the right", "to the right", "rightward", "rightwards",
                        "from left to right", "towards the right")],
    "left": [f"{v} {d}" for v in [*_WAYS, "roll", "run"]
             for d in ("left", "left", "to the left", "to the left", "leftward", "leftwards",
                       "from right to left", "towards the left")],
    "up": [f"{v} {d}" for v in [*_WAYS, "drift"]
           for d in ("up", "up", "up", "upward", "upwards", "from bottom to top", "to the top")]
          + ["rise", "rise", "rise", "rise up", "ascend", "ascend", "climb", "climb up", "fly up", "float up"] * 3,
    "down": [f"{v} {d}" for v in [*_WAYS, "drop"]
             for d in ("down", "down", "down", "downward", "downwards", "from top to bottom", "to the bottom")]
            + ["fall", "fall", "fall", "fall down", "drop", "drop down", "sink", "sink down", "descend"] * 3,
    "bounce": ["bounce", "bounce", "bounce", "bounce", "bounce up and down", "bounce up and down", "bounce in place",
               "hop", "hop up and down", "jump", "jump up and down", "bounce around"],
    "grow": ["grow", "grow", "grow", "grow bigger", "grow larger", "get bigger", "get bigger", "get larger", "expand",
             "expand", "become bigger", "become larger", "increase in size", "swell", "inflate", "swell up"],
    "shrink": ["shrink", "shrink", "shrink", "shrink", "get smaller", "get smaller", "become smaller", "contract",
               "decrease in size", "deflate", "shrink down", "grow smaller"],
    "spin": ["spin", "spin", "spin", "spin around", "rotate", "rotate", "rotate in place", "spin in place", "turn",
             "turn around", "twirl", "whirl", "rotate around its center"],
    "orbit": ["orbit", "orbit around", "orbit the center", "move in a circle", "move in a circle", "move in circles",
              "go around in a circle", "travel in a circle", "circle around", "circle the center",
              "go round and round", "fly in circles", "loop around", "orbit around the center"],
    "still": ["stay still", "stay still", "stand still", "remain still", "rest", "sit still", "stay in place",
              "remain motionless", "stay put", "hover in place", "stand in place"],
}  # fmt: skip
SIZE_WORDS = {"small": ["small", "small", "tiny", "little", "mini"], "large": ["large", "big", "big", "huge", "giant"]}
SPEED_WORDS = {
    "slow": ["slowly", "slowly", "slowly", "gently", "gradually", "calmly"],
    "fast": ["quickly", "quickly", "fast", "rapidly", "swiftly", "speedily"],
}
PREFIXES = [
    "a video of", "a video of", "video of", "an animation of", "animation of", "a clip of", "a short clip of",
    "a short video of", "footage of", "show", "show me", "create a video of", "make a video of", "generate",
    "a simple animation of", "draw", "please show", "i want", "imagine", "a scene with", "a picture of", "a movie of",
    "there is", "here is", "we see", "a drawing of",
]  # fmt: skip
SUFFIXES = [
    "high quality", "best quality", "4k", "8k", "hd", "smooth motion", "smooth", "smooth animation", "cinematic",
    "minimal style", "minimalist", "flat design", "2d animation", "simple", "clean", "in high resolution", "realistic",
    "very detailed", "sharp", "static camera", "fixed camera", "vivid colors", "cartoon style", "flat style",
    "high detail", "beautiful", "vector art", "motion graphics", "centered composition", "professional lighting",
]  # fmt: skip
NEGATIVES = [
    "blurry", "low quality", "worst quality", "bad quality", "distorted", "ugly", "deformed", "noise", "noisy",
    "artifacts", "static", "watermark", "text", "subtitles", "overexposed", "jpeg compression", "blurred details",
]  # fmt: skip
ADJECTIVES = ["bright", "solid", "plain", "shiny", "simple", "flat", "single", "lone", "colorful", "nice", "pretty"]
# Known words without a meaning of their own here: the model learns to pass over them.
SPARE_WORDS = [
    "cat dog bird car person man woman people tree house water sea ocean mountain city street road sun",
    "moon light shadow glowing neon glass metal wooden paper toy object thing shape something one two",
    "three several many and or while then slow fast very its their his her this that these those with",
    "without into onto under above below behind left-hand camera zoom pan shot view close wide screen",
    "frame scene style art color colors coloured colored background foreground",
]
GRAMMAR_WORDS = [
    "a an the it is are that which be motionless static stationary unmoving colored object shape thing something",
    "make let animate have watch as now then should see keep start begin starts begins please",
]

PAD, END, UNKNOWN = 0, 1, 2
MAX_TOKENS = 47  # of a training sentence; with the folded pads that makes 48 keys, a round number for attention


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits: what the shipped tokenizer does too."""
    return re.findall(r"[a-z0-9]+", text.lower())


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Word to id; pads, the end and the unknown word come first."""
    texts: list[str] = [*PLAIN_PLACES, *PREFIXES, *SUFFIXES, *NEGATIVES, *ADJECTIVES, *SPARE_WORDS, *GRAMMAR_WORDS]
    tables = (SHAPE_WORDS, COLOUR_WORDS, PLAIN_BACKGROUND_WORDS, SPECIAL_PLACES)
    for table in (*tables, MOTION_PHRASES, SIZE_WORDS, SPEED_WORDS):
        texts += [text for choices in table.values() for text in choices]
    texts += [form for forms in _VERBS.values() for form in forms]
    words = sorted({word for text in texts for word in split_words(text)})
    return {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN} | {word: 3 + i for i, word in enumerate(words)}


def is_reserved(text: str) -> bool:
    """Whether this sentence belongs to the evaluation: training never draws it."""
    return zlib.crc32(" ".join(split_words(text)).encode()) % 16 == 3


def encode(text: str) -> list[int]:
    known = vocabulary()
    return [*[known.get(word, UNKNOWN) for word in split_words(text)][: MAX_TOKENS - 1], END]


class Speaker:
    """Says what a clip shows, in ever different words; all randomness comes from its own generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._numbers = self._uniforms(rng)

    @staticmethod
    def _uniforms(rng: np.random.Generator) -> Iterator[float]:
        while True:
            yield from rng.random(4096).tolist()  # one at a time costs ten times as much

    def pick(self, choices: list[str]) -> str:
        return choices[int(next(self._numbers) * len(choices))]

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def describe(self, clips: Clips, i: int, reserved: bool = False, whole: bool = False) -> str:
        """A sentence for clip i: from the common stock, or only from the reserved one; whole leaves nothing unsaid."""
        while True:
            text = self._sentence(clips, i, whole)
            if is_reserved(text) == reserved:
                return text

    def direct(self, clips: Clips, i: int, reserved: bool = False) -> str:
        """A sentence that tells only the motion, as one says beside a picture: "it moves up"."""
        while True:
            text = self._direction(SHAPES[clips.shape[i]], MOTIONS[clips.motion[i]], SPEEDS[clips.speed[i]])
            if is_reserved(text) == reserved:
                return text

    def _sentence(self, clips: Clips, i: int, whole: bool) -> str:
        motion = MOTIONS[clips.motion[i]]
        noun = self.noun(
            SHAPES[clips.shape[i]] if whole or self.chance(0.96) else None,
            list(COLOURS)[clips.colour[i]] if whole or self.chance(0.94) else None,
            SIZES[clips.size[i]],
        )
        is_moving = motion != "still" or self.chance(0.5)
        place = self.place(list(BACKGROUNDS)[clips.background[i]]) if whole or self.chance(0.8) else ""
        text = self._join(noun, motion if is_moving else None, SPEEDS[clips.speed[i]], place)
        if self.chance(0.16):
            text = f"{self.pick(PREFIXES)} {text}"
        if self.chance(0.16):
            text = f"{text}, {self.pick(SUFFIXES)}"
            text = f"{text}, {self.pick(SUFFIXES)}" if self.chance(0.3) else text
        return text

    def noun(self, shape: str | None, colour: str | None, size: str) -> str:
        words = [self.pick(SIZE_WORDS[size])] if size != "normal" else []
        words += [self.pick(ADJECTIVES)] if self.chance(0.06) else []
        words += [self.pick(COLOUR_WORDS[colour])] if colour else []
        words.append(self.pick(SHAPE_WORDS[shape]) if shape else self.pick(["shape", "object", "thing"]))
        article = self.pick(["a", "a", "a", "a", "the", "one", ""])
        return " ".join([article, *words]).strip()

    def place(self, background: str) -> str:
        if self.chance({"sky": 0.75, "grass": 0.75}.get(background, 0.15)):
            return self.pick(SPECIAL_PLACES[background])
        return self.pick(PLAIN_PLACES).format(self.pick(PLAIN_BACKGROUND_WORDS[background]))

    def verb(self, motion: str, speed: str, form: int) -> str:
        """The motion as base (0), third person (1) or participle (2), with its adverb if it has a speed."""
        first, *rest = self.pick(MOTION_PHRASES[motion]).split(" ", 1)
        phrase = " ".join([_VERBS[first][form], *rest])
        if speed == "normal":
            return phrase
        adverb = self.pick(SPEED_WORDS[speed])
        return f"{adverb} {phrase}" if adverb != "fast" and self.chance(0.4) else f"{phrase} {adverb}"

    def _join(self, noun: str, motion: str | None, speed: str, place: str) -> str:
        if motion is None:
            return self.pick(["{n} {p}", "{n}, {p}", "{p}, {n}", "{p} {n}"]).format(n=noun, p=place).strip(" ,")
        if motion == "still" and self.chance(0.4):
            state = self.pick(["motionless", "static", "stationary", "unmoving", "at rest"])
            return self.pick(["{n} {s} {p}", "{s} {n} {p}", "{n} is {s} {p}"]).format(n=noun, s=state, p=place).strip()
        is_place_last = self.chance(0.6)
        if self.chance(0.5):
            action = self.verb(motion, speed, 2)
            forms = ["{n} {v} {p}", "{n} {v} {p}", "{n} {v}, {p}", "{n} is {v} {p}"]
            others = ["{p}, {n} {v}", "{n} {p} {v}", "{n} {p}, {v}", "{v} {n} {p}", "{p} {n} is {v}"]
        else:
            action = self.verb(motion, speed, 1)
            forms = ["{n} {v} {p}", "{n} {v} {p}", "{n} that {v} {p}", "{n} which {v}, {p}", "{n} {v}. {p}"]
            others = ["{p}, {n} {v}", "{n} {p} {v}", "{n} {p}. it {v}", "{n} {p} that {v}", "{p} {n} {v}"]
        text = self.pick(forms if is_place_last else others).format(n=noun, v=action, p=place)
        return " ".join(text.split()).strip(" ,.")

    def _direction(self, shape: str, motion: str, speed: str) -> str:
        it = self.pick(["it", "it", "the shape", "the object", f"the {self.pick(SHAPE_WORDS[shape])}"])
        form = int(next(self._numbers) * 3)
        action = self.verb(motion, speed, form)
        if form == 0:
            text = self.pick(["make {i} {v}", "let {i} {v}", "{v}", "have {i} {v}", "{i} should {v}", "{v} please"])
        elif form == 1:
            text = self.pick(["{i} {v}", "{i} {v}", "now {i} {v}", "watch as {i} {v}", "then {i} {v}"])
        else:
            text = self.pick(["{v}", "{i} {v}", "{i} is {v}", "animate {i} {v}", "{i} starts {v}", "keep {i} {v}"])
        return text.format(i=it, v=action)

    def negative(self) -> str:
        """What one writes as a negative prompt; trained as if nothing had been said."""
        return ", ".join(self.pick(NEGATIVES) for _ in range(1 + int(next(self._numbers) * 8)))

    def tokens(self, text: str) -> np.ndarray:
        """Ids padded to MAX_TOKENS, int32; now and then with words the model does not know dropped in."""
        ids = encode(text)
        if self.chance(0.1):
            for _ in range(1 + int(next(self._numbers) * 4)):
                ids.insert(int(next(self._numbers) * len(ids)), UNKNOWN)
            ids = [*ids[:-1][: MAX_TOKENS - 1], END]
        return np.array(ids + [PAD] * (MAX_TOKENS - len(ids)), dtype=np.int32)
