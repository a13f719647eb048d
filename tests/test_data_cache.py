"""The token cache: what it holds, that it is used again, and that what happens to it or its builder does not matter."""

import logging
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import kill_worker, make_documents, split_by_bos, text_config, with_, write_jsonl

from snlp_jax.config import DataConfig
from snlp_jax.data import corpus, jobs, pipeline, shards, tokenizer
from snlp_jax.data.pipeline import ShardedTokens
from snlp_jax.data.shards import prepare_tokens
from snlp_jax.errors import InputError
from snlp_jax.io.files import cache_folder


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return text_config(tmp_path)


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

    monkeypatch.setattr(shards, "train_bpe", spy)
    data = prepare_tokens(with_(config, tokenizer="bpe"))
    assert seen == split_by_bos(data.train, data.tokenizer)
    monkeypatch.setattr(shards, "BPE_TRAIN_CHARS", 20_000)
    every_train, seen[:] = list(seen), []
    prepare_tokens(with_(config, tokenizer="bpe"))
    assert seen == every_train[:: -(-Path(config.source).stat().st_size // 20_000)] and len(seen) < len(every_train)


def test_cache_is_used_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = prepare_tokens(config)
    assert "0 of 1 shards are there" in caplog.text and len(caplog.records) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards, "run_jobs", None)
        again = prepare_tokens(config)
    Path(config.source).touch()
    third = prepare_tokens(config)  # it may have changed
    assert len(caplog.records) == 2
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


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "counts", "tokenizer", "file"])
def test_damaged_entry_is_built_again(config: DataConfig, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    first = np.array(prepare_tokens(config).train)
    (entry,) = Path(config.cache_dir, "tokens").iterdir()
    if damage == "truncate":
        (entry / "00000.train").write_bytes((entry / "00000.train").read_bytes()[:-2])
    elif damage == "remove":
        (entry / "00000.val").unlink()
    elif damage == "meta":
        (entry / "meta.json").write_text("{")
    elif damage == "counts":
        (entry / "meta.json").write_text((entry / "meta.json").read_text().replace('"train"', '"trains"'))
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
        next(Path(config.cache_dir).glob("tokens/*/00000.train")).write_bytes(b"")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(prepare_tokens, [config] * 8))
    assert all(np.array_equal(result.train, results[0].train) for result in results)
    assert len(list(Path(config.cache_dir, "tokens").iterdir())) == 1


