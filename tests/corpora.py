"""Small corpora, and tokens that tell where they come from."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data import jobs, tokenizer
from snlp_jax.data.corpus import documents_of, plan_shards
from snlp_jax.data.pipeline import TokenData

WORDS = ["one", "two", "three", "four", "snow", "rain", "wind", "naïve", "日本", "<|bos|>", "<s>"]


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def make_documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"document {i}\n" + " ".join(rng.choice(WORDS, size=40)) for i in range(count)]


def iter_documents(config: DataConfig) -> Iterator[str]:
    """Of the whole corpus."""
    for shard in plan_shards(config):
        yield from documents_of(shard, config.text_field)


def split_by_bos(tokens: np.ndarray, tok: tokenizer.Tokenizer) -> list[str]:
    tokens = np.asarray(tokens)
    starts = np.flatnonzero(tokens == tok.bos_id)
    assert starts[0] == 0
    return [tok.decode(part[1:]) for part in np.split(tokens, starts[1:])]


def make_data(num_train: int = 1001, num_val: int = 301) -> TokenData:
    """Tokens that count upwards, so that a window tells where it comes from."""
    train, val = np.arange(num_train, dtype=np.uint16), np.arange(num_val, dtype=np.uint16)
    return TokenData(tokenizer.ByteTokenizer(), train, val, "hash")


def starts_of(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


def text_config(folder: Path, **changes: object) -> DataConfig:
    """200 documents in a .jsonl file."""
    write_jsonl(folder / "corpus.jsonl", make_documents(200))
    source, cache_dir = str(folder / "corpus.jsonl"), str(folder / "cache")
    return with_(DataConfig(source=source, cache_dir=cache_dir, val_fraction=0.2, bpe_vocab_size=300), **changes)


def with_(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


def kill_worker(job: jobs.Job) -> None:
    """In the place of a job."""
    os.kill(os.getpid(), signal.SIGKILL)
