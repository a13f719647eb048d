"""Windows and iterators: what is promised of their order, of processes that share them, and of resuming."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from corpora import make_data, make_documents, starts_of, text_config, with_, write_jsonl

from snlp_jax.config import DataConfig
from snlp_jax.data.pipeline import (
    Source,
    TokenData,
    WindowSource,
    held_out_batches,
    num_windows,
    train_iterator,
)
from snlp_jax.data.shards import prepare_tokens
from snlp_jax.data.tokenizer import SpecialTokens
from snlp_jax.errors import InputError


def test_windows_tile_the_tokens() -> None:
    source = WindowSource(np.arange(32, dtype=np.uint16), 10)
    assert len(source) == num_windows(np.arange(32), 10) == 3
    assert num_windows(np.arange(31), 10) == 3 and num_windows(np.arange(30), 10) == 2
    assert num_windows(np.arange(0), 10) == 0
    np.testing.assert_array_equal(source[2]["tokens"], np.arange(20, 31))
    assert source[0]["tokens"].dtype == np.int32
    for index in (3, -4):
        with pytest.raises(IndexError):
            source[index]


def test_windows_that_open_as_the_model_was_trained() -> None:
    """With one token before each window, the targets of all windows are the text, each token once."""
    text = np.arange(1, 42, dtype=np.uint16)
    windows = [each["tokens"] for each in WindowSource(text, 10, None, (0,))]  # type: ignore[attr-defined]
    assert len(windows) == 4 and {(len(window), window[0]) for window in windows} == {(11, 0)}
    np.testing.assert_array_equal(np.concatenate([window[1:] for window in windows]), text[:40])
    text[10] = 0  # the text of the second window begins with it by itself
    np.testing.assert_array_equal(WindowSource(text, 10, None, (0,))[1]["tokens"], text[10:21])
    assert WindowSource(text, 10, None, (0, 7))[2]["tokens"].tolist() == [0, 7, *range(21, 30)]
    # Documents are told apart as without it; what a cut document goes on with is the first.
    assert WindowSource(text, 12, 0, (0,))[0]["document"].tolist() == [1] * 11 + [2] * 2


@pytest.mark.parametrize("opens, mixes", [*itertools.product((False, True), (False, True))])
def test_every_reader_gets_windows_as_the_tokenizer_says(opens: bool, mixes: bool) -> None:
    data = make_data(num_val=100)
    special = SpecialTokens(256, (256,), (256,), opens_windows=opens)
    data = dataclasses.replace(data, tokenizer=SimpleNamespace(special=special))  # type: ignore[arg-type]
    if mixes:
        data = dataclasses.replace(data, mixture=(Source("one", 0.5, data), Source("other", 0.5, data)))
    (held_out,) = held_out_batches(data, seq_len=10, batch_size=4, num_batches=1)
    batch = next(train_iterator(data, seq_len=10, batch_size=4, seed=0))
    for tokens in (held_out["tokens"], batch["tokens"]):
        assert ((tokens[:, 0] == 256) == opens).all() and tokens.shape == (4, 11)


def test_each_epoch_has_every_window_in_its_own_order() -> None:
    iterator = train_iterator(make_data(), seq_len=10, batch_size=5, seed=0)
    epochs = [starts_of(list(itertools.islice(iterator, 20))) for _ in range(3)]
    assert all(sorted(epoch) == list(range(0, 1000, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = train_iterator(make_data(), seq_len=10, batch_size=5, seed=-1)
    assert starts_of(list(itertools.islice(other_seed, 20))) != epochs[0]


@pytest.mark.parametrize("num_train", [1001, 991])  # 100 windows, and 99, which two processes cannot share evenly
def test_processes_share_each_batch(num_train: int) -> None:
    data = make_data(num_train)
    whole = train_iterator(data, seq_len=10, batch_size=6, seed=3)
    parts = [train_iterator(data, seq_len=10, batch_size=6, seed=3, process_index=p, process_count=2) for p in (0, 1)]
    num_batches = (num_train // 10) // 6
    for j in range(3 * num_batches):
        first, second = (starts_of([next(part)]) for part in parts)
        assert len(first) == len(second) == 3
        assert starts_of([next(whole)]) == [start for pair in zip(first, second, strict=True) for start in pair]
        assert j >= num_batches or not set(first) & set(second)


def test_iterator_resumes_from_its_state() -> None:
    iterator = train_iterator(make_data(), seq_len=10, batch_size=8, seed=0)
    for _ in range(9):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["tokens"] for _ in range(30)]  # past the end of the epoch
    other = train_iterator(make_data(), seq_len=10, batch_size=8, seed=0)
    next(other)
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["tokens"] for _ in range(30)], expected)


def test_iterator_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    iterator = train_iterator(make_data(), seq_len=10, batch_size=8, seed=0)
    other = train_iterator(make_data(), seq_len=10, batch_size=8, seed=0)
    for _ in range(15):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(15, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        manager.restore(15, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    for _ in range(5):
        np.testing.assert_array_equal(next(other)["tokens"], next(iterator)["tokens"])


def test_bad_batches() -> None:
    with pytest.raises(InputError, match="train.batch_size 5 is not a multiple of the 2 processes"):
        train_iterator(make_data(), seq_len=10, batch_size=5, seed=0, process_count=2)
    with pytest.raises(InputError, match="has 1001 tokens, which fill 100 windows of 10, but a batch takes 101"):
        train_iterator(make_data(), seq_len=10, batch_size=101, seed=0)
    train_iterator(make_data(1011), seq_len=10, batch_size=101, seed=0)
    with pytest.raises(InputError, match="held-out split has 10 tokens, but a window of 10 needs 11"):
        held_out_batches(make_data(num_val=10), seq_len=10, batch_size=1, num_batches=1)


@pytest.mark.parametrize(
    ("num_val", "batch_size", "num_batches", "shapes"),
    [(301, 4, 2, [4, 4]), (301, 4, 99, [4] * 7), (301, 30, 1, [30]), (301, 31, 2, [30]), (11, 8, 8, [1])],
)
def test_held_out_batches(num_val: int, batch_size: int, num_batches: int, shapes: list[int]) -> None:
    data = make_data(num_val=num_val)
    held_out = held_out_batches(data, seq_len=10, batch_size=batch_size, num_batches=num_batches)
    batches = [batch["tokens"] for batch in held_out]
    assert [batch.shape for batch in batches] == [(rows, 11) for rows in shapes]
    assert all(batch.dtype == np.int32 for batch in batches)
    starts = np.concatenate(batches)[:, 0]
    gaps = np.diff(starts)
    assert starts[0] == 0 and (len(gaps) == 0 or (gaps.min() > 0 and gaps.max() - gaps.min() <= 10))
    assert starts[-1] + 2 * max(gaps, default=10) >= num_val - 1  # they reach to the end


# Mixtures


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Two corpora, in capitals and not; the first is five times as large."""
    folder = tmp_path_factory.mktemp("mixed")
    documents = make_documents(240)
    write_jsonl(folder / "capitals.jsonl", [text.upper() for text in documents[:200]])
    write_jsonl(folder / "small.jsonl", [text.lower() for text in documents[200:]])
    entries = (f"{folder / 'capitals.jsonl'}@1", f"{folder / 'small.jsonl'}@3")
    return prepare_tokens(DataConfig(mixture=entries, cache_dir=str(folder / "cache"), val_fraction=0.3))


