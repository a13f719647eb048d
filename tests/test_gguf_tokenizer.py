"""Tokenizers made of a GGUF file's fields. With a real vocabulary: benchmarks/real_models.py."""

import json

import pytest
from gguf_files import VOCABULARY, write_model

from snlp_jax.data.template import named_templates
from snlp_jax.errors import InputError
from snlp_jax.pretrained import import_model
from snlp_jax.pretrained.gguf_tokenizer import SPACE, WORDS, gguf_ids, gguf_tokenizer, gguf_tokenizer_config

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def backend_of(fields):
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(fields)))


def sentencepiece(**change):
    """Pieces as SentencePiece trains them: special ones, bytes, then those of the highest score first."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("  ", -1000.0, 4), ("<b>", -1000.0, 4)]
    words = [SPACE + "a", "th", SPACE + "th", "he", SPACE + "the", "the", "an", SPACE + "an", SPACE, *ALPHABET]
    pieces += [(word, -float(i), 1) for i, word in enumerate(words)]
    pieces += [("[PAD300]", -1000.0, 5)]
    keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")]
    fields = dict(zip(keys, map(list, zip(*pieces, strict=True)), strict=True))
    ids = {"unknown": 0, "bos": 1, "eos": 2}
    fields |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()}
    return fields | {"tokenizer.ggml.model": "llama"} | {f"tokenizer.ggml.{name}": change[name] for name in change}


def test_scores_give_the_merges():
    backend = backend_of(sentencepiece())
    assert backend.encode("the cat", add_special_tokens=False).tokens == [SPACE + "the", SPACE, "c", "a", "t"]
    # The pair that makes the piece of the highest score goes first.
    assert backend.encode("ath", add_special_tokens=False).tokens == [SPACE + "a", "th"]
    assert backend.encode("than", add_special_tokens=False).tokens == [SPACE + "th", "an"]
    assert backend.encode("é<s>", add_special_tokens=False).tokens == [SPACE, "<0xC3>", "<0xA9>", "<s>"]
    assert backend.encode("the").ids[0] == 1 and backend.get_vocab_size() == 296
    for text in ("the cat", "a  b   c", "é 北京 😀\n\ttab"):
        assert backend.decode(backend.encode(text).ids) == text


def test_spaces_before_a_text_and_in_a_row():
    """Gemma puts no space before a text; a run of spaces is one token whatever scores say."""
    backend = backend_of(sentencepiece(add_space_prefix=False))
    assert backend.encode("the  the", add_special_tokens=False).tokens == ["the", SPACE * 2, "the"]
    assert backend.encode("x<b> a", add_special_tokens=False).tokens == ["x", "<b>", SPACE + "a"]
    assert backend.decode(backend.encode(" the").ids) == " the"


@pytest.mark.parametrize(
    "pre, words",
    (
        ("gpt-2", ["it", "'s", "ĠI", "'", "LL", "Ġ1234", "ĊĊ"]),
        ("smollm", ["it", "'s", "ĠI", "'", "LL", "Ġ", "1", "2", "3", "4", "ĊĊ"]),
        ("llama-bpe", ["it", "'s", "ĠI", "'LL", "Ġ", "123", "4", "ĊĊ"]),
        ("qwen2", ["it", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "ĊĊ"]),
        ("tekken", ["it", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "ĊĊ"]),
    ),
)
def test_words(pre, words):
    import tokenizers

    fields = VOCABULARY | {"tokenizer.ggml.pre": pre}
    assert pre in WORDS
    backend = tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(fields)))
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("it's I'LL 1234\n\n")] == words


def test_words_of_two_cases():
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(VOCABULARY | {"tokenizer.ggml.pre": "tekken"})))
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("HelloWorld GPTs")] == [
        "Hello",
        "World",
        "ĠGPTs",
    ]


def test_special_tokens_come_along(tmp_path):
    """The begin of a text, both ends, the template; a conversation ends where eot says."""
    types = [3] + [1] * 38 + [3]
    change = {"tokenizer.ggml.eot_token_id": 39, "tokenizer.ggml.token_type": types}
    imported = import_model(write_model(tmp_path / "m.gguf", "llama", change))
    special = imported.tokenizer.special
    assert (special.separator_id, special.prefix_ids, special.end_ids) == (0, (0,), (0, 39))
    assert special.opens_windows and special.chat_template == "{{ messages }}"
    assert imported.tokenizer.encode("<s>").size == 1  # letters without a token are left out; no special token is read
    assert json.loads(imported.files["generation_config.json"])["eos_token_id"] == [0, 39]
    plain = import_model(write_model(tmp_path / "n.gguf", "llama", {"tokenizer.ggml.add_bos_token": False}))
    assert plain.tokenizer.special.prefix_ids == () and plain.tokenizer.encode("the").tolist() == [39]


def test_several_templates_go_by_their_names(tmp_path):
    change = {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    tokenizer = import_model(write_model(tmp_path / "m.gguf", "llama", change)).tokenizer
    assert named_templates(tokenizer.special.chat_template) == {"default": "one", "tool_use": "two"}


def test_begin_of_text_without_a_word_on_it():
    """As llama.cpp does."""
    base = {key: value for key, value in VOCABULARY.items() if "add_bos" not in key}
    adds = lambda fields: gguf_tokenizer_config(fields)["add_bos_token"]  # noqa: E731
    assert adds(sentencepiece()) and adds(base | {"tokenizer.ggml.pre": "llama-bpe"}) and not adds(base)
    assert gguf_ids(base | {"tokenizer.ggml.eos_token_id": 99}) == {"bos_token_id": 0}


def test_vocabularies_that_do_not_fit_are_refused():
    for fields, word in (
        (sentencepiece(scores=[0.0]), "no scores for its 297 tokens; give .* --tokenizer"),
        (sentencepiece(token_type=[1]), "1 types of 297 tokens"),
        (sentencepiece(tokens=[]), "kind 'llama'"),
        (sentencepiece(remove_extra_whitespaces=True), "changes characters of a text"),
    ):
        with pytest.raises(InputError, match=word):
            gguf_tokenizer(fields)
