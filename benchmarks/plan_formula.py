"""What a forward pass over a mesh has to do, from shapes alone: the operations that a compiled program is held against.

With L layers, n devices on the layer axis, a region of N layers with K iterations (E of them more for its guess):

    region      K + E sweeps of ceil(N / n) layers' weights and cache, K + E all-gathers of n totals
    tensor      every layer's n-th part once, two all-reduces a layer
    ring        n ticks of L / n layers each, n - 1 moves of the state, one all-reduce of what comes out
    ends        the head's n-th part once, one all-reduce (embedding), one all-gather (logits)

A total is what enters and what leaves a device's layers: two states, and with the last one or the ring's all-reduce
goes the mid-layer state that the head reads. Weights and cache that a chip can keep
beside its memory from one sweep or tick to the next are read once.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.hlo import Op, Program
from benchmarks.plan_compile import Work
from snlp_jax.cache import plan_rings
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.parts import Weights
from snlp_jax.solver import ParallelSegment, SkippedSegment

KERNELS = {"tpu": (30, 62, 16), "gpu": (24, 26, 9), "cpu": (24, 26, 9)}
"""Kernels of a layer in order, of a sweep over a device's layers, and of the ends: about what compiled decode steps
have (docs/scaling.md)."""

TOTAL_MULTIPLE = 4 * 128
"""Totals are filled up to multiples of so many bytes (``snlp_jax/solver/linear.py``)."""


def expected(model: LanguageModel, weights: Weights, mesh: Mesh, work: Work, on_chip_bytes: float = 0) -> Program:
    """The operations of one device.

    Args:
        weights: shapes with shardings, see :func:`snlp_jax.layout.abstract_weights`.
        on_chip_bytes: what a chip can keep beside its memory.
    """
    return Program(tuple(_ops(model, weights, mesh, work, on_chip_bytes)))


def weight_bytes(weights: Weights) -> int:
    """Matrices and norms of the layers and the head on one device; embeddings are looked up, not read, unless they are
    the head too."""
    head = weights.embed_head["head"]
    table = () if "kernel" in head else weights.embed_head["embed"]["token"]
    return bytes_per_device(([part.blocks for part in weights.parts], head, table))


def _ops(model: LanguageModel, weights: Weights, mesh: Mesh, work: Work, on_chip_bytes: float) -> Iterator[Op]:
    config = model.config
    num_shards, num_parts = mesh.shape["layer"], mesh.shape["tensor"]
    B, T = math.ceil(work.batch_size / mesh.shape["data"]), work.num_tokens
    state = 4 * B * T * config.embed_dim
    streams = state * max(config.num_streams, 1)
    per_layer, per_sweep, at_ends = KERNELS[model.backend]
    is_decode = work.kind == "decode"
    plans = plan_rings(model, weights, work.context, T, mesh) if is_decode else (None,) * len(weights.segments)
    for part, plan in zip(weights.parts, plans, strict=True):
        segment, blocks, is_spread = part.segment, part.blocks, part.is_spread
        if isinstance(segment, SkippedSegment):
            continue
        rows = jax.tree.leaves(blocks)[0].shape[0]
        heads, width = _parts(blocks["attn"]["out"], 1), _parts(blocks["mlp"]["up"], 2)
        tapped = segment.start <= config.mid_layer < segment.stop
        local_rows = rows // num_shards if is_spread else rows
        num_slots = plan.num_slots * local_rows // rows if plan else 0
        cached = num_slots * config.num_kv_heads * config.head_dim
        size = bytes_per_device(blocks) + 2 * B * cached * jnp.dtype(model.dtype).itemsize // heads
        attention = 4.0 * B * T * (num_slots + local_rows * T) * config.num_heads * config.head_dim // heads
        flops = 2.0 * B * T * _matrix_entries(blocks) + attention
        if isinstance(segment, ParallelSegment):
            sweeps = segment.num_iters + segment.init.num_evals
            yield from _repeated("sweep", sweeps, flops, size, per_sweep, on_chip_bytes)
            if is_spread:
                for count, num_states in ((sweeps - 1, 2), (1, 2 + tapped)):
                    total = -(-num_states * streams // TOTAL_MULTIPLE) * TOTAL_MULTIPLE
                    yield Op("all-gather", count, payload=num_shards * total, group=num_shards)
            for parts in (heads, width):
                if parts > 1:
                    yield Op("all-reduce", sweeps, payload=local_rows * state, group=parts)
        elif is_spread:
            kept = on_chip_bytes if local_rows == 1 else 0  # several layers a device are a loop over slices
            yield from _repeated("tick", num_shards, flops, size, local_rows * per_layer, kept)
            yield Op("collective-permute", num_shards - 1, payload=streams, group=num_shards)
            yield Op("all-reduce", 1, payload=(1 + tapped) * streams, group=num_shards)
            for parts in (heads, width):
                if parts > 1:
                    yield Op("all-reduce", num_shards * local_rows, payload=state, group=parts)
        else:
            yield Op("layer", rows, flops / rows, size // rows, launches=per_layer)
            for parts in (heads, width):
                if parts > 1:
                    yield Op("all-reduce", rows, payload=state, group=parts)
    head = weights.embed_head["embed"]["token"] if config.use_tied_head else weights.embed_head["head"]["kernel"]
    vocabulary = _parts(head, 0 if config.use_tied_head else 1)
    yield Op("ends", 1, 2.0 * B * T * math.prod(head.shape) / vocabulary, bytes_per_device(head), launches=at_ends)
    if vocabulary > 1:
        num_embedded = T + (is_decode and config.use_smear)  # the token before, too
        size = B * num_embedded * config.embed_dim * jnp.dtype(model.dtype).itemsize
        yield Op("all-reduce", 1, payload=size, group=num_shards * num_parts)
        yield Op("all-gather", 1, payload=4 * B * T * config.padded_vocab_size, group=num_shards * num_parts)


def _repeated(kind: str, times: int, flops: float, size: int, launches: int, on_chip_bytes: float) -> Iterator[Op]:
    """``times`` passes over the same ``size`` bytes, of which the chip keeps what it can from the first one on."""
    kept = int(min(size, on_chip_bytes)) if times > 1 else 0
    if kept:
        yield Op("fetch", 1, bytes_read=kept, launches=0)
    yield Op(kind, times, flops, size - kept, launches=launches)


def _parts(leaf: Any, axis: int) -> int:
    """Parts into which an axis of a sharded shape is split."""
    return leaf.shape[axis] // leaf.sharding.shard_shape(leaf.shape)[axis]


def _matrix_entries(blocks: Any) -> int:
    """Entries of a device's matrices, that is of the leaves with two axes beside that of the layers."""
    leaves = [leaf for leaf in jax.tree.leaves(blocks) if leaf.ndim > 2]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
