"""Corpus, tokenizers, token cache and iterators: what is promised of each, and every way to be told of a mistake."""

import itertools
import json
import logging
import resource
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from snlp_jax.config import DataConfig
from snlp_jax.data import corpus, pipeline, tokenizer
from snlp_jax.data.corpus import iter_documents
from snlp_jax.data.pipeline import TokenData, WindowSource, num_windows, prepare_tokens, train_iterator, val_batches
from snlp_jax.errors import InputError

WORDS = ["one", "two", "three", "four", "snow", "rain", "wind", "naïve", "日本", "<|bos|>", "<s>"]


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def make_documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"document {i}\n" + " ".join(rng.choice(WORDS, size=40)) for i in range(count)]


def split_by_bos(tokens: np.ndarray, tok: tokenizer.Tokenizer) -> list[str]:
    starts = np.flatnonzero(tokens == tok.bos_id)
    assert starts[0] == 0
    return [tok.decode(part[1:]) for part in np.split(tokens, starts[1:])]


def make_data(num_train: int = 1001, num_val: int = 301) -> TokenData:
    """Tokens that count upwards, so that a window tells where it comes from."""
    train, val = np.arange(num_train, dtype=np.uint16), np.arange(num_val, dtype=np.uint16)
    return TokenData(tokenizer.ByteTokenizer(), train, val, "hash")


