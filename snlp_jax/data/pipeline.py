"""A corpus, or a mixture of several, to batches of windows of its tokens.

Tokens come from a cache that fills itself (``snlp_jax/data/shards.py``). Iterators count batches, so that what one
number of processes began another may continue.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from snlp_jax.config import DataConfig
from snlp_jax.data.shards import ShardedTokens, find_corpus, hash_of, tokenized, trained_tokenizer
from snlp_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer_json
from snlp_jax.errors import InputError

if TYPE_CHECKING:
    import grain

Tokens = np.ndarray | ShardedTokens
"""uint16, uint32 or int32 [number of tokens], read only."""


@dataclass(frozen=True)
class Source:
    """A corpus of a mixture."""

    name: str
    weight: float
    """Share of the windows; those of a mixture add up to 1."""
    train: Tokens
    val: Tokens


@dataclass(frozen=True)
class TokenData:
    """A tokenized corpus: documents one after another, ``tokenizer.bos_id`` before each."""

    tokenizer: Tokenizer
    train: Tokens
    """Of a mixture, those of all its corpora, one after another."""
    val: Tokens
    """The same for the documents held out."""
    content_hash: str
    """Of the corpus alone: equal for equal documents in equal order."""
    mask_documents: bool = field(default=False, kw_only=True)
    """Whether windows tell their documents apart."""
    mixture: tuple[Source, ...] = field(default=(), kw_only=True)
    """Empty where there is one corpus."""

    def windows(self, split: Literal["train", "val"], seq_len: int) -> "Windows":
        """Random access to the windows of a split; items have the fields of ``snlp_jax.types.Batch``, without rows."""
        bos_id = self.tokenizer.bos_id if self.mask_documents else None
        if not self.mixture:
            return WindowSource(getattr(self, split), seq_len, bos_id)
        sources = [WindowSource(getattr(source, split), seq_len, bos_id) for source in self.mixture]
        for source, windows in zip(self.mixture, sources, strict=True):
            if len(windows) == 0:
                raise InputError(
                    f"the {split} split of {source.name!r} has {len(getattr(source, split))} tokens, but a window of "
                    f"{seq_len} needs {seq_len + 1}; give it more text, or leave it out of data.mixture."
                )
        return MixedWindows(sources, [source.weight for source in self.mixture])


def prepare_tokens(config: DataConfig) -> TokenData:
    """Tokenize the corpus, or each corpus of the mixture, or open what an earlier call left in the cache.

    Documents are held out by a hash of their content, whatever their order, so equal documents fall on the same side;
    a corpus so small that this leaves a side empty gives it one document. Memory is bounded for a corpus of any size.
    All corpora of a mixture share one tokenizer. Which processes tokenize does not change the tokens, and a call that
    was killed leaves its finished shards to the next.

    Raises:
      InputError: a bad corpus or tokenizer, fewer than two different documents, or a cache that cannot be written.
    """
    cache_dir = _cache_dir(config)
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
            "make room there or set data.cache_dir to another folder."
        ) from error
    first, *others = entries
    hashes = [entry.content_hash for entry in entries]
    named = zip(config.sources, weights, entries, strict=True)
    mixture = tuple(Source(name, weight, entry.train, entry.val) for name, weight, entry in named)
    return TokenData(
        first.tokenizer,
        sum((entry.train for entry in others), start=first.train),
        sum((entry.val for entry in others), start=first.val),
        hash_of(list(zip(hashes, weights, strict=True))) if others else hashes[0],
        mask_documents=config.mask_documents,
        mixture=mixture if others else (),
    )


class Windows(Protocol):
    """Random access to windows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def num_windows(tokens: Tokens, seq_len: int) -> int:
    """Windows of ``seq_len`` inputs in tokens [n]: one more token is needed for the last target."""
    return max(0, (len(tokens) - 1) // seq_len)


class WindowSource:
    """Random access to windows: item i is ``{'tokens': int32 [seq_len + 1]}`` from token ``i * seq_len``.

    Inputs are ``tokens[:-1]`` and targets ``tokens[1:]``. Neighbouring windows share one token, so that every token
    after the first is a target once; what is left over at the end is not used.

    With ``bos_id``, the token before each document, there is ``'document': int32 [seq_len + 1]`` too: how many
    documents have begun in the window, the token's own included. The separator before a document belongs to it, and
    stays a target of the document before.
    """

    def __init__(self, tokens: Tokens, seq_len: int, bos_id: int | None = None) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._bos_id = bos_id

    def __len__(self) -> int:
        return num_windows(self._tokens, self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self._seq_len
        tokens = np.asarray(self._tokens[start : start + self._seq_len + 1], dtype=np.int32)
        if self._bos_id is None:
            return {"tokens": tokens}
        return {"tokens": tokens, "document": np.cumsum(tokens == self._bos_id, dtype=np.int32)}


class MixedWindows:
    """Windows of several sources, one source after another, of each as many as its weight says, spread evenly over it:
    the most windows in these proportions that use none twice, but at least one of each."""

    def __init__(self, sources: "list[WindowSource]", weights: list[float]) -> None:
        self.sources, self.weights = sources, weights
        total = min(len(source) / weight for source, weight in zip(sources, weights, strict=True))
        counts = [min(max(round(total * weight), 1), len(s)) for s, weight in zip(sources, weights, strict=True)]
        self._counts, self._ends = counts, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        source, count = self.sources[place], self._counts[place]
        return source[(int(index) - int(self._ends[place]) + count) * len(source) // count]


def train_iterator(
    data: TokenData, *, seq_len: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> "grain.DatasetIterator":
    """Endless batches ``{'tokens': int32 [batch_size // process_count, seq_len + 1]}`` of shuffled training windows,
    with what else a window has.

    Every epoch visits every window once in an order of its own. Batch j of all processes together holds the same
    windows for every number of processes: process p has rows p, p + process_count, ... The iterator's
    ``get_state`` counts batches, so that any number of processes may ``set_state`` what another number got. A mixture
    takes windows from its sources in turn, in the proportions of the weights, and each source has epochs of its own.

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
    source = data.windows("train", seq_len)
    sources, weights = (source.sources, source.weights) if isinstance(source, MixedWindows) else ([source], [1.0])
    if len(source) < batch_size and len(sources) == 1:
        raise InputError(
            f"the training split has {len(data.train)} tokens, which fill {len(source)} windows of {seq_len}, but a "
            f"batch takes {batch_size}; give a larger corpus, or lower train.batch_size or model.seq_len."
        )
    # Repeating before slicing keeps the processes in step when the windows cannot be divided evenly among them.
    parts = [
        grain.MapDataset.source(part).seed((seed + number) % 2**32).shuffle().repeat(None)
        for number, part in enumerate(sources)
    ]
    windows = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
    batches = windows[process_index::process_count].batch(batch_size // process_count, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def held_out_batches(
    data: TokenData, *, seq_len: int, batch_size: int, num_batches: int
) -> list[dict[str, np.ndarray]]:
    """At most ``num_batches`` batches of windows, like those of :func:`train_iterator`, spread evenly over the held-out
    tokens.

    A short split gives fewer batches, and one smaller batch if it has fewer than ``batch_size`` windows.

    Raises:
      InputError: the split holds no whole window.
    """
    source = data.windows("val", seq_len)
    if len(source) == 0:
        raise InputError(
            f"the held-out split has {len(data.val)} tokens, but a window of {seq_len} needs {seq_len + 1}; "
            "give a larger corpus, raise data.val_fraction or lower model.seq_len."
        )
    rows = min(batch_size, len(source))
    picked = rows * min(num_batches, len(source) // rows)
    windows = [source[i * len(source) // picked] for i in range(picked)]
    batches = [windows[start : start + rows] for start in range(0, picked, rows)]
    return [{name: np.stack([window[name] for window in batch]) for name in batch[0]} for batch in batches]


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snlp_jax"


def find_tokenizer(config: DataConfig) -> tuple[str, Tokenizer] | None:
    """What tells the tokenizer from others, and the tokenizer; None if it must be trained.

    Raises:
      InputError: it cannot be read.
    """
    if config.tokenizer == "byte":
        return "byte", ByteTokenizer()
    if config.tokenizer == "bpe":
        return None
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise InputError(
            f"data.tokenizer {config.tokenizer!r} is neither 'byte' nor 'bpe' nor the path of a tokenizer.json."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return f"file {hash_of(text)}", load_tokenizer_json(text)
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"data.tokenizer {config.tokenizer!r}: {error}") from error
