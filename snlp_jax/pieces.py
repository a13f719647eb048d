"""Functions of logits, computed in pieces over time: nothing holds the logits of a whole batch.

With a vocabulary of 262,144 those of 8 windows of 2,048 tokens are 17 GB. What is kept of them (a likelihood, a
divergence, the likeliest token) is a number a token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from snlp_jax.types import Array, Params, PyTree

PIECE_BYTES = 2**28
"""Most bytes of float32 logits that a device holds at once: 256 MiB."""

Read = Callable[..., PyTree]
"""``read(params, *trees)``: of parameters and of trees with leaves [B, t, ...], such as states, a tree like these."""


def piece_len(num_rows: int, num_tokens: int, vocab_size: int, mesh: Mesh | None = None) -> int:
    """Tokens of a row in a piece: all of them, or the least that cut them into as many pieces."""
    rows = num_rows if mesh is None else -(-num_rows // mesh.shape["data"])
    most = max(PIECE_BYTES // (4 * rows * vocab_size), 1)
    return -(-num_tokens // -(-num_tokens // most))


def over_time(read: Read, params: Params, *trees: PyTree, vocab_size: int, mesh: Mesh | None = None) -> PyTree:
    """``read(params, *trees)``, computed in pieces over time, one after another, where its logits are large.

    A gradient computes every piece anew. On a mesh each device takes its rows of a piece, and gradients by ``params``
    are summed over devices once.

    Args:
        read: gives for every token something that does not grow with the vocabulary, and depends on no other token.
        params: what ``read`` needs besides, such as the embedding and the head; whole along the mesh's ``data``.
        trees: leaves [B, T, ...].
    """
    num_rows, num_tokens = jax.tree.leaves(trees)[0].shape[:2]
    length = piece_len(num_rows, num_tokens, vocab_size, mesh)
    if length == num_tokens:
        return read(params, *trees)

    def in_turn(params: Params, trees: PyTree) -> PyTree:
        run = jax.checkpoint(lambda piece: read(params, *piece), prevent_cse=False)
        found = jax.lax.map(run, jax.tree.map(lambda leaf: _cut(leaf, length), trees))
        return jax.tree.map(lambda leaf: _join(leaf)[:, :num_tokens], found)

    if mesh is None or mesh.shape["data"] == 1:
        return in_turn(params, trees)
    alone = {name for name, size in mesh.shape.items() if size == 1}
    run = jax.shard_map(
        in_turn,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        axis_names={"data", *alone},
        check_vma=False,  # a loop's result is not tracked
    )
    return run(params, trees)


def _cut(leaf_BT: Array, length: int) -> Array:
    """[B, T, ...] -> [pieces, B, length, ...], filled up with the last token."""
    num_rows, num_tokens, *rest = leaf_BT.shape
    count = -(-num_tokens // length)
    widths = [(0, 0), (0, count * length - num_tokens), *((0, 0) for _ in rest)]
    return jnp.moveaxis(jnp.pad(leaf_BT, widths, mode="edge").reshape(num_rows, count, length, *rest), 1, 0)


def _join(pieces: Array) -> Array:
    """[pieces, B, length, ...] -> [B, pieces * length, ...]."""
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])
