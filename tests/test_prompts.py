"""Texts as models read them: what stands before them, where a continuation begins, what ends it."""

import json
from pathlib import Path

import numpy as np
import tokenizers

from snlp_jax.config import DataConfig
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.prompts import last_tokens
from snlp_jax.data.tokenizer import FileTokenizer, SpecialTokens, train_bpe
from snlp_jax.eval.text_model import encode_pairs, rolling_spans


def test_rolling_spans_score_every_token_once() -> None:
    for length in (2, 7, 8, 9, 10, 16, 17, 25, 30):
        tokens = np.arange(length)
        spans = rolling_spans(tokens, 8)
        assert np.concatenate([span.tokens[-span.num_scored :] for span in spans]).tolist() == list(range(1, length))
        assert all(len(span.tokens) == min(9, length) for span in spans), "as much context as there is room for"
        opened = rolling_spans(tokens, 8, (0,))
        assert [span.num_scored for span in opened] == [span.num_scored for span in spans]
        for span, other in zip(opened, spans, strict=True):
            assert span.tokens.tolist() == [0, *other.tokens[1:]]


def test_pairs_are_encoded_as_one_text() -> None:
    text = "the layers of the layered trace are layers " * 20
    tokenizer = train_bpe([text], 300)
    for border in range(len("the layers of the")):
        context, continuation = text[:border], text[border:17]
        (span,) = encode_pairs(tokenizer, [(context, continuation)])
        assert span.tokens[0] == tokenizer.bos_id
        before, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
        assert span.tokens[-span.num_scored :].tolist() == whole[-span.num_scored :].tolist()
        if len(before) < len(whole):
            assert span.tokens[1 : -span.num_scored].tolist() == before.tolist(), "as lm_eval counts"
        else:
            assert span.tokens[1:].tolist() == whole.tolist() and span.num_scored > 0
    (span,) = encode_pairs(tokenizer, [("the layer", "s of")])  # " layers" is one token, " layer" two
    assert tokenizer.decode(span.tokens[-span.num_scored :]) == " of"
    (span,) = encode_pairs(tokenizer, [("the layer", "s")])  # as many tokens as the context alone
    assert tokenizer.decode(span.tokens[-span.num_scored :]) == " layers"


def test_the_space_before_a_continuation_belongs_to_it() -> None:
    tokenizer = train_bpe(["a layer of the layered trace " * 20], 300)
    pairs = [("the ", "trace"), ("the\n ", "trace"), ("", "trace"), (" ", "trace")]
    expected = [" trace", "\n trace", "trace", " trace"]
    spans = encode_pairs(tokenizer, pairs)
    assert [tokenizer.decode(span.tokens[-span.num_scored :]) for span in spans] == expected


def test_what_stands_before_a_text_is_the_tokenizers() -> None:
    """A model that knows nothing before a text gets it bare, and its separator where a first token is scored."""
    tokenizer = FileTokenizer(tokenizers.Tokenizer.from_str(train_bpe(["a layer"], 270).to_json()))
    tokenizer.special = SpecialTokens(7, (), (7,))
    (bare, first) = encode_pairs(tokenizer, [("a", " layer"), ("", "a layer")])
    ids = tokenizer.encode("a layer").tolist()
    assert bare.tokens.tolist() == ids and bare.num_scored == len(ids) - 1
    assert first.tokens.tolist() == [7, *ids] and first.num_scored == len(ids)
    tokenizer.special = SpecialTokens(5, (5, 6), (7,), opens_windows=True)
    assert encode_pairs(tokenizer, [("a", " layer")])[0].tokens.tolist() == [5, 6, *ids]
    cut = last_tokens(tokenizer, np.asarray([5, 6, 1, 2, 3, 4]), 4)
    assert cut.tolist() == [5, 6, 3, 4] and last_tokens(tokenizer, np.asarray([1, 2, 3, 4]), 3).tolist() == [2, 3, 4]


def test_conversations_with_lone_surrogates_train_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    record = {"messages": [{"role": "user", "content": "why \ud800"}, {"role": "assistant", "content": "so"}]}
    path.write_text("".join(json.dumps(record | {"n": n}).replace("so", f"so {n}") + "\n" for n in range(12)))
    data = prepare_data(DataConfig(source=str(path), format="chat", tokenizer="bpe", bpe_vocab_size=300))
    assert "why ?\n" in data.tokenizer.decode(np.asarray(data.train))
