"""Tokens of a corpus, or of a mixture of several, to batches of windows.

Iterators count batches, so that what one number of processes began another may continue.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError
from snlp_jax.seeds import folded

if TYPE_CHECKING:
    import grain

OPEN_SHARDS = 256
"""Files of a split that are mapped at a time: an open map takes a file descriptor."""


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


Tokens = np.ndarray | ShardedTokens
"""uint16, uint32 or int32 [number of tokens], read only."""


class Source(NamedTuple):
    """A corpus of a mixture."""

    name: str
    weight: float
    """Share of the windows; those of a mixture add up to 1."""
    data: "TokenData"


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
        if not self.mixture:
            special, masks = self.tokenizer.special, self.mask_documents
            prefix = special.prefix_ids if special.opens_windows else ()
            return WindowSource(getattr(self, split), seq_len, special.separator_id if masks else None, prefix)
        sources = [source.data.windows(split, seq_len) for source in self.mixture]
        for source, windows in zip(self.mixture, sources, strict=True):
            if len(windows) == 0:
                raise InputError(
                    f"the {split} split of {source.name!r} has {len(getattr(source.data, split))} tokens, but a window "
                    f"of {seq_len} needs {seq_len + 1}; give it more text, or leave it out of data.mixture."
                )
        return MixedWindows(sources, [source.weight for source in self.mixture])

    def all_held_out(self) -> "TokenData":
        """The same text with nothing to train on. Not for a mixture."""
        if isinstance(self.train, ShardedTokens) and isinstance(self.val, ShardedTokens):
            val: Tokens = self.train + self.val
        else:
            val = np.concatenate([self.train[:], self.val[:]])
        return replace(self, train=self.train[:0], val=val)


def in_parts(batches: Sequence[dict[str, np.ndarray]], num_rows: int) -> list[dict[str, np.ndarray]]:
    """The same rows in the same order, ``num_rows`` at a time, which divides those of every batch."""
    starts = range(0, len(next(iter(batches[0].values()))), num_rows)
    return [{name: leaf[i : i + num_rows] for name, leaf in batch.items()} for batch in batches for i in starts]


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

    With ``prefix_ids`` [P] each window begins with them, where its text does not do so by itself, and has so much less
    of the text. With one of them no token is lost: what was shared is then the first target.
    """

    def __init__(self, tokens: Tokens, seq_len: int, bos_id: int | None = None, prefix_ids: Sequence[int] = ()) -> None:
        self._tokens, self._seq_len, self._bos_id = tokens, seq_len, bos_id
        self._prefix_P = np.asarray(prefix_ids, np.int32)

    def __len__(self) -> int:
        return num_windows(self._tokens, self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        start, num_prefix = index * self._seq_len, len(self._prefix_P)
        tokens = np.asarray(self._tokens[start : start + self._seq_len + 1], dtype=np.int32)
        if not np.array_equal(tokens[:num_prefix], self._prefix_P):
            tokens = np.concatenate([self._prefix_P, tokens])[: self._seq_len + 1]
        if self._bos_id is None:
            return {"tokens": tokens}
        return {"tokens": tokens, "document": np.cumsum(tokens == self._bos_id, dtype=np.int32)}


class MixedWindows:
    """Windows of several sources, one source after another, of each as many as its weight says, spread evenly over it:
    the most windows in these proportions that use none twice, but at least one of each."""

    def __init__(self, sources: Sequence[Windows], weights: list[float]) -> None:
        self.sources, self.weights = sources, weights
        total = min(len(source) / weight for source, weight in zip(sources, weights, strict=True))
        counts = [min(max(round(total * weight), 1), len(s)) for s, weight in zip(sources, weights, strict=True)]
        self._counts, self._ends = counts, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        place = int(np.searchsorted(self._ends, index, side="right"))
        source, count = self.sources[place], self._counts[place]
        return source[(index - int(self._ends[place]) + count) * len(source) // count]


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
        grain.MapDataset.source(part).seed(folded(seed + number)).shuffle().repeat(None)
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
