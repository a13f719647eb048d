"""A corpus to memory-mapped tokens, kept in a cache.

    tokenizers/HASH.json       what was trained here
    tokens/HASH/               of one (corpus, tokenizer, split): tokenizer.json; for each shard 00000.train, 00000.val,
                               00000.digests and 00000.json; once all of them are there, meta.json

A corpus is known by names, sizes and times of its files: while they stay the same it is not read again. Shards are of
the corpus (``snlp_jax/data/corpus.py``), so that the tokens do not depend on who tokenizes. All files are written
aside and renamed. An entry without meta.json is one that was interrupted: the shards that it has are used by whoever
builds it again. Several processes may build the same entry at once, and share the work if they do.
"""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.corpus import Corpus, find_corpus, hash_of, val_limit
from snlp_jax.data.jobs import Job, finished, remove_leftovers, run_jobs
from snlp_jax.data.pipeline import ShardedTokens, Source, TokenData
from snlp_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer_json, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write, cache_folder

BPE_TRAIN_CHARS = 200_000_000
"""A longer corpus is thinned evenly to about this much before BPE is trained on it."""

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, InputError)
"""What reading a damaged file of the cache may raise."""
_logger = logging.getLogger(__name__)


def prepare_tokens(config: DataConfig) -> TokenData:
    """Tokenize the corpus, or each corpus of the mixture, or open what an earlier call left in the cache.

    Documents are held out by a hash of their content, whatever their order, so equal documents fall on the same side;
    a corpus so small that this leaves a side empty gives it one document. Memory is bounded for a corpus of any size.
    All corpora of a mixture share one tokenizer. Which processes tokenize does not change the tokens, and a call that
    was killed leaves its finished shards to the next.

    Raises:
      InputError: a bad corpus or tokenizer, fewer than two different documents, or a cache that cannot be written.
    """
    cache_dir = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else cache_folder()
    found, weights = find_tokenizer(config), list(config.sources.values())
    try:
        corpora = [find_corpus(replace(config, source=name, mixture=())) for name in config.sources]
        if found is None:
            trained = trained_tokenizer(config, corpora, weights, cache_dir / "tokenizers")
            found = f"file {hash_of(trained.to_json())}", trained
        entries = [tokenized(corpus, found[1], found[0], cache_dir / "tokens") for corpus in corpora]
    except OSError as error:
        raise InputError(
            f"the token cache {str(cache_dir)!r} cannot be written ({error.strerror or error}); "
            "make room there, or set data.cache_dir or XDG_CACHE_HOME to another folder."
        ) from error
    if len(entries) == 1:
        return entries[0]
    splits = ([getattr(entry, split) for entry in entries] for split in ("train", "val"))
    train, val = (sum(tokens[1:], start=tokens[0]) for tokens in splits)
    content_hash = hash_of([(entry.content_hash, weight) for entry, weight in zip(entries, weights, strict=True)])
    mixture = tuple(map(Source, config.sources, weights, entries))
    return replace(entries[0], train=train, val=val, content_hash=content_hash, mixture=mixture)


# -- Tokenizers --------------------------------------------------------------------------------------------------------


def find_tokenizer(config: DataConfig) -> tuple[str, Tokenizer] | None:
    """What tells the tokenizer from others, and the tokenizer; None if it must be trained.

    Raises:
      InputError: it cannot be read.
    """
    if config.tokenizer == "byte":
        return "byte", ByteTokenizer()
    if config.tokenizer == "bpe":
        return None
    path = Path(os.path.expanduser(config.tokenizer))
    if not path.is_file():
        raise InputError(
            f"data.tokenizer {config.tokenizer!r} is neither 'byte' nor 'bpe' nor the path of a tokenizer.json."
        )
    try:
        tokenizer = load_tokenizer_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"data.tokenizer {config.tokenizer!r}: {error}") from error
    # A run's copy is the tokenizer that it was copied from.
    return ("byte" if isinstance(tokenizer, ByteTokenizer) else f"file {hash_of(tokenizer.to_json())}"), tokenizer


def trained_tokenizer(
    config: DataConfig, corpora: Sequence[Corpus], weights: Sequence[float], folder: Path
) -> Tokenizer:
    """BPE of the training documents, or what an earlier call has left in ``folder``.

    Of a mixture every corpus gives at most its share, by weight, of ``BPE_TRAIN_CHARS``, thinned evenly: a document
    counts once, whatever the weight.
    """
    shares = list(zip((corpus.key for corpus in corpora), weights, strict=True))
    path = folder / f"{hash_of(config.bpe_vocab_size, config.val_fraction, BPE_TRAIN_CHARS, shares)}.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if hash_of(saved["tokenizer"]) != saved["hash"]:
            raise ValueError("it differs from what was written")
        return load_tokenizer_json(saved["tokenizer"])
    except FileNotFoundError:
        pass
    except _DAMAGE as error:
        _logger.warning("Tokenizer %s is damaged (%s); training it again.", path, error)
    _logger.info("Training a tokenizer of %d entries on %s, once.", config.bpe_vocab_size, ", ".join(config.sources))
    pairs = zip(corpora, weights, strict=True)
    texts = (corpus.training_documents(int(BPE_TRAIN_CHARS * weight)) for corpus, weight in pairs)
    trained = train_bpe(itertools.chain.from_iterable(texts), config.bpe_vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"tokenizer": trained.to_json(), "hash": hash_of(trained.to_json())}))
    remove_leftovers(folder)
    return trained


# -- Tokens ------------------------------------------------------------------------------------------------------------


def tokenized(corpus: Corpus, tokenizer: Tokenizer, tokenizer_key: str, folder: Path) -> TokenData:
    """The cache entry of a corpus, which is built, or built to its end, or mended, where it is not whole.

    Raises:
      InputError: a bad document; fewer than two different ones, which cannot be split; or the corpus has changed since
        it was looked at.
      OSError: the entry cannot be written.
    """
    path = folder / hash_of(corpus.key, tokenizer_key, corpus.config.val_fraction)
    data = _open(path)
    if data is None:
        _build(path, corpus, tokenizer)
        data = _open(path)
    if data is None:
        raise InputError(f"the tokens written to {str(path)!r} cannot be read back; check the disk.")
    return replace(data, mask_documents=corpus.config.mask_documents)


def _open(entry: Path) -> TokenData | None:
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
        return TokenData(load_tokenizer_json(text), splits["train"], splits["val"], meta["content_hash"])
    except _DAMAGE as error:
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
    records = run_jobs(jobs, config.num_workers)
    min_key, max_key = min(r["min_key"] for r in records), max(r["max_key"] for r in records)
    if max_key < 0:
        raise InputError(f"data.source {config.source!r} holds no text; give files that are not empty.")
    if (limit := val_limit(config, min_key, max_key)) != corpus.val_limit:  # a side without a document
        jobs = [job._replace(val_limit=limit) for job in jobs]
        records = run_jobs(jobs, config.num_workers)
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
