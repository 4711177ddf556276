"""Our text encoder and tokenizer give, bit for bit, what those of transformers give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from kinema.engines.wan.checkpoint import BUNDLED
from kinema.engines.wan.conditioning import clean_prompt
from kinema.engines.wan.configs import TextEncoderConfig
from kinema.engines.wan.text_encoder import ALIASES, TextEncoder, shapes
from kinema.engines.wan.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

VOCABULARY = 100
SIZES: list[dict[str, Any]] = [
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    {  # heads that are together wider than a token, and fewer and nearer buckets
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 5,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-5,
    },
]


def library_encoder(**size: Any) -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(1)
    config = UMT5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **size)
    module = UMT5EncoderModel(config).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name or "norm" in name:  # each layer's positions and gains away from what they begin as
            parameter.data += torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=["four heads", "five wide heads"])
@torch.inference_mode()
def test_every_bit_is_that_of_transformers(size: dict[str, Any], dtype: torch.dtype) -> None:
    """For short and long prompts, in each type."""
    module = library_encoder(**size).to(dtype)
    ours = TextEncoder(TextEncoderConfig(vocab_size=VOCABULARY, **size), module.state_dict())
    for count in (1, 2, 7, 33, 200, 512):
        ids = torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(count))
        theirs = module(ids, torch.ones_like(ids)).last_hidden_state
        assert theirs.isfinite().all()
        assert torch.equal(ours(ids[0].tolist()), theirs), count


@torch.inference_mode()
def test_padding_changes_a_prompt_by_rounding_alone() -> None:
    """As a GPU pads it."""
    ours = TextEncoder(TextEncoderConfig(vocab_size=VOCABULARY, **SIZES[1]), library_encoder(**SIZES[1]).state_dict())
    for count in (1, 7, 63, 64):
        tokens = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(count)).tolist()
        torch.testing.assert_close(ours.padded(tokens, 64)[:, :count], ours(tokens), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_numbers_beyond_float16_are_bounded_alike() -> None:
    """Where a layer's sum would be infinite."""
    module = library_encoder(**SIZES[0])
    module.encoder.block[0].layer[1].DenseReluDense.wo.weight.data *= 3e5
    module.to(torch.float16)
    ids = torch.arange(20)[None]
    theirs = module(ids, torch.ones_like(ids)).last_hidden_state
    ours = TextEncoder(TextEncoderConfig(vocab_size=VOCABULARY, **SIZES[0]), module.state_dict())(ids[0].tolist())
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("size", SIZES, ids=["four heads", "five wide heads"])
def test_names_and_shapes_are_those_of_the_module(size: dict[str, Any]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in library_encoder(**size).state_dict().items()}
    for alias in ALIASES.values():
        del expected[alias]
    assert shapes(TextEncoderConfig(vocab_size=VOCABULARY, **size)) == expected


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as T5 has it: pieces with scores, a mark for each space, tokens that a text can name."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁red", -4.0), ("▁fox", -4.5)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzéß"]
    from transformers import PreTrainedTokenizerFast

    tokenizer = LibraryTokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken("<extra_id_0>", special=True)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return folder


PROMPTS = [
    "",
    "a red fox",
    "A   Red\tfox…  ",
    "ﬁne &amp; dandy",
    "</s> and <extra_id_0>",
    "日本 😀",
    "fox " * 700,
    "x" * 511,
    "x" * 600,
]


@pytest.mark.parametrize("which", ["bundled", "unigram"])
def test_tokens_are_those_of_transformers(which: str, unigram: Path) -> None:
    """With the end's own token, cut off at 512."""
    assert_same_tokens(BUNDLED["tiny-wan"] / "tokenizer" if which == "bundled" else unigram, PROMPTS)


@given(st.lists(st.text(max_size=40), max_size=8))
def test_tokens_of_any_text_are_those_of_transformers(unigram: Path, prompts: list[str]) -> None:
    assert_same_tokens(unigram, [prompt.encode("utf-8", "ignore").decode() for prompt in prompts])


def assert_same_tokens(folder: Path, prompts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    for prompt in map(clean_prompt, prompts):
        expected = theirs(prompt, max_length=512, truncation=True, add_special_tokens=True).input_ids
        assert ours.tokens(prompt) == expected


def test_a_folder_without_a_tokenizer_file_is_converted(
    tmp_path: Path, unigram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, which runs no code of the folder's own."""
    asked: list[dict[str, object]] = []

    def convert(_folder: str, **how: object) -> AutoTokenizerOf:
        asked.append(how)
        return AutoTokenizerOf(unigram)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", convert)
    expected = Tokenizer.load(unigram).tokens("a red fox")
    assert Tokenizer.load(tmp_path).tokens("a red fox") == expected
    assert asked == [{"trust_remote_code": False}]


class AutoTokenizerOf:
    """What transformers makes of a SentencePiece model, as far as it is used."""

    def __init__(self, folder: Path) -> None:
        self.backend_tokenizer = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
