"""A corpus to memory-mapped tokens, kept in a cache.

    corpora/HASH.json          what one pass over a corpus told, found again by names, sizes and times of its files
    tokenizers/HASH.json       what was trained here
    tokens/HASH/               of one (corpus, tokenizer, split): tokenizer.json; for each shard 00000.train, 00000.val
                               and 00000.json; once all of them are there, meta.json

Shards are those of the corpus (``snlp_jax/data/corpus.py``), so that the tokens do not depend on who tokenizes. All
files are written aside and renamed. An entry without meta.json is one that was interrupted: the shards that it has are
used by whoever builds it again. Several processes may build the same entry at once, and share the work if they do.
"""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.corpus import Shard, corpus_files, file_state, no_text, plan_shards, val_limit
from snlp_jax.data.jobs import Job, Record, finished, remove_leftovers, run_jobs
from snlp_jax.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write

BPE_TRAIN_CHARS = 200_000_000
"""A longer corpus is thinned evenly to about this much before BPE is trained on it."""
OPEN_SHARDS = 256
"""Files of a split that are mapped at a time: an open map takes a file descriptor."""

_FORMAT = 2  # part of every name: raise it when documents, splits or files change
_logger = logging.getLogger(__name__)


# -- Reading tokens ----------------------------------------------------------------------------------------------------


