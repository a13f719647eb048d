"""Streamed text: any split of the tokens gives the decoder's text, and nothing that is shown is taken back."""

import functools

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snlp_jax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.infer.text import BROKEN, TextStream

CORPUS = ["the cat sat on the mat. héllo wörld, 猫が好き 😀😀 aaa abab\n\nend"] * 3
ALPHABET = "ab the é猫😀\n.\ufffd"


def _file_tokenizer(pieces: list[str], decoder: tokenizers.decoders.Decoder) -> Tokenizer:
    """BPE without merges over one-character pieces and bytes, and longer pieces that only a model would choose."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = decoder
    return FileTokenizer(backend)


@functools.cache
def make(kind: str) -> Tokenizer:
    d = tokenizers.decoders
    words = ["▁", "▁▁", "▁the", "▁a", "a", "b", "the", ".", "é", "▁b▁a", BROKEN]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return train_bpe(CORPUS, 300)
    if kind == "metaspace":
        return _file_tokenizer(words, d.Metaspace())
    if kind == "wordpiece":
        return _file_tokenizer(["the", "##a", "b", ".", "##b"], d.WordPiece())
    fallback = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return _file_tokenizer([*words, *(f"<0x{byte:02X}>" for byte in range(256))], fallback)


KINDS = ("byte", "bpe", "metaspace", "wordpiece", "fallback")


def cut(text: str, stops: list[str]) -> str:
    """Before the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@st.composite
def token_lists(draw: st.DrawFn, kind: str) -> list[int]:
    """Whole texts, lone tokens (bytes out of place, separators, unknown ids), and runs of one token."""
    tok = make(kind)
    text = st.text(ALPHABET, max_size=8).map(lambda text: tok.encode(text).tolist())
    token = st.integers(0, tok.vocab_size).map(lambda i: [i])
    run = st.tuples(st.integers(0, tok.vocab_size - 1), st.integers(2, 20)).map(lambda pair: [pair[0]] * pair[1])
    return [i for part in draw(st.lists(st.one_of(text, text, token, token, run), max_size=8)) for i in part]


