"""Attention of a decoding step to its cache, as one Pallas kernel: Triton on a GPU, Mosaic on a TPU.

A query at position ``length + t`` sees the step's own keys up to t and the ring's (``snlp_jax/cache.py``) within its
window. Blocks of keys are taken in one after another, with running maximum m, sum z and output o in float32:

    s = q k^T / sqrt(H);  m' = max(m, max s);  w = exp(s - m');  z' = e^(m - m') z + sum w;  o' = e^(m - m') o + w v

and ``o / z`` is the softmax's output. Those of the step come first: each query sees itself, so that m is finite from
then on. A slot's age, how many tokens before the last one its token is, tells what XLA's path reads off positions.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from snlp_jax.model.attention import KeyValue, Ring, attend_ring
from snlp_jax.types import Array

Target = Literal["triton", "mosaic"]

TRITON_BLOCK = 64
"""Keys that a GPU's program takes in at once."""
MIN_TILE = 16
"""Fewest rows of a product on a GPU's tensor cores."""
MOSAIC_BYTES = 2**21
"""Keys, and as many values, that a TPU's program takes in at once; the next are on their way meanwhile."""
LANES = 128


def attend_ring_at_once(
    q_BTNH: Array,
    kv: KeyValue,
    ring: Ring,
    window: int | Array,
    length_B: Array,
    target: Target,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """:func:`attend_ring` but for the order of sums, as one kernel; derivatives, to all but the ring, are XLA's.

    Keys and values of the ring are read once, in place, by all queries of their head. A ``vmap`` adds an axis to the
    grid, so that layers with windows of their own are one kernel too; a GPU's grid has room for two.
    """
    B, T, N, H = q_BTNH.shape
    K = kv.key_BTKH.shape[2]
    settings = _Settings(T, N // K, H**-0.5, softcap)
    run = functools.partial(_triton if target == "triton" else _mosaic, settings, interpret)

    @jax.custom_jvp
    def fused(q_BTNH: Array, kv: KeyValue, ring: Ring, window: Array, length_B: Array) -> Array:
        # One operand for all that is computed in this step: what computes it, or picks layers, is one kernel too.
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        rows = [jnp.swapaxes(x, 1, 2).reshape(B, K, -1, H) for x in (q_BTKGH, *kv)]
        numbers = (length_B.reshape(B, 1, 1), window.astype(jnp.int32).reshape(1, 1))
        out_BKXH = run(*numbers, jnp.concatenate(rows, axis=2), *ring)
        return jnp.swapaxes(out_BKXH.reshape(B, K, T, N // K, H), 1, 2).reshape(B, T, N, H)

    @fused.defjvp
    def _(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        _, _, ring, window, length_B = args
        plain = lambda q_BTNH, kv: attend_ring(q_BTNH, kv, ring, window, length_B, softcap)  # noqa: E731
        return fused(*args), jax.jvp(plain, args[:2], tangents[:2])[1]

    return fused(q_BTNH, kv, ring, jnp.asarray(window), length_B)


@dataclass(frozen=True)
class _Settings:
    num_tokens: int
    num_sharing: int
    """Query heads of a kv head, G; a head's rows of queries are (t, g), and below them lie its T keys and T values."""
    scale: float
    softcap: float

    @property
    def num_queries(self) -> int:
        """Of a kv head, X."""
        return self.num_tokens * self.num_sharing

    def token_of_row(self, shape: tuple[int, int]) -> Array:
        """t of every row, [X, S]; rows that fill up a tile are taken for the last token's."""
        row_XS = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.num_tokens == 1:
            return jnp.zeros_like(row_XS)
        return jnp.minimum(jax.lax.div(row_XS, self.num_sharing), self.num_tokens - 1)

    def sees_step(self, window: Array, num_rows: int, num_keys: int) -> Array:
        """[X, T] whether a query sees one of the step's keys."""
        token_XT = self.token_of_row((num_rows, num_keys))
        key_XT = jax.lax.broadcasted_iota(jnp.int32, token_XT.shape, 1)
        return (key_XT <= token_XT) & (token_XT - key_XT <= window)

    def sees_slot(
        self, length: Array, window: Array, num_slots: int, start: Array | int, num_rows: int, num_keys: int
    ) -> Array:
        """[X, S] whether a query sees the token in a slot of the ring, from slot ``start`` on."""
        token_XS = self.token_of_row((num_rows, num_keys))
        slot_XS = start + jax.lax.broadcasted_iota(jnp.int32, token_XS.shape, 1)
        newest = jax.lax.rem(jnp.maximum(length - 1, 0), num_slots)
        age_XS = newest - slot_XS + jnp.where(slot_XS > newest, num_slots, 0)
        return (slot_XS < num_slots) & (age_XS < length) & (token_XS + 1 + age_XS <= window)


class _Sums(NamedTuple):
    """Of the keys taken in so far: m, z and o."""

    most_X1: Array
    total_X1: Array
    out_XH: Array


def _start(num_rows: int, head_dim: int) -> _Sums:
    column = (num_rows, 1)
    return _Sums(jnp.full(column, -jnp.inf), jnp.zeros(column), jnp.zeros((num_rows, head_dim)))


def _take_in(settings: _Settings, sums: _Sums, q_XH: Array, key_SH: Array, value_SH: Array, sees_XS: Array) -> _Sums:
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores_XS = product(q_XH, key_SH, (((1,), (1,)), ((), ()))) * settings.scale
    if settings.softcap:
        scores_XS = settings.softcap * jnp.tanh(scores_XS / settings.softcap)
    scores_XS = jnp.where(sees_XS, scores_XS, -jnp.inf)
    most_X1 = jnp.maximum(sums.most_X1, scores_XS.max(axis=1, keepdims=True))
    kept_X1, weights_XS = jnp.exp(sums.most_X1 - most_X1), jnp.exp(scores_XS - most_X1)
    total_X1 = kept_X1 * sums.total_X1 + weights_XS.sum(axis=1, keepdims=True)
    added_XH = product(weights_XS.astype(value_SH.dtype), value_SH, (((1,), (0,)), ((), ())))
    return _Sums(most_X1, total_X1, kept_X1 * sums.out_XH + added_XH)


def _triton(settings: _Settings, interpret: bool, *args: Array) -> Array:
    """A program for every row and kv head. Shapes of blocks are powers of 2: what lies beyond is masked."""
    _, _, rows_BKZH, ring_BKSH, _ = args
    B, K, _, H = rows_BKZH.shape
    T, X, S = settings.num_tokens, settings.num_queries, ring_BKSH.shape[2]
    num_rows, num_step = (max(MIN_TILE, pl.next_power_of_2(size)) for size in (X, T))

    def kernel(length_ref, window_ref, rows_ref, key_ref, value_ref, out_ref):
        length, window = length_ref[0, 0], window_ref[0, 0]

        def load(ref: Any, start: Any, stop: int, size: int) -> Array:
            """``ref[start:stop]``, filled up with zeros to a power of 2."""
            inside = start + jnp.arange(size) < stop
            return triton.load(ref.at[pl.ds(start, size), :], mask=inside[:, None], other=0.0)

        q_XH = load(rows_ref, 0, X, num_rows)
        key_TH, value_TH = (load(rows_ref, first, first + T, num_step) for first in (X, X + T))
        sees_XT = settings.sees_step(window, num_rows, num_step)
        sums = _take_in(settings, _start(num_rows, H), q_XH, key_TH, value_TH, sees_XT)

        def one(index: Array, sums: _Sums) -> _Sums:
            start = index * TRITON_BLOCK
            key_SH, value_SH = (load(ref, start, S, TRITON_BLOCK) for ref in (key_ref, value_ref))
            sees_XS = settings.sees_slot(length, window, S, start, num_rows, TRITON_BLOCK)
            return _take_in(settings, sums, q_XH, key_SH, value_SH, sees_XS)

        sums = jax.lax.fori_loop(0, pl.cdiv(jnp.minimum(length, S), TRITON_BLOCK), one, sums)
        inside = jnp.arange(num_rows) < X
        triton.store(out_ref, (sums.out_XH / sums.total_X1).astype(out_ref.dtype), mask=inside[:, None])

    def head(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, H), lambda i: (jax.lax.div(i, K), jax.lax.rem(i, K), 0, 0))

    length = pl.BlockSpec((None, 1, 1), lambda i: (jax.lax.div(i, K), 0, 0))
    window = pl.BlockSpec((1, 1), lambda i: (0, 0))
    ring = head(pl.cdiv(S, TRITON_BLOCK) * TRITON_BLOCK)
    return pl.pallas_call(
        kernel,
        grid=(B * K,),  # one axis: with those that vmap adds there may be three
        in_specs=[length, window, head(max(num_rows, X + T + num_step)), ring, ring],
        out_specs=head(num_rows),
        out_shape=jax.ShapeDtypeStruct((B, K, X, H), ring_BKSH.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_ring",
    )(*args)


def _mosaic(settings: _Settings, interpret: bool, *args: Array) -> Array:
    """A step of the grid for every row and block of its ring, all kv heads at once; the sums stay on the chip."""
    from jax.experimental.pallas import tpu

    _, _, rows_BKZH, ring_BKSH, _ = args
    B, K, Z, H = rows_BKZH.shape
    T, X, S = settings.num_tokens, settings.num_queries, ring_BKSH.shape[2]
    slot_bytes = K * pl.cdiv(H, LANES) * LANES * ring_BKSH.dtype.itemsize
    block = min(S, max(LANES, MOSAIC_BYTES // slot_bytes // LANES * LANES))
    take_in = jax.vmap(functools.partial(_take_in, settings), in_axes=(0, 0, 0, 0, None))

    def kernel(length_ref, window_ref, rows_ref, key_ref, value_ref, out_ref, *sums_refs):
        index, length, window, q_KXH = pl.program_id(1), length_ref[0, 0], window_ref[0, 0], rows_ref[:, :X]

        def put(sums: _Sums) -> None:
            for ref, leaf in zip(sums_refs, sums, strict=True):
                ref[...] = leaf

        @pl.when(index == 0)
        def _() -> None:
            start = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (K, *leaf.shape)), _start(X, H))
            key_KTH, value_KTH = rows_ref[:, X : X + T], rows_ref[:, X + T :]
            put(take_in(start, q_KXH, key_KTH, value_KTH, settings.sees_step(window, X, T)))

        sees_XS = settings.sees_slot(length, window, S, index * block, X, block)
        slot_SH = index * block + jax.lax.broadcasted_iota(jnp.int32, (block, H), 0)
        value_KSH = jnp.where((slot_SH < S)[None], value_ref[...], 0)  # what lies beyond may be no number
        sums = take_in(_Sums(*(ref[...] for ref in sums_refs)), q_KXH, key_ref[...], value_KSH, sees_XS)
        put(sums)

        @pl.when(index == pl.num_programs(1) - 1)
        def _() -> None:
            out_ref[...] = (sums.out_XH / sums.total_X1).astype(out_ref.dtype)

    length = pl.BlockSpec((None, 1, 1), lambda b, i: (b, 0, 0), memory_space=tpu.SMEM)
    window = pl.BlockSpec((1, 1), lambda b, i: (0, 0), memory_space=tpu.SMEM)
    heads = lambda size: pl.BlockSpec((None, K, size, H), lambda b, i: (b, 0, 0, 0))  # noqa: E731
    ring = pl.BlockSpec((None, K, block, H), lambda b, i: (b, 0, i, 0))
    return pl.pallas_call(
        kernel,
        grid=(B, pl.cdiv(S, block)),
        in_specs=[length, window, heads(Z), ring, ring],
        out_specs=heads(X),
        out_shape=jax.ShapeDtypeStruct((B, K, X, H), ring_BKSH.dtype),
        scratch_shapes=[tpu.VMEM((K, X, size), jnp.float32) for size in (1, 1, H)],
        interpret=interpret,
        name="attend_ring",
    )(*args)
