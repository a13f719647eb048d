"""Tokenizers: text comes back, separators stay apart, foreign files are understood."""

import json

import numpy as np
import pytest
import tokenizers
from corpora import make_documents
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.data import tokenizer
from snlp_jax.data.prompts import prompt_ids, split_stops
from snlp_jax.errors import InputError


@given(st.text())
def test_byte_round_trip(text: str) -> None:
    tok = tokenizer.ByteTokenizer()
    ids = tok.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text.encode()),)
    assert tok.decode(ids) == text
    assert tok.decode([tok.bos_id, *ids, tok.bos_id]) == text


def test_byte_decodes_broken_utf8() -> None:
    assert tokenizer.ByteTokenizer().decode([104, 105, 0xFF, 0xE6]) == "hi\ufffd\ufffd"
    assert tokenizer.ByteTokenizer().decode([]) == ""


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe(make_documents(50), 300)


@given(text=st.text())
def test_bpe_round_trip_of_any_text(bpe: tokenizer.Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.bos_id not in ids


def test_bpe_is_deterministic_and_survives_json(bpe: tokenizer.Tokenizer) -> None:
    text = make_documents(1, seed=5)[0]
    assert bpe.vocab_size == 300 and bpe.name == "bpe-300"
    assert len(bpe.encode(text)) < len(text.encode())
    for other in (tokenizer.train_bpe(make_documents(50), 300), tokenizer.load_tokenizer_json(bpe.to_json())):
        assert other.to_json() == bpe.to_json()
        assert (other.name, other.vocab_size, other.bos_id) == (bpe.name, bpe.vocab_size, bpe.bos_id)
        np.testing.assert_array_equal(other.encode(text), bpe.encode(text))


@pytest.mark.parametrize("text", ["<|bos|>", "a<|bos|>b", "\ud800"])
def test_separator_and_surrogates_in_text_are_text(bpe: tokenizer.Tokenizer, text: str) -> None:
    for tok in (bpe, tokenizer.ByteTokenizer()):
        assert tok.bos_id not in tok.encode(text)
        assert tok.decode(tok.encode(text)) == text.replace("\ud800", "?")


def test_byte_survives_json() -> None:
    assert isinstance(tokenizer.load_tokenizer_json(tokenizer.ByteTokenizer().to_json()), tokenizer.ByteTokenizer)


@pytest.mark.parametrize("special", ["<s>", "<|endoftext|>", None])
def test_foreign_tokenizer_keeps_or_gains_a_separator(special: str | None) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    if special:
        backend.add_special_tokens([special])
    tok = tokenizer.load_tokenizer_json(backend.to_str())
    assert (tok.bos_id, tok.vocab_size, tok.name) == (3, 4, "wordlevel-4")
    assert tok.encode("one two two").tolist() == [1, 2, 2]
    assert tokenizer.load_tokenizer_json(tok.to_json()).bos_id == 3
    assert ("<|bos|>" in json.loads(tok.to_json())["added_tokens"][0]["content"]) == (special is None)


@pytest.mark.parametrize("text", ["not json", "{}", "[1]", '{"type": "bit"}'])
def test_bad_tokenizer_json(text: str) -> None:
    with pytest.raises(InputError, match="give a Hugging Face tokenizer.json"):
        tokenizer.load_tokenizer_json(text)


def test_vocabulary_checks() -> None:
    tokenizer.check_vocab(tokenizer.ByteTokenizer(), 257)
    with pytest.raises(InputError, match="set model.vocab_size to 257"):
        tokenizer.check_vocab(tokenizer.ByteTokenizer(), 256)


def test_special_tokens_of_a_model_travel_with_its_tokenizer():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    special = tokenizer.SpecialTokens(1, (), (1, 0), chat_template="{{ messages }}")
    loaded = tokenizer.load_tokenizer_json(tokenizer.FileTokenizer(backend, special).to_json())
    assert loaded.special == special and loaded.bos_id == 1
    assert loaded.vocab_size == 2  # nothing was added to somebody's vocabulary


@pytest.fixture(scope="module")
def chat_tokenizer(bpe: tokenizer.Tokenizer) -> tokenizer.FileTokenizer:
    """Of a model with a token before a text, an end of text and the ends of turns."""
    backend = tokenizers.Tokenizer.from_str(bpe.to_json())
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    names = backend.get_vocab(with_added_tokens=True)
    return tokenizer.FileTokenizer(backend, tokenizer.SpecialTokens(names["<s>"], (names["<s>"],), (names["</s>"],)))


def test_special_tokens_are_read_where_asked_for(chat_tokenizer: tokenizer.FileTokenizer) -> None:
    text = "<s>go on<|im_end|>"
    end, beginning = chat_tokenizer.special_id("<|im_end|>"), chat_tokenizer.special_id("<s>")
    plain = chat_tokenizer.encode("go on").tolist()
    assert end is not None and end not in chat_tokenizer.encode(text)
    assert chat_tokenizer.encode(text, with_special=True).tolist() == [beginning, *plain, end]
    assert chat_tokenizer.decode(chat_tokenizer.encode(text)) == text  # the copy's switch is its own
    assert chat_tokenizer.special_id("go") is None and tokenizer.ByteTokenizer().special_id("<s>") is None
    # Before a text stands the prefix, once.
    assert prompt_ids(chat_tokenizer, "go on") == [beginning, *plain]
    assert prompt_ids(chat_tokenizer, text, with_special=True) == [beginning, *plain, end]
    assert prompt_ids(chat_tokenizer, "") == [beginning]


def test_a_model_that_knows_nothing_before_a_text(chat_tokenizer: tokenizer.FileTokenizer) -> None:
    end = chat_tokenizer.special_id("</s>")
    backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(chat_tokenizer.to_json())["tokenizer"]))
    tok = tokenizer.FileTokenizer(backend, tokenizer.SpecialTokens(end, (), (end,)))
    assert prompt_ids(tok, "go on") == tok.encode("go on").tolist()
    assert prompt_ids(tok, "") == [end]


def test_names_of_special_tokens_stop_as_tokens(chat_tokenizer: tokenizer.FileTokenizer) -> None:
    end, turn_end = chat_tokenizer.special_id("</s>"), chat_tokenizer.special_id("<|im_end|>")
    assert split_stops(chat_tokenizer, ()) == ((end,), ())
    assert split_stops(chat_tokenizer, ("\n", "<|im_end|>", "</s>", "</s>\n")) == ((end, turn_end), ("\n", "</s>\n"))
    assert split_stops(tokenizer.ByteTokenizer(), ("</s>",)) == ((256,), ("</s>",))


def test_lone_surrogates_do_not_stop_training() -> None:
    trained, plain = (tokenizer.train_bpe([f"a{char} b" * 9], 270) for char in ("\ud800", "?"))
    assert trained.to_json() == plain.to_json()
