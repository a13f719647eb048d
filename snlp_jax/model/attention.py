"""Causal attention with a left window: one function, three implementations; to a cache, two.

Key s is visible from query t iff ``t - window <= s <= t`` and, where documents are told apart, both belong to the same
one. Splash attention knows segments; cuDNN's would need the whole mask as a bias, so that XLA's takes its place there.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.model.layers import einsum
from snlp_jax.types import Array

Implementation = Literal["xla", "cudnn", "splash", "triton", "mosaic"]
"""The last two are the kernels of ``snlp_jax/model/decode_kernel.py``, for steps that follow on a cache."""


class Kernel(NamedTuple):
    """What computes attention; its scores z become ``softcap * tanh(z / softcap)`` where that is not 0."""

    name: Implementation = "xla"
    softcap: float = 0.0


XLA = Kernel()


class KeyValue(NamedTuple):
    """Keys (rotated, normed) and values (with value embeddings) of a layer's tokens."""

    key_BTKH: Array
    value_BTKH: Array


class Ring(NamedTuple):
    """Keys and values of a layer's last S tokens: position p lies in slot p mod S (``snlp_jax/cache.py``)."""

    key_BKSH: Array
    value_BKSH: Array


MAX_SCORES = 2**26
"""Largest score tensor, in elements, that the XLA path holds at once (256 MiB in float32)."""
MIN_BLOCK = 64
"""Fewest queries of a block, whatever the size of its scores."""
NEEDS = {
    "cudnn": "a GPU, bfloat16 and no model.attention_softcap",
    "splash": "a TPU, and lengths and head sizes that are multiples of 128",
}
"""Of kernels that are asked for by name."""
MAX_QUERIES = 16
"""Tokens up to which a step that follows on a cache is one of decoding."""


def choose_implementation(
    requested: str, *, backend: str, dtype: Any, seq_len: int, head_dim: int, softcap: float = 0.0
) -> Implementation:
    """Resolve ``auto`` and check an explicit choice.

    Raises:
        InputError: the requested kernel does not run on this backend or at this shape.
    """
    half_precision = jnp.dtype(dtype).itemsize == 2
    fits = {
        "xla": True,
        "cudnn": backend == "gpu" and half_precision and not softcap,
        "splash": backend == "tpu" and seq_len % 128 == 0 and head_dim % 128 == 0,
    }
    if requested == "auto":
        gains = fits["cudnn"] and seq_len > 1 and head_dim % 8 == 0 and head_dim <= 128
        return "cudnn" if gains else "splash" if fits["splash"] else "xla"
    if not fits[requested]:
        raise InputError(
            f"machine.attention {requested!r} needs {NEEDS[requested]}, not {jnp.dtype(dtype).name} on {backend!r} "
            f"with {seq_len} tokens, heads of {head_dim} and a softcap of {softcap}; use 'auto'."
        )
    return requested  # type: ignore[return-value]


def choose_decoding(requested: str, *, backend: str, num_tokens: int, head_dim: int) -> Implementation:
    """Of steps with ``num_tokens`` tokens that follow on a cache. ``pallas`` is for those of decoding: more than
    ``MAX_QUERIES`` tokens at once go through XLA's.

    Raises:
        InputError: the kernel does not run on this backend or at this head size.
    """
    if requested != "pallas":
        return "xla"
    if not (backend == "tpu" or (backend == "gpu" and head_dim in (16, 32, 64, 128, 256))):
        raise InputError(
            "machine.decode_attention 'pallas' needs a TPU, or a GPU and heads of 16, 32, 64, 128 or 256 channels, not "
            f"{backend!r} and {head_dim}; use 'auto'."
        )
    if num_tokens > MAX_QUERIES:
        return "xla"
    return "triton" if backend == "gpu" else "mosaic"


def attend(
    q_BTNH: Array, kv: KeyValue, window: int | Array, kernel: Kernel = XLA, document_BS: Array | None = None
) -> Array:
    """Attention output [B, T, N, H] in the dtype of the values; queries are the last T of the S positions.

    ``window`` may be a traced scalar on the XLA path only: the kernels compile it in. ``document_BS`` numbers the
    document of each position.
    """
    if _is_xla(kernel, document_BS):
        return _xla(q_BTNH, kv, window, document_BS, kernel.softcap)
    if not isinstance(window, int):
        raise TypeError(f"{kernel.name} attention needs a static window, not a traced one.")
    if kernel.name == "splash":
        return _splash(q_BTNH, kv, window, document_BS, kernel.softcap)
    if kernel.softcap or q_BTNH.shape[1] != kv.key_BTKH.shape[1]:
        raise ValueError("cudnn attention caps no scores, and counts positions from the first key; use XLA's.")
    return jax.nn.dot_product_attention(
        q_BTNH, *kv, is_causal=True, local_window_size=(window, 0), implementation="cudnn"
    )


