"""Checksums of arrays that may be spread over devices and processes in any way."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MIX = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio, odd: spreads neighbouring positions over all 64 bits."""
_BLOCK = 1 << 16
"""Elements that are summed at once: their weights stay in the processor's cache."""


def described(state: Any) -> dict[str, list[Any]]:
    """Of a tree of arrays: path -> [dtype, shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def with_checksums(state: Any) -> dict[str, list[Any]]:
    """Of a tree of arrays: path -> [dtype, shape, checksum].

    A checksum is the sum over all elements of (bits times an odd weight of the position) modulo 2^64. Each process adds
    up what it holds, so all call this together; the result does not depend on who holds what. A single changed element
    always shows, since an odd weight is invertible.
    """
    sums = np.asarray([_local_checksum(leaf) for leaf in jax.tree.leaves(state)], np.uint64)
    if jax.process_count() > 1:  # as halves: jax would cut 64 bits
        sums = multihost_utils.process_allgather(sums.view(np.uint32)).view(np.uint64).sum(0)
    return {path: [*about, int(total)] for (path, about), total in zip(described(state).items(), sums, strict=True)}


def _local_checksum(leaf: Any) -> int:
    """The part of a leaf's checksum that this process answers for: of copies the first, of local arrays its own."""
    shape = np.shape(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        pieces = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        pieces = [((slice(None),) * len(shape), leaf)] if jax.process_index() == 0 else []
    return sum(checksum(np.asarray(data), index, shape) for index, data in pieces) % 2**64


def checksum(piece: np.ndarray, index: Sequence[slice], shape: Sequence[int]) -> int:
    """Of the piece that lies at ``index`` in an array of ``shape``. Cost: one pass over it, in blocks."""
    if not piece.size:
        return 0
    bits = np.ascontiguousarray(piece).reshape(-1, *piece.shape[-1:]).view(f"u{piece.dtype.itemsize}")
    places = [np.zeros(1, np.uint64)]  # of rows, then of columns
    for axis, (part, size) in enumerate(zip(index, shape, strict=True)):
        along = np.arange(size, dtype=np.uint64)[part] * np.uint64(math.prod(shape[axis + 1 :]))
        places = [places[0], along] if axis == len(shape) - 1 else [(places[0][:, None] + along).reshape(-1)]
    rows, columns = places[0], places[-1] if shape else places[0]
    step, total = max(1, _BLOCK // len(columns)), np.zeros(1, np.uint64)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        weights = (rows[block, None] + columns) * _MIX | np.uint64(1)
        total += (bits[block].astype(np.uint64) * weights).sum(dtype=np.uint64)
    return int(total[0])