def starts_of(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    source, cache_dir = str(tmp_path / "corpus.jsonl"), str(tmp_path / "cache")
    return DataConfig(source=source, cache_dir=cache_dir, val_fraction=0.2, bpe_vocab_size=300)


def with_(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


# Tokenizers


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


@settings(deadline=None)
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


# Corpus


def test_builtin_corpus_is_some_megabytes_in_order() -> None:
    files = corpus.corpus_files(DataConfig())
    assert files == sorted(files)
    assert 5e6 < sum(path.stat().st_size for path in files) <= corpus.BUILTIN_MAX_BYTES
    assert not {"test", "tests", "site-packages"} & {part for path in files for part in path.parts}
    assert all(len(document) > 0 for document in itertools.islice(iter_documents(DataConfig()), 20))


def test_folder_glob_and_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.txt").write_bytes("\ufeffä\r\n".encode())
    (tmp_path / "sub" / "empty.txt").write_text(" \n")
    write_jsonl(tmp_path / "a.jsonl", ["c", "  ", "d\ud800"])
    (tmp_path / "notes.md").write_text("e")
    (tmp_path / ".hidden" / "f.txt").write_text("f")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert list(iter_documents(DataConfig(source=str(tmp_path)))) == ["c", "d?", "b", "ä\r\n"]
    assert list(iter_documents(DataConfig(source=str(tmp_path / "**/*.txt")))) == ["b", "ä\r\n"]
    assert list(iter_documents(DataConfig(source=str(tmp_path / "notes.md")))) == ["e"]


@given(st.lists(st.tuples(st.sampled_from(["word ", "\n", "\n\n", "é" * 999]), st.integers(1, 4000)), max_size=6))
@settings(deadline=None, max_examples=20)
def test_pieces_of_a_text_file_join_to_the_file(tmp_path_factory: pytest.TempPathFactory, parts: list) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    text = "start" + "".join(part * min(count, 100_000 // len(part)) for part, count in parts)
    path.write_text(text, encoding="utf-8", newline="")
    pieces = list(corpus._read_text(path))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= corpus.MAX_PIECE_CHARS for piece in pieces)


def test_large_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 200 + "\n\n"
    (tmp_path / "file.txt").write_text(paragraph * 100)
    pieces = list(iter_documents(DataConfig(source=str(tmp_path / "file.txt"))))
    assert len(pieces) == 20 and all(piece == paragraph * 5 for piece in pieces)


def test_large_file_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("one long line without an end " * 700_000)  # 20 MB
    config = DataConfig(source=str(tmp_path / "file.txt"), cache_dir=str(tmp_path / "cache"))
    tracemalloc.start()
    data = prepare_tokens(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) + len(data.val) > 20e6
    assert peak < 14e6  # a batch of 1 MB of text as str, its ids as int32, int64 and bytes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; give 'builtin' or"),
        ("*.nothing", None, "matches no file"),
        ("", None, "holds no .txt or .jsonl file"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "a.txt' is not UTF-8 text"),
        ("a.txt", b"abc\0def", "a.txt' is binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl:1 has no field 'text'; set data.text_field"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1 has no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 holds int in field 'text'"),
        ("a.txt", b"just one document", "holds only one document"),
        ("a.jsonl", b'{"text": "a"}\n' * 9, "holds only one document, or copies"),
    ],
)
def test_bad_corpus(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_tokens(DataConfig(source=str(tmp_path / "in" / name), cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.glob("cache/**/.building-*"))


# Token cache


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_splits_hold_every_document_once(config: DataConfig, kind: str) -> None:
    data = prepare_tokens(with_(config, tokenizer=kind))
    train, val = split_by_bos(data.train, data.tokenizer), split_by_bos(data.val, data.tokenizer)
    assert sorted(train + val) == sorted(make_documents(200))
    assert not set(train) & set(val)
    assert 20 < len(val) < 60
    assert data.train.dtype == np.uint16


def test_split_does_not_depend_on_order_or_neighbours(config: DataConfig, tmp_path: Path) -> None:
    data = prepare_tokens(config)
    write_jsonl(tmp_path / "other.jsonl", make_documents(200)[:50:-1] + make_documents(200)[60:70] + ["new"])
    other = prepare_tokens(with_(config, source=str(tmp_path / "other.jsonl")))
    val = set(split_by_bos(data.val, data.tokenizer))
    assert set(split_by_bos(other.val, other.tokenizer)) - {"new"} == val & set(make_documents(200)[51:])
    assert other.content_hash != data.content_hash


@pytest.mark.parametrize("val_fraction", [1e-6, 1 - 1e-6])
def test_two_documents_are_enough_for_both_splits(tmp_path: Path, val_fraction: float) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["first", "second"])
    config = DataConfig(source=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "c"), val_fraction=val_fraction)
    data = prepare_tokens(config)
    assert {len(data.train), len(data.val)} == {6, 7}


def test_bpe_is_trained_on_training_documents_only(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train_bpe = tokenizer.train_bpe

    def spy(documents, vocab_size: int) -> tokenizer.Tokenizer:
        seen.extend(documents)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(pipeline, "train_bpe", spy)
    data = prepare_tokens(with_(config, tokenizer="bpe"))
    assert seen == split_by_bos(data.train, data.tokenizer)
    monkeypatch.setattr(pipeline, "BPE_TRAIN_CHARS", 20_000)
    every_train, seen[:] = list(seen), []
    prepare_tokens(with_(config, tokenizer="bpe", cache_dir=config.cache_dir + "2"))
    num_chars = sum(map(len, make_documents(200)))
    assert seen == every_train[:: -(-num_chars // 20_000)] and len(seen) < len(every_train)


def test_cache_is_used_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = prepare_tokens(config)
    assert len(caplog.records) == 1 and "200 documents" in caplog.text
    Path(config.source).touch()
    again = prepare_tokens(config)  # hashed again, not tokenized again
    monkeypatch.setattr(corpus, "iter_documents", None)
    monkeypatch.setattr(pipeline, "_build_entry", None)
    third = prepare_tokens(config)
    assert len(caplog.records) == 1
    for other in (again, third):
        np.testing.assert_array_equal(other.train, first.train)
        np.testing.assert_array_equal(other.val, first.val)
        assert other.content_hash == first.content_hash


def test_changed_corpus_and_settings_are_told_apart(config: DataConfig, tmp_path: Path) -> None:
    first = prepare_tokens(config)
    path = Path(config.source)
    path.write_text(path.read_text().replace("document 7\\n", "document X\\n"))
    second = prepare_tokens(config)
    assert second.content_hash != first.content_hash
    assert len(prepare_tokens(with_(config, val_fraction=0.5)).val) > len(second.val)
    assert prepare_tokens(with_(config, tokenizer="bpe")).tokenizer.name == "bpe-300"
    assert prepare_tokens(with_(config, tokenizer="bpe", bpe_vocab_size=280)).tokenizer.name == "bpe-280"


@pytest.mark.parametrize("damage", ["truncate", "odd", "remove", "meta", "tokenizer", "file"])
def test_damaged_entry_is_built_again(config: DataConfig, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    first = np.array(prepare_tokens(config).train)
    (entry,) = Path(config.cache_dir, "tokens").iterdir()
    if damage in ("truncate", "odd"):
        content = (entry / "train.bin").read_bytes()
        (entry / "train.bin").write_bytes(content[:-2] if damage == "truncate" else content[:-1])
    elif damage == "remove":
        (entry / "val.bin").unlink()
    elif damage == "meta":
        (entry / "meta.json").write_text("{")
    elif damage == "tokenizer":
        (entry / "tokenizer.json").write_text("{}")
    else:
        entry.rename(entry.with_name("aside"))
        entry.write_text("not a folder")
    np.testing.assert_array_equal(prepare_tokens(config).train, first)
    assert "is damaged" in caplog.text
    caplog.clear()
    prepare_tokens(config)
    assert caplog.text == ""


@pytest.mark.parametrize("starts_damaged", [False, True])
def test_concurrent_builders_agree(config: DataConfig, starts_damaged: bool) -> None:
    if starts_damaged:
        prepare_tokens(config)
        next(Path(config.cache_dir).glob("tokens/*/train.bin")).write_bytes(b"")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(prepare_tokens, [config] * 8))
    assert all(np.array_equal(result.train, results[0].train) for result in results)
    assert len(list(Path(config.cache_dir, "tokens").iterdir())) == 1


def test_corpus_that_changes_meanwhile(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pipeline._build_entry

    def change_and_build(*args: object) -> None:
        write_jsonl(Path(config.source), make_documents(30))
        build(*args)

    monkeypatch.setattr(pipeline, "_build_entry", change_and_build)
    for kind in ("byte", "bpe"):
        write_jsonl(Path(config.source), make_documents(200))
        with pytest.raises(InputError, match="changed while it was read"):
            prepare_tokens(with_(config, tokenizer=kind))
    assert list(Path(config.cache_dir, "tokens").iterdir()) == []


def test_disk_that_fills_up(config: DataConfig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # smaller than train.bin
    try:
        with pytest.raises(InputError, match=f"cache '{config.cache_dir}' cannot be written .*set data.cache_dir"):
            prepare_tokens(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Path(config.cache_dir, "tokens").iterdir()) == []
    prepare_tokens(config)


def test_cache_dir_that_is_a_file(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare_tokens(config)


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pipeline._cache_dir(DataConfig()) == tmp_path / "snlp_jax"


def test_tokenizer_from_a_file(config: DataConfig, bpe: tokenizer.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.to_json(), encoding="utf-8")
    data = prepare_tokens(with_(config, tokenizer=str(path)))
    assert data.tokenizer.to_json() == bpe.to_json()
    assert sorted(split_by_bos(data.val, bpe) + split_by_bos(data.train, bpe)) == sorted(make_documents(200))
    path.write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json': the tokenizer cannot be loaded"):
        prepare_tokens(with_(config, tokenizer=str(path)))
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="tokenizer.json': 'utf-8' codec"):
        prepare_tokens(with_(config, tokenizer=str(path)))
    with pytest.raises(InputError, match="data.tokenizer 'bite' is neither"):
        prepare_tokens(with_(config, tokenizer="bite"))


def test_large_vocabulary_takes_four_bytes(config: DataConfig, tmp_path: Path) -> None:
    vocab = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 2**16)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    data = prepare_tokens(with_(config, tokenizer=str(tmp_path / "tokenizer.json")))
    assert data.train.dtype == np.uint32 and data.train[0] == data.tokenizer.bos_id == 2**16


# Windows and iterators


def test_windows_tile_the_tokens() -> None:
    source = WindowSource(np.arange(32, dtype=np.uint16), 10)
    assert len(source) == num_windows(np.arange(32), 10) == 3
    assert num_windows(np.arange(31), 10) == 3 and num_windows(np.arange(30), 10) == 2
    assert num_windows(np.arange(0), 10) == 0
    np.testing.assert_array_equal(source[2]["tokens"], np.arange(20, 31))
    assert source[0]["tokens"].dtype == np.int32
    assert repr(source) == repr(WindowSource(np.arange(32), 10))
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


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
    with pytest.raises(InputError, match="has 1001 tokens, but a batch of 101 windows of 10 needs 1011"):
        train_iterator(make_data(), seq_len=10, batch_size=101, seed=0)
    train_iterator(make_data(1011), seq_len=10, batch_size=101, seed=0)
    with pytest.raises(InputError, match="held-out split has 10 tokens, but a window of 10 needs 11"):
        val_batches(make_data(num_val=10), seq_len=10, batch_size=1, num_batches=1)


@pytest.mark.parametrize(
    ("num_val", "batch_size", "num_batches", "shapes"),
    [(301, 4, 2, [4, 4]), (301, 4, 99, [4] * 7), (301, 30, 1, [30]), (301, 31, 2, [30]), (11, 8, 8, [1])],
)
def test_val_batches(num_val: int, batch_size: int, num_batches: int, shapes: list[int]) -> None:
    batches = val_batches(make_data(num_val=num_val), seq_len=10, batch_size=batch_size, num_batches=num_batches)
    assert [batch.shape for batch in batches] == [(rows, 11) for rows in shapes]
    assert all(batch.dtype == np.int32 for batch in batches)
    starts = np.concatenate(batches)[:, 0]
    gaps = np.diff(starts)
    assert starts[0] == 0 and (len(gaps) == 0 or (gaps.min() > 0 and gaps.max() - gaps.min() <= 10))
    assert starts[-1] + 2 * max(gaps, default=10) >= num_val - 1  # they reach to the end
