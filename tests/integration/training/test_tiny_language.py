"""What the tiny model is told: the words, what is kept back from training, and the shipped tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.tiny import language, world

SHIPPED = Path(__file__).parents[3] / "src/kinema/engines/wan/tiny/tokenizer/tokenizer.json"


def _speak(n: int, reserved: bool, held_out: bool = False) -> tuple[world.Clips, list[str]]:
    clips = world.sample_clips(np.random.default_rng(0), n, 5, held_out=held_out)
    speaker = language.Speaker(np.random.default_rng(1))
    says = (speaker.describe, speaker.direct)
    return clips, [says[i % 2](clips, i, reserved) for i in range(n)]


def test_training_never_says_a_reserved_sentence() -> None:
    """Sentences of training and of evaluation are told apart by their checksum alone."""
    assert not any(language.is_reserved(text) for text in _speak(400, reserved=False)[1])
    assert all(language.is_reserved(text) for text in _speak(100, reserved=True)[1])


def test_training_never_draws_a_held_out_triple() -> None:
    """The permitted combinations of training and evaluation share no (shape, colour, motion)."""
    trained = {tuple(row) for row in world.combinations(False)[:, :3]}
    held_out = {tuple(row) for row in world.combinations(True)[:, :3]}
    assert trained
    assert held_out
    assert not trained & held_out


def test_every_word_of_the_grammar_is_known() -> None:
    """No sentence of the grammar's own needs the unknown word."""
    for text in _speak(400, reserved=False)[1]:
        assert language.UNKNOWN not in language.encode(text), text


def test_the_shipped_tokenizer_agrees_with_training() -> None:
    """The same ids in training and in the shipped checkpoint, for known and unknown words and none at all."""
    tokenizer = Tokenizer.from_file(str(SHIPPED))
    texts = [*_speak(50, reserved=False)[1], "", "A Red-Circle; zebra!! moving RIGHT...", "一 red   ball"]
    for text in texts:
        assert tokenizer.encode(text).ids == language.encode(text), text