def push_all(stream: TextStream, ids: list[int], cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    return [stream.push(ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


STOPS = st.lists(
    st.one_of(st.text("ab \n", min_size=1, max_size=4), st.sampled_from(["é", "猫😀", "the", BROKEN])), max_size=3
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data(), cuts=st.lists(st.integers(0, 60), max_size=6), stops=STOPS)
def test_any_split_gives_the_text_of_all_tokens(kind, data, cuts, stops):
    tok = make(kind)
    ids = data.draw(token_lists(kind))
    stream = TextStream(tok, stops)
    parts = push_all(stream, ids, cuts)
    assert stream.text == "".join(parts)
    parts.append(stream.finish())
    text = tok.decode(ids)
    assert "".join(parts) == stream.text == cut(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)
    if not stream.is_stopped:
        assert stream.num_tokens == len(ids)
    else:
        alone = TextStream(tok, stops)
        push_all(alone, ids, list(range(len(ids))))
        alone.finish()
        assert stream.num_tokens == alone.num_tokens <= len(ids), "depends on the split"
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data(), before=st.text("ab the é猫😀.", max_size=12))
def test_a_text_goes_on_from_its_prompt(kind, data, before):
    """Prompt and text together are the decoder's text of both, wherever a decoder drops spaces."""
    tok, ids = make(kind), data.draw(token_lists(kind))
    prompt = tok.encode(before).tolist() if before else []
    stream = TextStream(tok, (), prompt)
    parts = [stream.push([token]) for token in ids] + [stream.finish()]
    shown = tok.decode(prompt)
    if not tok.decode([*prompt, *ids]).startswith(shown):
        return  # broken bytes of the text spoil good ones of the prompt
    assert shown + "".join(parts) == tok.decode([*prompt, *ids])


def test_the_first_word_keeps_its_space():
    tok = make("fallback")
    prompt, new = tok.encode("the a").tolist(), tok.encode("the b").tolist()
    assert tok.decode(new) == "the b" and TextStream(tok, (), prompt).push(new) == " the b"
    assert TextStream(tok, [" "], prompt).push(new) == "" and TextStream(tok, ["a"], prompt).push(new) == " the b"
    special = tok.special.separator_id
    assert TextStream(tok, (), [*prompt, special]).push(new) == "the b", "behind a special token a text starts anew"
    assert TextStream(ByteTokenizer(), (), list(b"x\xc3")).push([0xA9]) == "é", "a character that the prompt begins"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data(), more=st.data())
def test_what_is_shown_is_never_taken_back(kind, data, more):
    """Whatever comes next, text given out stays the beginning of the text."""
    ids, others = data.draw(token_lists(kind)), more.draw(token_lists(kind))
    stream = TextStream(make(kind), ["ab", "a\n"])
    stream.push(ids)
    assert cut(make(kind).decode(ids + others), ["ab", "a\n"]).startswith(stream.text)


@given(text=st.text(ALPHABET.replace(BROKEN, ""), min_size=1))
@example("猫😀é")
def test_shows_each_character_at_its_last_byte(text):
    """Nothing is held longer than necessary, and never half a character."""
    stream = TextStream(ByteTokenizer())
    shown = [stream.push([byte]) for byte in text.encode()]
    assert [part for part in shown if part] == list(text)
    assert [len(part.encode()) for part in shown if part] == [len(c.encode()) for c in text]
    assert shown[-1] == text[-1]


def test_stop_strings_hold_back_what_they_may_need():
    stream = TextStream(ByteTokenizer(), ["aab", "\n\n"])
    assert [stream.push([ord(c)]) for c in "xaaab!"] == ["x", "", "", "a", "", ""]
    assert (stream.text, stream.is_stopped, stream.num_tokens) == ("xa", True, 5)
    assert stream.push(b"more") == stream.finish() == ""
    assert stream.num_tokens == 5

    stream = TextStream(ByteTokenizer(), ["abcd", "bc"])  # complete first, though it begins later
    assert stream.push(b"xabcd") == "xa"
    assert stream.num_tokens == 4
    stream = TextStream(ByteTokenizer(), ["bc", "abc"])  # the longest at the same character
    assert stream.push(b"xabc") == "x"
    stream = TextStream(ByteTokenizer(), ["abc"])
    assert (stream.push(b"xab"), stream.finish(), stream.is_stopped) == ("x", "ab", False)


def test_number_of_tokens_ends_at_the_token_that_completes():
    """Separators count where they stand; a newline of byte fallback is certain one token later than it came."""
    stream = TextStream(ByteTokenizer(), ["b"])
    stream.push([ord("a"), 256, ord("b"), 256])
    assert stream.num_tokens == 3
    tok = make("fallback")
    a, newline = tok.encode("a")[-1], tok.encode("\n")[-1]
    stream = TextStream(tok, ["\n"])
    assert (stream.push([a, newline]), stream.is_stopped) == ("a", False)
    assert (stream.push([a]), stream.is_stopped, stream.num_tokens, stream.text) == ("", True, 2, "a")
    stream = TextStream(tok, ["\n"])
    stream.push([a, newline])
    assert (stream.finish(), stream.is_stopped, stream.num_tokens) == ("", True, 2)


class _Counting(ByteTokenizer):
    num_decoded = 0

    def decode(self, ids):
        self.num_decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("ids", [list(b"plain "), [0xE7, 0x8C, 0xAB], [0xFF], [0x80], [256], [256, 97]], ids=str)
def test_costs_the_same_for_each_token(ids):
    """Also where the text never becomes valid, or never gets longer."""
    tok = _Counting()
    stream = TextStream(tok, ["never"])
    stream.push(ids * (1200 // len(ids)))
    assert tok.num_decoded < 10 * 1200  # windows of 4 to 8 tokens, and one of 4 for each four


@pytest.mark.parametrize("stops", [[""], ["a", ""], "ab"])
def test_bad_stop_strings(stops):
    with pytest.raises(InputError, match="empty"):
        TextStream(ByteTokenizer(), stops)


def test_a_finished_text_takes_no_more_tokens():
    stream = TextStream(ByteTokenizer())
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push([97])