def _is_xla(kernel: Kernel, document_BS: Array | None) -> bool:
    return kernel.name == "xla" or (kernel.name == "cudnn" and document_BS is not None)


def attend_any(
    q_BTNH: Array,
    kv: KeyValue,
    window: Array,
    windows: tuple[int, ...],
    kernel: Kernel = XLA,
    document_BS: Array | None = None,
) -> Array:
    """``attend`` with a traced window that is one of the static ``windows``: a kernel for each, chosen at run time."""
    if _is_xla(kernel, document_BS):
        return attend(q_BTNH, kv, window, kernel, document_BS)
    branches = [lambda q, kv, w=w: attend(q, kv, w, kernel, document_BS) for w in windows]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(windows), window), branches, q_BTNH, kv)


def attend_by_window(
    q_LBTNH: Array, kv_L: KeyValue, windows: Sequence[int], kernel: Kernel, document_BT: Array | None = None
) -> Array:
    """Attention of L layers at once, layer l with the static ``windows[l]``: one call for each distinct window, on
    activations gathered by window."""
    T = q_LBTNH.shape[2]
    # Windows that reach beyond the sequence are all alike.
    effective = [min(window, T - 1) for window in windows]
    outs: list[Array] = []
    order: list[int] = []
    for window in sorted(set(effective)):
        members = [i for i, w in enumerate(effective) if w == window]
        # Layers and batch become one axis; gather only where windows differ.
        rows = slice(None) if len(members) == len(windows) else np.asarray(members)
        q, kv = jax.tree.map(lambda x, rows=rows: x[rows].reshape(-1, *x.shape[2:]), (q_LBTNH, kv_L))
        document = None if document_BT is None else jnp.tile(document_BT, (len(members), 1))
        out = attend(q, kv, window, kernel, document)
        outs.append(out.reshape(len(members), -1, *out.shape[1:]))
        order += members
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs)[np.argsort(order)]


