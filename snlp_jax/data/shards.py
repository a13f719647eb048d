"""A corpus to memory-mapped tokens, kept in a cache.

    tokenizers/HASH.json       what was trained here
    tokens/HASH/               of one (corpus, tokenizer, split): tokenizer.json; for each shard 00000.train, 00000.val,
                               00000.digests and 00000.json; once all of them are there, meta.json

A corpus is known by names, sizes and times of its files: while they stay the same it is not read again. Shards are of
the corpus (``snlp_jax/data/corpus.py``), so that the tokens do not depend on who tokenizes. All files are written
aside and renamed. An entry without meta.json is one that was interrupted: the shards that it has are used by whoever
builds it again. Several processes may build the same entry at once, and share the work if they do.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.corpus import (
    Shard,
    corpus_files,
    digest_of,
    documents_of,
    file_state,
    key_of,
    plan_shards,
    val_limit,
)
from snlp_jax.data.jobs import Job, finished, remove_leftovers, run_jobs
from snlp_jax.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write

BPE_TRAIN_CHARS = 200_000_000
"""A longer corpus is thinned evenly to about this much before BPE is trained on it."""
OPEN_SHARDS = 256
"""Files of a split that are mapped at a time: an open map takes a file descriptor."""

_FORMAT = 3  # part of every name: raise it when documents, splits or files change
_logger = logging.getLogger(__name__)


# -- Reading tokens ----------------------------------------------------------------------------------------------------


class ShardedTokens:
    """Tokens [n] that lie in several files, one after another, read only: ``len``, an item, or a slice of step 1, which
    is an array. Memory is that of the slice."""

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: np.dtype) -> None:
        self._files = [(path, count) for path, count in files if count]
        self._ends = np.cumsum([count for _, count in self._files], dtype=np.int64)
        self.dtype = np.dtype(dtype)
        self._open: Callable[[int], np.ndarray] = functools.lru_cache(OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError(f"slices of tokens have step 1, not {step}")
        pieces = [np.zeros(0, self.dtype)]
        while start < stop:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            end, first = int(self._ends[shard]), int(self._ends[shard]) - self._files[shard][1]
            pieces.append(self._open(shard)[start - first : min(stop, end) - first])
            start = end
        return np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)

    def __add__(self, other: "ShardedTokens") -> "ShardedTokens":
        return ShardedTokens([*self._files, *other._files], self.dtype)

    def _map(self, shard: int) -> np.ndarray:
        path, count = self._files[shard]
        if path.stat().st_size != count * self.dtype.itemsize:
            raise InputError(f"{str(path)!r} has changed; run again to have it mended.")
        return np.memmap(path, dtype=self.dtype, mode="r")


# -- A corpus ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Files as they were when first looked at, and how they are divided."""

    config: DataConfig
    states: list[tuple[str, int, int, int]]
    shards: list[Shard]

    @property
    def key(self) -> str:
        """Tells it from other corpora."""
        return hash_of(_FORMAT, self.config.source == "builtin", self.config.text_field, self.states, self.shards)

    @property
    def val_limit(self) -> int:
        """Documents with a key below it are held out, unless that leaves a side empty."""
        return int(self.config.val_fraction * 2**64)

    def training_documents(self, max_chars: int) -> Iterator[str]:
        """Documents that are not held out, thinned evenly to about ``max_chars``."""
        stride = -(-sum(part.size for shard in self.shards for part in shard) // max(max_chars, 1))
        for shard in self.shards:
            documents = documents_of(shard, self.config.text_field)
            training = (document for document in documents if key_of(digest_of(document)) >= self.val_limit)
            yield from itertools.islice(training, 0, None, max(stride, 1))
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises InputError where a file is not what it was."""
        if [file_state(path) for path in corpus_files(self.config)] != self.states:
            raise InputError(
                f"data.source {self.config.source!r} changed while it was read; run again when it is at rest."
            )


def find_corpus(config: DataConfig) -> Corpus:
    """Look at the files of ``config.source``.

    Raises:
      InputError: there are none, or one cannot be read.
    """
    return Corpus(config, [file_state(path) for path in corpus_files(config)], plan_shards(config))


# -- A tokenizer for it ------------------------------------------------------------------------------------------------


def trained_tokenizer(
    config: DataConfig, corpora: Sequence[Corpus], weights: Sequence[float], folder: Path
) -> Tokenizer:
    """BPE of the training documents, or what an earlier call has left in ``folder``.

    Of a mixture every corpus gives at most its share, by weight, of ``BPE_TRAIN_CHARS``, thinned evenly: a document
    counts once, whatever the weight.
    """
    shares = list(zip((corpus.key for corpus in corpora), weights, strict=True))
    path = folder / f"{hash_of(config.bpe_vocab_size, config.val_fraction, BPE_TRAIN_CHARS, shares)}.json"
    found = _read_trained(path)
    if found is None:
        _logger.info(
            "Training a tokenizer of %d entries on %s, once.", config.bpe_vocab_size, ", ".join(config.sources)
        )
        documents = (
            corpus.training_documents(int(BPE_TRAIN_CHARS * weight))
            for corpus, weight in zip(corpora, weights, strict=True)
        )
        found = train_bpe(itertools.chain.from_iterable(documents), config.bpe_vocab_size)
        text = found.to_json()
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"tokenizer": text, "hash": hash_of(text)}))
        remove_leftovers(folder)
    return found


def _read_trained(path: Path) -> Tokenizer | None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if hash_of(saved["tokenizer"]) != saved["hash"]:
            raise ValueError("it differs from what was written")
        return load_tokenizer_json(saved["tokenizer"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        _logger.warning("Tokenizer %s is damaged (%s); training it again.", path, error)
        return None


# -- Its tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The tokens of one corpus."""

    tokenizer: Tokenizer
    train: ShardedTokens
    val: ShardedTokens
    content_hash: str
    """Of all documents in their order, wherever shards end."""


def tokenized(corpus: Corpus, tokenizer: Tokenizer, tokenizer_key: str, folder: Path) -> Entry:
    """The cache entry of a corpus, which is built, or built to its end, or mended, where it is not whole.

    Raises:
      InputError: a bad document; fewer than two different ones, which cannot be split; or the corpus has changed since
        it was looked at.
      OSError: the entry cannot be written.
    """
    path = folder / hash_of(corpus.key, tokenizer_key, corpus.config.val_fraction)
    entry = _open(path)
    if entry is None:
        _build(path, corpus, tokenizer)
        entry = _open(path)
    if entry is None:
        raise InputError(f"the tokens written to {str(path)!r} cannot be read back; check the disk.")
    return entry


def _open(entry: Path) -> Entry | None:
    """None, with a notice where it was whole once, if it is not."""
    if not (entry / "meta.json").exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        text = (entry / "tokenizer.json").read_text(encoding="utf-8")
        if hash_of(text) != meta["tokenizer_hash"]:
            raise ValueError("tokenizer.json differs from what was written")
        dtype, splits = np.dtype(meta["dtype"]), {}
        for split in ("train", "val"):
            files = [(entry / f"{i:05d}.{split}", counts[split]) for i, counts in enumerate(meta["shards"])]
            for path, count in files:
                if path.stat().st_size != count * dtype.itemsize:
                    raise ValueError(f"{path.name} does not hold {count} tokens")
            splits[split] = ShardedTokens(files, dtype)
        return Entry(load_tokenizer_json(text), splits["train"], splits["val"], meta["content_hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        _logger.warning("Token cache entry %s is damaged (%s); mending it.", entry, error)
        return None


def _build(entry: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    config = corpus.config
    if entry.is_file():
        _logger.warning("Token cache entry %s is damaged (a file, not a folder); building it again.", entry)
        entry.unlink()
    entry.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    tokenizer_path, text = entry / "tokenizer.json", tokenizer.to_json()
    atomic_write(tokenizer_path, text)
    jobs = [
        Job(shard, config.text_field, str(entry / f"{i:05d}"), str(tokenizer_path), dtype.str, corpus.val_limit)
        for i, shard in enumerate(corpus.shards)
    ]
    num_done = sum(finished(job, is_thorough=False) is not None for job in jobs)
    _logger.info(
        "Tokenizing %s (%.1f MB, %d of %d shards are there) with %s, once; cached in %s.",
        *(config.source, sum(job.size for job in jobs) / 1e6, num_done, len(jobs), tokenizer.name, entry),
    )
    records = run_jobs(jobs, config.num_workers, "Tokenizing")
    min_key, max_key = min(r["min_key"] for r in records), max(r["max_key"] for r in records)
    if max_key < 0:
        raise InputError(f"data.source {config.source!r} holds no text; give files that are not empty.")
    if min_key == max_key:
        raise InputError(
            f"data.source {config.source!r} holds only one document, or copies of one, and two are needed to hold one "
            "out; give more text."
        )
    if (limit := val_limit(config.val_fraction, min_key, max_key)) != corpus.val_limit:  # a side without a document
        jobs = [job._replace(val_limit=limit) for job in jobs]
        records = run_jobs(jobs, config.num_workers, "Tokenizing")
    corpus.check_unchanged()
    content = blake2b(digest_size=16)
    for job in jobs:
        content.update(Path(f"{job.out}.digests").read_bytes())
    meta = {
        "content_hash": content.hexdigest(),
        "tokenizer": tokenizer.name,
        "tokenizer_hash": hash_of(text),
        "dtype": dtype.str,
        "shards": [{split: record[split] for split in ("train", "val")} for record in records],
    }
    remove_leftovers(entry)  # before the entry is whole: nobody tidies up afterwards
    atomic_write(entry / "meta.json", json.dumps(meta, indent=2) + "\n")


def hash_of(*parts: object) -> str:
    """Of anything that JSON can hold."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
