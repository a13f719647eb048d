"""Documents to token files, kept in a cache, and token files to batches of windows.

The cache holds one folder per (corpus content, tokenizer, split): ``train.bin``, ``val.bin``, ``tokenizer.json`` and
``meta.json``. It is written aside and renamed into place, so that what has the final name is whole, and several
processes may build the same entry at once: the first one wins and the others use its files.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.corpus import CorpusSummary, split_documents, summarize
from snlp_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer_json, train_bpe
from snlp_jax.errors import InputError

if TYPE_CHECKING:
    import grain

BPE_TRAIN_CHARS = 200_000_000
"""A longer corpus is thinned evenly to about this much before BPE is trained on it."""

_FORMAT = 1  # part of every cache key: raise it when splits or files change
_BATCH_CHARS = 1 << 20  # text that is encoded at once
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenData:
    """A tokenized corpus: documents one after another, ``tokenizer.bos_id`` before each."""

    tokenizer: Tokenizer
    train: np.memmap
    """uint16 or uint32 [number of tokens], read only."""
    val: np.memmap
    """The same for the documents held out."""
    content_hash: str
    """Of the corpus alone: equal for equal documents in equal order."""


def prepare_tokens(config: DataConfig) -> TokenData:
    """Tokenize the corpus, or open what an earlier call left in the cache.

    Documents are held out by a hash of their content, whatever their order, so equal documents fall on the same side;
    a corpus so small that this leaves a side empty gives it one document. Memory is bounded for a corpus of any size.

    Raises:
      InputError: a bad corpus or tokenizer, fewer than two different documents, or a cache that cannot be written.
    """
    cache_dir = _cache_dir(config)
    tokenizer_key, tokenizer = _find_tokenizer(config)
    try:
        summary = summarize(config, cache_dir / "corpora")
        entry = cache_dir / "tokens" / _hash(_FORMAT, summary.content_hash, tokenizer_key, config.val_fraction)
        return _open_entry(entry) or _build_entry(entry, config, tokenizer, summary)
    except OSError as error:
        raise InputError(
            f"the token cache {str(cache_dir)!r} cannot be written ({error.strerror or error}); "
            "make room there or set data.cache_dir to another folder."
        ) from error


def num_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Windows of ``seq_len`` inputs in tokens [n]: one more token is needed for the last target."""
    return max(0, (len(tokens) - 1) // seq_len)


class WindowSource:
    """Random access to windows: item i is ``{'tokens': int32 [seq_len + 1]}`` from token ``i * seq_len``.

    Inputs are ``tokens[:-1]`` and targets ``tokens[1:]``. Neighbouring windows share one token, so that every token
    after the first is a target once; what is left over at the end is not used.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return num_windows(self._tokens, self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self._seq_len
        return {"tokens": np.asarray(self._tokens[start : start + self._seq_len + 1], dtype=np.int32)}

    def __repr__(self) -> str:
        return f"WindowSource(num_tokens={len(self._tokens)}, seq_len={self._seq_len})"


def train_iterator(
    data: TokenData, *, seq_len: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> "grain.DatasetIterator":
    """Endless batches ``{'tokens': int32 [batch_size // process_count, seq_len + 1]}`` of shuffled training windows.

    Every epoch visits every window once in an order of its own. Batch j of all processes together holds the same
    windows for every number of processes: process p has rows p, p + process_count, ... The iterator's
    ``get_state`` counts batches, so that any number of processes may ``set_state`` what another number got.

    Args:
      batch_size: windows per step over all processes.
      seed: of the order; the same on all processes.

    Raises:
      InputError: ``batch_size`` cannot be divided among the processes, or exceeds the windows there are.
    """
    import grain

    if batch_size % process_count != 0:
        raise InputError(
            f"train.batch_size {batch_size} is not a multiple of the {process_count} processes; change one of them."
        )
    source = WindowSource(data.train, seq_len)
    if len(source) < batch_size:
        raise InputError(
            f"the training split has {len(data.train)} tokens, but a batch of {batch_size} windows of {seq_len} needs "
            f"{batch_size * seq_len + 1}; give a larger corpus, or lower train.batch_size or model.seq_len."
        )
    # Repeating before slicing keeps the processes in step when the windows cannot be divided evenly among them.
    windows = grain.MapDataset.source(source).seed(seed % 2**32).shuffle().repeat(None)[process_index::process_count]
    batches = windows.batch(batch_size // process_count, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def val_batches(data: TokenData, *, seq_len: int, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """At most ``num_batches`` batches, int32 [batch_size, seq_len + 1], spread evenly over the held-out tokens.

    A short split gives fewer batches, and one smaller batch if it has fewer than ``batch_size`` windows.

    Raises:
      InputError: the split holds no whole window.
    """
    source = WindowSource(data.val, seq_len)
    if len(source) == 0:
        raise InputError(
            f"the held-out split has {len(data.val)} tokens, but a window of {seq_len} needs {seq_len + 1}; "
            "give a larger corpus, raise data.val_fraction or lower model.seq_len."
        )
    rows = min(batch_size, len(source))
    picked = rows * min(num_batches, len(source) // rows)
    windows = [source[i * len(source) // picked]["tokens"] for i in range(picked)]
    return [np.stack(windows[start : start + rows]) for start in range(0, picked, rows)]


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snlp_jax"


def _hash(*parts: object) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _find_tokenizer(config: DataConfig) -> tuple[str, Tokenizer | None]:
    """What tells the tokenizer from others, and the tokenizer unless it must be trained."""
    if config.tokenizer == "byte":
        return "byte", ByteTokenizer()
    if config.tokenizer == "bpe":
        return f"bpe {config.bpe_vocab_size}", None
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise InputError(
            f"data.tokenizer {config.tokenizer!r} is neither 'byte' nor 'bpe' nor the path of a tokenizer.json."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return f"file {_hash(text)}", load_tokenizer_json(text)
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"data.tokenizer {config.tokenizer!r}: {error}") from error


def _open_entry(entry: Path) -> TokenData | None:
    """The data of a cache entry; None, with a notice if there is something, where it is not whole."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        tokenizer_json = (entry / "tokenizer.json").read_text(encoding="utf-8")
        if _hash(tokenizer_json) != meta["tokenizer_hash"]:
            raise ValueError("tokenizer.json differs from what was written")
        splits = {}
        for name in ("train", "val"):
            splits[name] = np.memmap(entry / f"{name}.bin", dtype=meta["dtype"], mode="r")
            if len(splits[name]) != meta["num_tokens"][name]:
                raise ValueError(f"{name}.bin holds {len(splits[name])} of {meta['num_tokens'][name]} tokens")
        return TokenData(load_tokenizer_json(tokenizer_json), splits["train"], splits["val"], meta["content_hash"])
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        _logger.warning("Token cache entry %s is damaged (%s); building it again.", entry, error)
        return None


def _build_entry(entry: Path, config: DataConfig, tokenizer: Tokenizer | None, summary: CorpusSummary) -> TokenData:
    """Write a cache entry aside, publish and open it; without a tokenizer, train BPE first."""
    _logger.info(
        "Tokenizing %s (%d documents, %.1f million characters) with %s, once; cached in %s.",
        *(config.source, summary.num_documents, summary.num_chars / 1e6, config.tokenizer, entry),
    )
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-", ignore_cleanup_errors=True) as folder:
        built = Path(folder, "entry")
        built.mkdir()
        if tokenizer is None:
            train = (document for name, document in split_documents(config, summary) if name == "train")
            stride = -(-summary.num_chars // BPE_TRAIN_CHARS)
            tokenizer = train_bpe(itertools.islice(train, 0, None, stride), config.bpe_vocab_size)
        _write_entry(built, split_documents(config, summary), tokenizer, summary.content_hash)
        data = _open_entry(built)
        if data is None:
            raise InputError(f"the tokens written below {str(entry.parent)!r} cannot be read back; check the disk.")
        _publish(built, entry)
        return _open_entry(entry) or data  # its files stay open if another process is just moving the entry


def _publish(built: Path, entry: Path) -> None:
    """Give the entry its name; a whole one that is there already stays, a damaged one is moved out of the way."""
    for attempt in itertools.count():
        try:
            built.rename(entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _open_entry(entry) is not None:
            return
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            entry.rename(built.with_name(f"damaged-{attempt}"))


def _write_entry(folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, content_hash: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    num_tokens = {"train": 0, "val": 0}
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        files = {"train": train, "val": val}
        for batch in _batches(documents):
            all_ids = tokenizer.encode_batch([document for _, document in batch])
            for (name, _), ids in zip(batch, all_ids, strict=True):
                files[name].write(np.concatenate(([tokenizer.bos_id], ids)).astype(dtype).tobytes())
                num_tokens[name] += len(ids) + 1
    text = tokenizer.to_json()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    meta = {
        "content_hash": content_hash,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": _hash(text),
        "dtype": dtype.str,
        "num_tokens": num_tokens,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of documents, each of ``_BATCH_CHARS`` or what its last document makes more."""
    batch: list[tuple[str, str]] = []
    size = 0
    for name, document in documents:
        batch.append((name, document))
        size += len(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