class ShardedTokens:
    """Tokens [n] that lie in several files, one after another, read only. A slice is an array; memory is that of the
    slice."""

    ndim = 1

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: np.dtype) -> None:
        self._files = [(path, count) for path, count in files if count]
        self._ends = np.cumsum([count for _, count in self._files], dtype=np.int64)
        self.dtype = np.dtype(dtype)
        self._open: Callable[[int], np.ndarray] = functools.lru_cache(OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def size(self) -> int:
        return len(self)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            index = range(len(self))[index]
            return self[index : index + 1][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            places = range(start, stop, step) or range(1)
            piece = self[min(places[0], places[-1]) : max(places[0], places[-1]) + 1]
            return piece[::step][: len(range(start, stop, step))]
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            end = int(self._ends[shard])
            first = int(self._ends[shard - 1]) if shard else 0
            pieces.append(self._open(shard)[start - first : min(stop, end) - first])
            start = end
        return np.concatenate([np.zeros(0, self.dtype), *pieces]) if len(pieces) != 1 else pieces[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)

    def __add__(self, other: "ShardedTokens") -> "ShardedTokens":
        return ShardedTokens([*self._files, *other._files], self.dtype)

    def _map(self, shard: int) -> np.ndarray:
        path, count = self._files[shard]
        if path.stat().st_size != count * self.dtype.itemsize:
            raise InputError(f"{str(path)!r} has changed; run again to have it mended.")
        return np.memmap(path, dtype=self.dtype, mode="r")


# -- A pass over the corpus --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusSummary:
    """What one pass over a corpus tells. A document's key is the number, below 2**64, that its hash begins with."""

    content_hash: str
    """Of all documents in their order, wherever shards end."""
    num_documents: int
    num_chars: int
    min_key: int
    max_key: int
    shard_hashes: tuple[str, ...]
    """Of the documents of each shard."""
    shard_chars: tuple[int, ...]

    def val_limit(self, val_fraction: float) -> int:
        return val_limit(val_fraction, self.min_key, self.max_key)


@dataclass(frozen=True)
class Corpus:
    """A corpus that was read once."""

    config: DataConfig
    shards: list[Shard]
    summary: CorpusSummary

    def jobs(self, kind: str, folder: Path, **more: Any) -> list[Job]:
        """One for each shard, on the documents that the summary tells of."""
        known = {"val_limit": self.summary.val_limit(self.config.val_fraction), **more}
        jobs = _jobs(self.config, self.shards, kind, folder)
        facts = zip(jobs, self.summary.shard_hashes, self.summary.shard_chars, strict=True)
        return [job | known | {"documents_hash": digest, "size": size} for job, digest, size in facts]


def read_corpus(config: DataConfig, record_dir: Path) -> Corpus:
    """Read the whole corpus once, or the record of an earlier call if names, sizes and times of its files are the same.

    Args:
      record_dir: where records are kept, and what an interrupted pass has found out.

    Raises:
      InputError: a bad corpus, or fewer than two different documents, which cannot be split.
      OSError: the record cannot be written.
    """
    states = [file_state(path) for path in corpus_files(config)]
    shards = plan_shards(config)
    state = [_FORMAT, config.source == "builtin", config.text_field, states, shards]
    record, folder = record_dir / f"{hash_of(*state)}.json", record_dir / f"{hash_of(*state)}"
    summary = _read_summary(record)
    if summary is None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            jobs = _jobs(config, shards, "scan", folder)
            summary = _join(config, run_jobs(jobs, config.num_workers, "Reading the corpus"), jobs)
        except FileNotFoundError:
            summary = _read_summary(record)  # another process was faster, and has tidied up
            if summary is None:
                raise
        atomic_write(record, json.dumps(dataclasses.asdict(summary)))
        remove_leftovers(record_dir)
    shutil.rmtree(folder, ignore_errors=True)  # also where another process was killed before it could
    if summary.min_key == summary.max_key:
        raise InputError(
            f"data.source {config.source!r} holds only one document, or copies of one, and two are needed to hold one "
            "out; give more text."
        )
    return Corpus(config, shards, summary)


def _jobs(config: DataConfig, shards: list[Shard], kind: str, folder: Path) -> list[Job]:
    common = {"kind": kind, "text_field": config.text_field, "source": config.source}
    return [
        common | {"parts": shard, "out": str(folder / f"{number:05d}"), "size": sum(part.size for part in shard)}
        for number, shard in enumerate(shards)
    ]


def _join(config: DataConfig, records: list[Record], jobs: list[Job]) -> CorpusSummary:
    total = blake2b(digest_size=16)
    for job in jobs:
        total.update(Path(f"{job['out']}.digests").read_bytes())
    num_documents = sum(record["num_documents"] for record in records)
    if num_documents == 0:
        raise no_text(config)
    return CorpusSummary(
        content_hash=total.hexdigest(),
        num_documents=num_documents,
        num_chars=sum(record["num_chars"] for record in records),
        min_key=min(record["min_key"] for record in records),
        max_key=max(record["max_key"] for record in records),
        shard_hashes=tuple(record["documents_hash"] for record in records),
        shard_chars=tuple(record["num_chars"] for record in records),
    )


def _read_summary(record: Path) -> CorpusSummary | None:
    try:
        fields: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return CorpusSummary(**(fields | lists))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


# -- A tokenizer for it ------------------------------------------------------------------------------------------------


def trained_tokenizer(
    config: DataConfig, corpora: Sequence[Corpus], weights: Sequence[float], folder: Path
) -> Tokenizer:
    """BPE of the training documents, or what an earlier call has left in ``folder``.

    Of a mixture every corpus gives at most its share, by weight, of ``BPE_TRAIN_CHARS``, thinned evenly: a document
    counts once, whatever the weight.
    """
    about = [(corpus.summary.content_hash, weight) for corpus, weight in zip(corpora, weights, strict=True)]
    name = hash_of(_FORMAT, config.bpe_vocab_size, config.val_fraction, BPE_TRAIN_CHARS, about)
    path, work = folder / f"{name}.json", folder / name
    known = _read_trained(path)
    if known is not None:
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed before it could
        return known
    work.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for number, (corpus, weight) in enumerate(zip(corpora, weights, strict=True)):
        stride = -(-corpus.summary.num_chars // max(int(BPE_TRAIN_CHARS * weight), 1))
        for job in corpus.jobs("sample", work, stride=stride):
            jobs.append(job | {"out": f"{job['out']}-{number}"})

    def documents() -> Iterator[str]:
        for job in jobs:
            yield from json.loads(Path(f"{job['out']}.documents").read_text(encoding="utf-8"))

    try:
        run_jobs(jobs, config.num_workers, "Choosing text for the tokenizer")
        tokenizer = train_bpe(documents(), config.bpe_vocab_size)
    except FileNotFoundError:
        known = _read_trained(path)  # another process was faster, and has tidied up
        if known is None:
            raise
        return known
    text = tokenizer.to_json()
    atomic_write(path, json.dumps({"tokenizer": text, "hash": hash_of(text)}))
    shutil.rmtree(work, ignore_errors=True)
    remove_leftovers(folder)
    return tokenizer


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


def tokenized(corpus: Corpus, tokenizer: Tokenizer, tokenizer_key: str, folder: Path) -> Entry:
    """The cache entry of a corpus, which is built, or built to its end, or mended, where it is not whole.

    Raises:
      InputError: the corpus has changed since it was read.
      OSError: the entry cannot be written.
    """
    config, summary = corpus.config, corpus.summary
    name = hash_of(_FORMAT, summary.content_hash, summary.shard_hashes, tokenizer_key, config.val_fraction)
    entry = folder / name
    return _open(entry) or _build(entry, corpus, tokenizer)


def _open(entry: Path) -> Entry | None:
    """None, with a notice where it was whole once, if it is not."""
    if not (entry / "meta.json").exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        text = (entry / "tokenizer.json").read_text(encoding="utf-8")
        if hash_of(text) != meta["tokenizer_hash"]:
            raise ValueError("tokenizer.json differs from what was written")
        dtype = np.dtype(meta["dtype"])
        splits: dict[str, list[tuple[Path, int]]] = {"train": [], "val": []}
        for number, counts in enumerate(meta["shards"]):
            for split, count in counts.items():
                path = entry / f"{number:05d}.{split}"
                if path.stat().st_size != count * dtype.itemsize:
                    raise ValueError(f"{path.name} does not hold {count} tokens")
                splits[split].append((path, count))
        return Entry(load_tokenizer_json(text), *(ShardedTokens(splits[name], dtype) for name in ("train", "val")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        _logger.warning("Token cache entry %s is damaged (%s); mending it.", entry, error)
        return None


def _build(entry: Path, corpus: Corpus, tokenizer: Tokenizer) -> Entry:
    config, summary = corpus.config, corpus.summary
    if entry.is_file():
        _logger.warning("Token cache entry %s is damaged (a file, not a folder); building it again.", entry)
        entry.unlink()
    entry.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    text = tokenizer.to_json()
    atomic_write(entry / "tokenizer.json", text)
    jobs = corpus.jobs("encode", entry, tokenizer=str(entry / "tokenizer.json"), dtype=dtype.str)
    num_done = sum(finished(Path(job["out"]), is_thorough=False) is not None for job in jobs)
    _logger.info(
        "Tokenizing %s (%d documents, %.1f million characters, %d of %d shards are there) with %s, once; cached in %s.",
        *(config.source, summary.num_documents, summary.num_chars / 1e6, num_done, len(jobs), tokenizer.name, entry),
    )
    records = run_jobs(jobs, config.num_workers, "Tokenizing")
    meta = {
        "content_hash": summary.content_hash,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": hash_of(text),
        "dtype": dtype.str,
        "shards": [{split: record[split] for split in ("train", "val")} for record in records],
    }
    remove_leftovers(entry)  # before the entry is whole: nobody tidies up afterwards
    atomic_write(entry / "meta.json", json.dumps(meta, indent=2) + "\n")
    opened = _open(entry)
    if opened is None:
        raise InputError(f"the tokens written to {str(entry)!r} cannot be read back; check the disk.")
    return opened


def hash_of(*parts: object) -> str:
    """Of anything that JSON can hold."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
