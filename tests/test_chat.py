"""Conversations: what the template writes, which targets count, what packing keeps, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.config import DataConfig
from snlp_jax.data import chat
from snlp_jax.data.chat import ChatData, ChatWindows, pack, prepare_chat
from snlp_jax.data.pipeline import held_out_batches, train_iterator
from snlp_jax.data.tokenizer import ByteTokenizer, train_bpe
from snlp_jax.data.turns import chat_format
from snlp_jax.errors import InputError

BYTES = ByteTokenizer()
PLAIN = chat_format(BYTES)
TALK = [("system", "Be short."), ("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?"), ("assistant", "4, sir.")]


def write(path: Path, records: list) -> DataConfig:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return DataConfig(source=str(path), format="chat", val_fraction=0.1)


def numbered(count: int) -> list[dict]:
    """Different conversations of different lengths."""
    return [{"prompt": f"What is {i}?", "response": "It is " + f"{i} " * (1 + i % 9)} for i in range(count)]


# -- The template ------------------------------------------------------------------------------------------------------


def test_template() -> None:
    ids, is_response = PLAIN.learned(TALK)
    assert BYTES.decode(ids) == "System: Be short.\nUser: 1+1?\nAssistant: 2User: And 2+2?\nAssistant: 4, sir."
    assert (ids == BYTES.bos_id).sum() == 3 and ids[0] == ids[-1] == BYTES.bos_id
    assert BYTES.decode(ids[is_response]) == " 2 4, sir."
    # Besides the responses' own bytes, the separator that ends each of them.
    assert is_response.sum() == len(" 2") + len(" 4, sir.") + 2 and is_response[-1] and not is_response[0]


@pytest.mark.parametrize("kind", ("byte", "bpe"))
def test_a_prompt_is_what_stands_before_its_response_in_training(kind: str) -> None:
    tokenizer = BYTES if kind == "byte" else train_bpe([text for _, text in TALK] * 3, 280)
    form = chat_format(tokenizer)
    ids, is_response = form.learned(TALK)
    first = int(is_response.argmax())
    np.testing.assert_array_equal(form.prompt(TALK[:2]), ids[:first])
    last = len(ids) - int(is_response[::-1].argmin())
    np.testing.assert_array_equal(form.prompt(TALK[:4]), ids[:last])
    assert tokenizer.decode(ids[last:]) == " 4, sir."


def test_what_nobody_answers_is_left_out() -> None:
    np.testing.assert_array_equal(PLAIN.learned([*TALK, ("user", "Thanks")]).ids_T, PLAIN.learned(TALK).ids_T)


# -- Packing -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(1, 32))
def test_packing_loses_nothing_and_fills_no_window_too_full(sizes: list[int], capacity: int) -> None:
    windows = pack(sizes, capacity)
    assert sorted(item for window in windows for item in window) == list(range(len(sizes)))
    for window in windows:
        assert 0 < sum(min(sizes[item], capacity) for item in window) <= capacity
    if len(windows) <= chat.OPEN_WINDOWS:  # none was closed early: no two of them are half empty
        assert sum(2 * sum(min(sizes[item], capacity) for item in window) <= capacity for window in windows) <= 1


def windows_of(talks: list, seq_len: int, with_document: bool = True) -> ChatWindows:
    rendered = [PLAIN.learned(talk) for talk in talks]
    return ChatWindows(rendered, seq_len, bos_id=BYTES.bos_id, seed=3, with_document=with_document)


def test_every_response_is_a_target_once_and_nothing_else_is() -> None:
    """The pairs (document so far, target) of weight 1, read off the windows, are those of the conversations."""
    talks = [[("user", "ab" * (i % 5)), ("assistant", chr(97 + i) * (i % 7))] * (1 + i % 2) for i in range(26)]
    expected, seen, num_windows = Counter(), Counter(), set()
    for talk in talks:
        ids, is_response = PLAIN.learned(talk)
        expected.update(tuple(ids[: i + 1]) for i in range(len(ids)) if is_response[i])
    windows = windows_of(talks, 96)
    for window in (windows[i] for i in range(len(windows))):
        tokens, weight, document = window["tokens"], window["weight"], window["document"]
        assert tokens.shape == document.shape == (97,) and weight.shape == (96,)
        assert set(weight.tolist()) <= {0.0, 1.0} and (np.diff(document) >= 0).all()
        num_windows.add(int(document.max()))
        for t in np.flatnonzero(weight):
            start = int(np.argmax(document == document[t]))
            assert tokens[start] == BYTES.bos_id
            seen[tuple(tokens[start : t + 2])] += 1
    assert seen == expected
    assert max(num_windows) > 1, "several conversations in a window"
    assert "document" not in windows_of(talks, 96, with_document=False)[0]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_long_conversations_are_cut_and_the_count_is_said(caplog: pytest.LogCaptureFixture) -> None:
    talks = [[("user", "a"), ("assistant", "long " * 20)], [("user", "a"), ("assistant", "b")]]
    rendered = [PLAIN.learned(talk) for talk in [*talks, [("user", "never " * 20), ("assistant", "b")]]]
    data = ChatData(BYTES, rendered[0].ids_T, rendered[0].ids_T, "", {"train": rendered}, 0)
    windows = data.windows("train", 40)
    assert "Of 3 conversations (train) 1 are longer than model.seq_len 40" in caplog.text and "1 more" in caplog.text
    assert len(windows) == 2
    (whole,) = [window for window in (windows[0], windows[1]) if window["tokens"][-1] != BYTES.bos_id]
    np.testing.assert_array_equal(whole["tokens"], rendered[0].ids_T[:41])
    with pytest.raises(InputError, match="none of the 3 conversations of the train split .* model.seq_len 3 tokens"):
        data.windows("train", 3)


# -- Reading -----------------------------------------------------------------------------------------------------------


def test_batches_resume_exactly_and_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    data = prepare_chat(write(tmp_path / "x.jsonl", numbered(300)))
    sizes = {"seq_len": 80, "batch_size": 4, "seed": 5}
    whole = train_iterator(data, **sizes)
    assert isinstance(whole, grain.DatasetIterator)
    before = [next(whole) for _ in range(3)]
    state, after = whole.get_state(), [next(whole) for _ in range(40)]  # into the second epoch
    again = train_iterator(
        prepare_chat(DataConfig(source=data_source(tmp_path), format="chat", val_fraction=0.1)), **sizes
    )
    again.set_state(state)
    for expected in after:
        np.testing.assert_equal(next(again), expected)
    parts = [train_iterator(data, **sizes, process_index=index, process_count=2) for index in (0, 1)]
    for expected in before:
        both = [next(part) for part in parts]
        for name in ("tokens", "weight"):
            np.testing.assert_array_equal(np.stack([both[0][name], both[1][name]], 1).reshape(4, -1), expected[name])


def data_source(folder: Path) -> str:
    return str(folder / "x.jsonl")


def test_split_is_by_content_and_held_out_batches_carry_weights(tmp_path: Path) -> None:
    records = numbered(200)
    data = prepare_chat(write(tmp_path / "x.jsonl", records))
    other = prepare_chat(write(tmp_path / "y.jsonl", records[::-1]))
    texts = lambda data, name: {BYTES.decode(data.splits[name][i].ids_T) for i in range(len(data.splits[name]))}  # noqa: E731
    assert texts(data, "val") == texts(other, "val") and not texts(data, "val") & texts(data, "train")
    assert len(texts(data, "train")) + len(texts(data, "val")) == 200
    assert data.content_hash != other.content_hash  # the order of training differs
    (batch,) = held_out_batches(data, seq_len=80, batch_size=2, num_batches=1)
    assert batch["tokens"].shape == (2, 81) and batch["weight"].shape == (2, 80) and "document" not in batch


def test_records(tmp_path: Path) -> None:
    config = write(
        tmp_path / "x.jsonl",
        [
            {"messages": [{"role": role, "content": text} for role, text in TALK], "id": 7},
            {"prompt": "Add.", "input": "1 2", "response": "3"},
            {"prompt": "Add.", "input": "", "response": ""},
        ],
    )
    first, second, third = chat.read_conversations(config)
    assert first == TALK
    assert second == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert third == [("user", "Add."), ("assistant", "")]


MISTAKES = {
    "json": ("{", "x.jsonl:1 is not valid JSON"),
    "list": ("[]", "x.jsonl:1 holds list and no object"),
    "field": (
        {"question": "?", "response": "!"},
        "neither messages nor a text in field 'prompt'; set data.prompt_field",
    ),
    "response": ({"prompt": "?", "response": 3}, "field 'response'; set data.response_field"),
    "messages": ({"messages": "hello"}, "messages must be a list"),
    "role": ({"messages": [{"role": "human", "content": "?"}]}, "needs a role of system, user, tool, assistant"),
    "content": ({"messages": [{"role": "user"}]}, "and a text as content"),
    "no answer": ({"messages": [{"role": "user", "content": "?"}]}, "holds no message of the assistant"),
    "one": ({"prompt": "?", "response": "!"}, "holds only one conversation, or copies of one"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(case: str, tmp_path: Path) -> None:
    record, sentence = MISTAKES[case]
    with pytest.raises(InputError, match=".*".join(map(str, sentence.split("*")))):
        prepare_chat(write(tmp_path / "x.jsonl", [record]))


def test_other_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError, match="is no file of records"):
        prepare_chat(DataConfig(source=str(tmp_path / "x.txt"), format="chat"))
    with pytest.raises(InputError, match="the builtin corpus holds no conversations"):
        DataConfig(format="chat")
    config = write(tmp_path / "x.jsonl", numbered(20))
    with pytest.raises(InputError, match="train.batch_size"):
        train_iterator(prepare_chat(config), seq_len=400, batch_size=50, seed=0)
    monkeypatch.setattr(chat, "MAX_TOKENS", 100)
    with pytest.raises(InputError, match="more than 100 tokens of conversations"):
        prepare_chat(config)