def is_capital(rows: np.ndarray) -> np.ndarray:
    """Of each row, by its letters."""
    return ((rows >= ord("A")) & (rows <= ord("Z"))).sum(1) > ((rows >= ord("a")) & (rows <= ord("z"))).sum(1)


def test_windows_of_a_mixture_come_in_its_proportions(mixed: TokenData) -> None:
    sizes = {"seq_len": 32, "batch_size": 8}
    iterator = train_iterator(mixed, **sizes, seed=0)
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(100)])
    for count in (8, 80, 800):
        assert is_capital(rows[:count]).sum() == count / 4
    starts = [window["tokens"].tobytes() for window in WindowSource(mixed.mixture[1].data.train, 32)]
    small = [row.tobytes() for row in rows[~is_capital(rows)]]
    for first in range(0, len(small) - len(starts), len(starts)):  # epochs of its own, each in another order
        assert sorted(small[first : first + len(starts)]) == sorted(starts)
    assert len(small) > 2 * len(starts) and small[: len(starts)] != small[len(starts) : 2 * len(starts)]
    rows_of = lambda count: np.concatenate([b["tokens"] for b in held_out_batches(mixed, **sizes, num_batches=count)])  # noqa: E731
    held_out = rows_of(3)
    assert len(held_out) == 24 and is_capital(held_out).sum() == 6
    every = rows_of(999)
    assert len({row.tobytes() for row in every}) == len(every)  # none twice
    assert len(every) > len(mixed.mixture[1].data.val) // 32 and abs(is_capital(every).mean() - 0.25) < 0.05
    assert len(mixed.train) == sum(len(source.data.train) for source in mixed.mixture)


