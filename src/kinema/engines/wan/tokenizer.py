"""A checkpoint's tokenizer: from a prompt that is cleaned to the numbers of its tokens.

``tokenizer.json`` has all that the library ``tokenizers`` needs, in a few hundredths of a second. A folder with a
SentencePiece model alone is converted by transformers, which takes seconds to import and is needed for nothing else.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from kinema.engines.wan.presets import MAX_TEXT_TOKENS
from kinema.engines.wan.tokenizer_files import refuse_unconverted


class Tokenizer:
    """Cuts a prompt into ``MAX_TEXT_TOKENS`` tokens at most, the end's own included. May be used on any thread."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.enable_truncation(MAX_TEXT_TOKENS)
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the folder ``tokenizer`` of a checkpoint.

        Raises ConfigError when it has no ``tokenizer.json`` and a package that converts it is missing; otherwise
        whatever the libraries raise for a damaged file.
        """
        path = folder / "tokenizer.json"
        return cls(tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else _converted(folder))

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a prompt that is cleaned, with the special tokens of the tokenizer's template."""
        numbers: list[int] = self._tokenizer.encode(prompt).ids
        return numbers


def _converted(folder: Path) -> tokenizers.Tokenizer:
    refuse_unconverted(folder.parent, folder.name)
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds, and almost no folder needs it

    # By default it asks on the terminal whether code of the folder's own may run.
    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    tokenizer: tokenizers.Tokenizer = loaded.backend_tokenizer
    return tokenizer