def _xla(q_BTNH: Array, kv: KeyValue, window: int | Array, document_BS: Array | None, softcap: float) -> Array:
    """Softmax in float32, in blocks of queries where the score tensor would pass ``MAX_SCORES`` elements."""
    num_queries, num_keys = q_BTNH.shape[1], kv.key_BTKH.shape[1]
    num_scores = q_BTNH.shape[0] * q_BTNH.shape[2] * num_queries * num_keys
    num_blocks = -(-num_scores // MAX_SCORES)
    block = max(-(-num_queries // num_blocks), min(MIN_BLOCK, num_queries))
    if block == num_queries:
        return _xla_block(q_BTNH, kv, window, num_keys - num_queries, document_BS, softcap)
    # Each block sees only the keys up to its last query; its scores are recomputed in the backward pass.
    outputs = []
    run_block = jax.checkpoint(_xla_block, static_argnums=(3, 5))
    for start in range(0, num_queries, block):
        q_block = q_BTNH[:, start : start + block]
        offset = num_keys - num_queries + start
        seen, document = jax.tree.map(lambda x, stop=offset + q_block.shape[1]: x[:, :stop], (kv, document_BS))
        outputs.append(run_block(q_block, seen, window, offset, document, softcap))
    return jnp.concatenate(outputs, axis=1)


def _xla_block(
    q_BTNH: Array, kv: KeyValue, window: int | Array, offset: int, document_BS: Array | None, softcap: float
) -> Array:
    """Attention of queries at positions ``offset`` and on to keys at positions 0 and on."""
    queries, keys = offset + jnp.arange(q_BTNH.shape[1]), jnp.arange(kv.key_BTKH.shape[1])
    piece = Piece(jnp.swapaxes(kv.key_BTKH, 1, 2), jnp.swapaxes(kv.value_BTKH, 1, 2), keys[None], document_BS)
    document_BT = None if document_BS is None else document_BS[:, offset : offset + q_BTNH.shape[1]]
    return attend_pieces(q_BTNH, queries[None], (piece,), window, document_BT, softcap)


class Piece(NamedTuple):
    """Some keys and values, heads before positions: a product with them then moves nothing about."""

    key_BKSH: Array
    value_BKSH: Array
    position_BS: Array
    """Below 0 for a slot that holds nothing. The first axis may be 1 where all rows are alike."""
    document_BS: Array | None = None
    """Number of the document of each token, where the queries have theirs."""


def attend_pieces(
    q_BTNH: Array,
    position_BT: Array,
    pieces: Sequence[Piece],
    window: int | Array,
    document_BT: Array | None = None,
    softcap: float = 0.0,
) -> Array:
    """Attention to keys and values that lie in several pieces, in any order, on the XLA path.

    Nothing of them is copied: scores are joined, keys and values are not.
    """
    B, T, N, H = q_BTNH.shape
    K, lengths = pieces[0].key_BKSH.shape[1], [piece.key_BKSH.shape[2] for piece in pieces]
    G, S = N // K, sum(lengths)
    # Heads before positions, and the G queries of a kv head along its positions: plain batched matrix products.
    q_BKXH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)
    join = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)  # noqa: E731
    scores_BKXS = join([einsum("BKXH,BKSH->BKXS", q_BKXH, piece.key_BKSH) * H**-0.5 for piece in pieces])
    if softcap:
        scores_BKXS = softcap * jnp.tanh(scores_BKXS / softcap)
    key_position_BS = join([piece.position_BS for piece in pieces])
    distance_BTS = position_BT[:, :, None] - key_position_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & (distance_BTS <= window) & (key_position_BS[:, None, :] >= 0)
    if document_BT is not None:
        visible_BTS &= document_BT[:, :, None] == join([piece.document_BS for piece in pieces])[:, None, :]
    masked = jnp.where(visible_BTS[:, None, None], scores_BKXS.reshape(B, K, G, T, S), -jnp.inf)
    dtype = pieces[0].value_BKSH.dtype
    weights_BKXS = jax.nn.softmax(masked, axis=-1).astype(dtype).reshape(B, K, G * T, S)
    weights = jnp.split(weights_BKXS, list(itertools.accumulate(lengths))[:-1], axis=-1)
    outs = (einsum("BKXS,BKSH->BKXH", w, piece.value_BKSH) for w, piece in zip(weights, pieces, strict=True))
    out_BKXH = functools.reduce(jnp.add, outs)
    return jnp.moveaxis(out_BKXH.reshape(B, K, G, T, H), 3, 1).reshape(B, T, N, H).astype(dtype)


def attend_ring(
    q_BTNH: Array, kv: KeyValue, ring: Ring, window: int | Array, length_B: Array, softcap: float = 0.0
) -> Array:
    """Attention [B, T, N, H] of T tokens that follow on ``length_B`` others, to these, which lie in a ring, and among
    themselves, on the XLA path; the two sets of keys are read where they lie."""
    position_BT = length_B[:, None] + jnp.arange(q_BTNH.shape[1])[None]
    earlier = Piece(ring.key_BKSH, ring.value_BKSH, slot_positions(length_B, ring.key_BKSH.shape[2]))
    now = Piece(jnp.swapaxes(kv.key_BTKH, 1, 2), jnp.swapaxes(kv.value_BTKH, 1, 2), position_BT)
    return attend_pieces(q_BTNH, position_BT, (earlier, now), window, softcap=softcap)


def slot_positions(length_B: Array, num_slots: int) -> Array:
    """[B, S] position of the token in each slot of a ring that holds the last of ``length_B`` tokens; below 0 where
    there is none. Position p lies in slot p mod S, so slot s holds the last position before the length with that
    remainder: what was written at positions from ``length_B`` on is taken for tokens that are S older."""
    last_B1 = length_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(num_slots)[None]) % num_slots


def _splash(q_BTNH: Array, kv: KeyValue, window: int, document_BS: Array | None, softcap: float) -> Array:
    """Pallas splash attention (TPU): heads before positions, scale folded into the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, N, H = q_BTNH.shape[1:]
    S = kv.key_BTKH.shape[1]
    mask = splash_attention_mask.LocalMask((T, S), window_size=(window, 0), offset=S - T)
    heads = splash_attention_mask.MultiHeadMask([mask] * N)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=heads, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap or None
    )
    segments = None
    if document_BS is not None:
        segments = splash_attention_kernel.SegmentIds(document_BS[:, S - T :], document_BS)
    out = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q_BTNH * H**-0.5, *kv)), segments)
    return jnp.swapaxes(out, 1, 2).astype(kv.value_BTKH.dtype)
