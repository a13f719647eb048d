"""One node after another: the oracle, on one device or round the devices that share the nodes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import BatchAxes, Chain
from snlp_jax.solver.collectives import broadcast_from, pipeline
from snlp_jax.solver.linear import layer, stack
from snlp_jax.solver.solve import Solution

PyTree = Any


def sequential(
    chain: Chain,
    *,
    with_trace: bool = False,
    with_aux: bool = False,
    taps: tuple[int, ...] = (),
    num_microbatches: int = 1,
) -> Solution:
    """The oracle: one node after another (``lax.scan`` over a stack, unrolled over a list).

    Spread over n devices, weights stay where they are and the state goes round: n - 1 moves, and one all_reduce that
    tells all devices the value and the taps. With M microbatches (rows j, j + M, ... of the batch are the j-th, which
    keeps a batch that is spread itself in its place) device i is at work on one while its neighbours are at others:
    M + n - 2 moves of a state 1/M the size, and the work of (M + n - 1) / M passes in place of that of n.

    Args:
        taps: nodes whose outputs are wanted in ``Solution.tapped``.
        num_microbatches: M, of a pass over devices; divides the batch; needs ``fns.batch_axes``.

    Raises:
        ValueError: microbatches of a pass on one device, or that do not divide the batch.
    """
    if chain.place.axis is not None and not chain.is_list:
        return _round_devices(chain, with_trace, with_aux, taps, num_microbatches)
    if num_microbatches > 1:
        raise ValueError("microbatches are for a sequential pass over layers that devices share.")
    value, trace, aux, tapped = _one_by_one(chain, with_trace, with_aux, taps)
    return Solution(value, trace, aux, {}, tapped)


def _one_by_one(
    chain: Chain, with_trace: bool, with_aux: bool, taps: tuple[int, ...]
) -> tuple[PyTree, PyTree, PyTree, tuple[PyTree, ...]]:
    """Value, trace and aux of the (local) nodes, None for what is not wanted, and the outputs of the nodes ``taps``.

    Tapped states ride along in the loop's carry: no trace is kept for them.
    """

    def body(carry: tuple, row: tuple) -> tuple[tuple, tuple[PyTree, PyTree]]:
        (h, tapped), (index, params, ctx, is_padding) = carry, row
        new, aux = chain.fns.block(params, h, ctx, chain.shared)
        if is_padding is not None:
            new = jax.tree.map(lambda old, new: jnp.where(is_padding, old, new), h, new)
        pick = lambda tap, old: jax.tree.map(lambda n, o: jnp.where(index == tap, n, o), new, old)  # noqa: E731
        tapped = tuple(pick(tap, old) for tap, old in zip(taps, tapped, strict=True))
        return (new, tapped), (new if with_trace else None, aux if with_aux else None)

    if chain.is_list:
        return _unrolled(chain, with_trace, with_aux, taps)
    carry = (chain.h_in, tuple(jax.tree.map(jnp.zeros_like, chain.h_in) for _ in taps))
    index_L, loops = jnp.arange(chain.num_nodes), chain.num_loops
    if chain.rows is None:
        rows = (index_L, chain.params, chain.ctx, chain.place.is_padding())
        (value, tapped), (trace, aux) = jax.lax.scan(body, carry, rows)
    elif loops == 1:
        read = lambda carry, row: body(carry, (row[0], layer(chain.params, row[1]), row[2], None))  # noqa: E731
        (value, tapped), (trace, aux) = jax.lax.scan(read, carry, (index_L, jnp.asarray(chain.rows), chain.ctx))
    else:
        # A scan over loops of a scan over their rows: the gradient of the weights is added up once a loop.
        params = chain.stack()
        index_RL, ctx_RL = jax.tree.map(lambda leaf: leaf.reshape(loops, -1, *leaf.shape[1:]), (index_L, chain.ctx))
        one_loop = lambda carry, row: jax.lax.scan(body, carry, (row[0], params, row[1], None))  # noqa: E731
        (value, tapped), kept = jax.lax.scan(one_loop, carry, (index_RL, ctx_RL))
        trace, aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)
    return value, trace, aux, tapped


def _unrolled(
    chain: Chain, with_trace: bool, with_aux: bool, taps: tuple[int, ...]
) -> tuple[PyTree, PyTree, PyTree, tuple[PyTree, ...]]:
    """:func:`_one_by_one` over a list, whose aux is a list."""
    block = jax.jit(chain.fns.block)  # nodes that are alike are traced once; XLA inlines the calls
    h, states, kept = chain.h_in, [], []
    for index in range(chain.num_nodes):
        params, ctx = chain.node(index)
        h, aux = block(params, h, ctx, chain.shared)
        states.append(h)
        kept.append(aux)
    trace = stack(states) if with_trace else None
    return h, trace, kept if with_aux else None, tuple(states[tap] for tap in taps)


def _round_devices(
    chain: Chain, with_trace: bool, with_aux: bool, taps: tuple[int, ...], num_microbatches: int
) -> Solution:
    """:func:`sequential` over nodes that the devices of an axis share."""
    axis, num_nodes = chain.place.axis, chain.num_nodes
    assert axis is not None
    ctx_axes, shared_axes, aux_axis = chain.fns.batch_axes or BatchAxes(None, None, 0)
    M = num_microbatches
    local_taps = tuple(tap % num_nodes for tap in taps)

    def evaluate(h: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
        part = dataclasses.replace(chain, h_in=h)
        if M > 1:
            ctx, shared = _pick(chain.ctx, ctx_axes, index, 1, M), _pick(chain.shared, shared_axes, index, 0, M)
            part = dataclasses.replace(part, ctx=ctx, shared=shared)
        value, trace, aux, tapped = _one_by_one(part, with_trace, with_aux, local_taps)
        return value, (trace, aux, tapped)

    states_M = jax.tree.map(lambda leaf: _parts(leaf, 0, M), chain.h_in)
    _, value_M, (trace_M, aux_M, tapped_M) = pipeline(evaluate, states_M, axis)
    value, local_tapped = jax.tree.map(lambda leaf: _join(leaf, 0), (value_M, tapped_M))
    trace = jax.tree.map(lambda leaf: _join(leaf, 1), trace_M)
    aux = jax.tree.map(lambda leaf: _join(leaf, 1 + aux_axis), aux_M)
    owned = [(axis.size - 1, value)]
    owned += [(tap // num_nodes, state) for tap, state in zip(taps, local_tapped, strict=True)]
    value, *tapped = broadcast_from(owned, axis)
    return Solution(value, trace, aux, {}, tuple(tapped))


def _parts(leaf: jax.Array, axis: int, num_parts: int) -> jax.Array:
    """[.., B, ..] -> [M, .., B / M, ..]; microbatch j holds rows j, j + M, ..."""
    if num_parts == 1:
        return leaf[None]
    if leaf.shape[axis] % num_parts:
        raise ValueError(f"a batch of {leaf.shape[axis]} does not divide into {num_parts} microbatches.")
    shape = (*leaf.shape[:axis], leaf.shape[axis] // num_parts, num_parts, *leaf.shape[axis + 1 :])
    return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)


def _join(leaf_M: jax.Array, axis: int) -> jax.Array:
    """Inverse of :func:`_parts`."""
    if leaf_M.shape[0] == 1:
        return leaf_M[0]
    leaf = jnp.moveaxis(leaf_M, 0, axis + 1)
    return leaf.reshape(*leaf.shape[:axis], leaf.shape[axis] * leaf.shape[axis + 1], *leaf.shape[axis + 2 :])


def _pick(tree: PyTree, axes: PyTree, index: jax.Array, offset: int, num_parts: int) -> PyTree:
    """One microbatch of the leaves that have a batch axis (``offset`` counts a node axis before it)."""

    def one(axis: int | None, part: PyTree) -> PyTree:
        if axis is None:
            return part
        return jax.tree.map(lambda leaf: _parts(leaf, axis + offset, num_parts)[index], part)

    return jax.tree.map(one, axes, tree, is_leaf=lambda axis: axis is None)