def test_corpus_that_changes_meanwhile(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    find = shards.find_corpus

    def find_and_change(config: DataConfig) -> corpus.Corpus:
        found = find(config)
        write_jsonl(Path(config.source), make_documents(30))
        return found

    monkeypatch.setattr(shards, "find_corpus", find_and_change)
    for kind in ("byte", "bpe"):
        write_jsonl(Path(config.source), make_documents(200))
        with pytest.raises(InputError, match="changed while it was read"):
            prepare_tokens(with_(config, tokenizer=kind))
    assert not [*Path(config.cache_dir).glob("**/meta.json"), *Path(config.cache_dir).glob("tokenizers/*.json")]


def test_disk_that_fills_up(config: DataConfig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # smaller than the tokens
    try:
        with pytest.raises(InputError, match=f"cache '{config.cache_dir}' cannot be written .*set data.cache_dir"):
            prepare_tokens(with_(config, num_workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path(config.cache_dir).glob("**/.*"))
    prepare_tokens(config)


def test_cache_dir_that_is_a_file(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare_tokens(config)


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "snlp_jax"


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe(make_documents(50), 300)


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


# Shards and workers


def files_of(cache_dir: str) -> dict[str, bytes]:
    """Every file of the entries but the lists of where documents came from."""
    return {p.name: p.read_bytes() for p in Path(cache_dir).glob("tokens/*/*")}


def test_tokens_do_not_depend_on_the_workers(config: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_BYTES", 20_000)
    data = {n: prepare_tokens(with_(config, cache_dir=f"{config.cache_dir}-{n}", num_workers=n)) for n in (0, 2)}
    assert len(list(Path(config.cache_dir + "-0").glob("tokens/*/*.train"))) >= 3
    assert files_of(f"{config.cache_dir}-0") == files_of(f"{config.cache_dir}-2")
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1 << 26)
    whole = prepare_tokens(with_(config, cache_dir=config.cache_dir + "-whole"))
    assert whole.content_hash == data[0].content_hash
    np.testing.assert_array_equal(whole.train, data[0].train)
    np.testing.assert_array_equal(whole.val, data[0].val)


SLOW_BUILDER = """
import sys, time
from snlp_jax.config import DataConfig
from snlp_jax.data import corpus, jobs
from snlp_jax.data.shards import prepare_tokens

assert not {'jax', 'grain', 'flax'} & set(sys.modules), 'processes that tokenize have no use for it'
run, corpus.SHARD_BYTES = jobs.run_job, 2000
jobs.run_job = lambda job: (time.sleep(0.05), run(job))
prepare_tokens(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], val_fraction=0.2, num_workers=0))
"""


def test_a_killed_builder_leaves_its_shards(config: DataConfig, monkeypatch) -> None:
    builder = subprocess.Popen([sys.executable, "-c", SLOW_BUILDER, config.source, config.cache_dir])
    done = lambda: sorted(Path(config.cache_dir).glob("tokens/*/0*.json"))  # noqa: E731
    deadline = time.monotonic() + 60
    while len(done()) < 3 and builder.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    builder.kill()
    assert builder.wait() == -signal.SIGKILL

    monkeypatch.setattr(corpus, "SHARD_BYTES", 2000)
    kept, damaged = done()[1:], done()[0].with_suffix(".train")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-2] + b"\0\0")  # of the same length: the checksum tells
    inodes = lambda: [p.with_suffix(end).stat().st_ino for p in kept for end in (".json", ".train", ".val")]  # noqa: E731
    before = inodes()
    resumed = prepare_tokens(with_(config, num_workers=0))
    assert inodes() == before
    assert 2 <= len(kept) < len(done()) - 2 and damaged.read_bytes() == content
    assert not list(Path(config.cache_dir).glob("**/.*"))
    unbroken = prepare_tokens(with_(config, cache_dir=config.cache_dir + "2"))
    assert files_of(config.cache_dir) == files_of(config.cache_dir + "2")
    np.testing.assert_array_equal(resumed.train, unbroken.train)


def test_what_happens_to_workers_is_said_in_one_sentence(config: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_BYTES", 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "run_job", kill_worker)
        with pytest.raises(InputError, match=r"a process that reads the corpus ended; is memory short"):
            prepare_tokens(with_(config, num_workers=1))
    path = Path(config.source)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(InputError, match="corpus.jsonl, after byte .*, line .* is not valid JSON"):
        prepare_tokens(with_(config, num_workers=1))
    assert jobs.auto_workers(1) == 0 and 1 <= jobs.auto_workers(100) <= jobs.MAX_AUTO_WORKERS


def test_tokens_of_many_shards_are_one_array(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "OPEN_SHARDS", 2)
    parts = [np.arange(start, stop, dtype=np.uint16) for start, stop in ((0, 7), (7, 7), (7, 8), (8, 20))]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).write_bytes(part.tobytes())
    tokens = ShardedTokens([(tmp_path / str(n), len(part)) for n, part in enumerate(parts)], np.dtype(np.uint16))
    assert len(tokens) == 20 and tokens[-1] == 19 and tokens[7] == 7
    plain = np.arange(20)
    for start in range(-1, 22):
        for stop in range(-1, 22):
            np.testing.assert_array_equal(tokens[start:stop], plain[start:stop])
    np.testing.assert_array_equal(tokens + tokens, [*plain, *plain])
    assert tokens._open.cache_info().currsize == 2
    with pytest.raises(IndexError):
        tokens[20]
    (tmp_path / "3").write_bytes(b"")
    fresh = tokens + ShardedTokens([], np.dtype(np.uint16))
    with pytest.raises(InputError, match="3' has changed; run again"):
        fresh[9:]