@pytest.mark.parametrize("before, after", [(4, 1), (2, 4)])
def test_a_mixture_resumes_on_another_number_of_processes(mixed: TokenData, before: int, after: int) -> None:
    sizes = {"seq_len": 32, "batch_size": 8, "seed": 3}
    whole = train_iterator(mixed, **sizes)
    some = train_iterator(mixed, **sizes, process_index=before - 1, process_count=before)
    for _ in range(37):
        next(whole), next(some)
    state = json.loads(json.dumps(some.get_state()))
    parts = [train_iterator(mixed, **sizes, process_index=p, process_count=after) for p in range(after)]
    for part in parts:
        part.set_state(state)
    for _ in range(5):
        rows = np.stack([next(part)["tokens"] for part in parts], axis=1)
        np.testing.assert_array_equal(rows.reshape(8, -1), next(whole)["tokens"])


def test_a_mixture_has_one_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aaaa " * 20 + str(i) for i in range(30)])
    write_jsonl(tmp_path / "b.jsonl", ["bbbb " * 20 + str(i) for i in range(30)])
    config = DataConfig(cache_dir=str(tmp_path / "cache"), tokenizer="bpe", bpe_vocab_size=270)
    sources = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    alone = prepare_tokens(with_(config, source=sources[0]))
    data = prepare_tokens(with_(config, mixture=tuple(f"{source}@0.5" for source in sources)))
    vocabulary = data.tokenizer.to_json()
    assert "aaaa" in vocabulary and "bbbb" in vocabulary and "bbbb" not in alone.tokenizer.to_json()
    again = prepare_tokens(with_(config, mixture=tuple(f"{source}@2" for source in sources)))
    assert again.content_hash == data.content_hash != alone.content_hash and again.tokenizer.to_json() == vocabulary


def test_bad_mixtures() -> None:
    for changes, message in (
        ({"mixture": ("a.txt",)}, "PATH@WEIGHT"),
        ({"mixture": ("a.txt@0",)}, "PATH@WEIGHT"),
        ({"mixture": ("a@1", "a@2")}, "twice"),
        ({"mixture": ("a@1",), "source": "b"}, "one of the two"),
        ({"num_workers": -2}, "num_workers"),
    ):
        with pytest.raises(InputError, match=message):
            DataConfig(**changes)


def test_a_source_without_a_window(mixed: TokenData) -> None:
    with pytest.raises(InputError, match="train split of .*small.jsonl' has .* tokens, but a window of .* needs"):
        train_iterator(mixed, seq_len=len(mixed.mixture[1].data.train), batch_size=1, seed=0)


# Documents in a window


def test_documents_are_numbered_from_their_separators(tmp_path: Path) -> None:
    config = text_config(tmp_path, mask_documents=True)
    data = prepare_tokens(config)
    batch = next(train_iterator(data, seq_len=500, batch_size=4, seed=0))
    assert set(batch) == {"tokens", "document"} and batch["document"].dtype == np.int32
    for tokens, document in zip(batch["tokens"], batch["document"], strict=True):
        is_start = tokens == data.tokenizer.bos_id
        assert document[0] == is_start[0] and is_start.sum() >= 1
        np.testing.assert_array_equal(np.diff(document), is_start[1:])
    (held_out,) = held_out_batches(data, seq_len=9, batch_size=2, num_batches=1)
    assert set(held_out) == {"tokens", "document"}
    plain = prepare_tokens(with_(config, mask_documents=False))
    assert set(next(train_iterator(plain, seq_len=500, batch_size=4, seed=0))) == {"tokens"}
