"""What the solver knows of a network: a chain of nodes behind one function type.

The seam of the project is ``block(params_l, h, ctx_l, shared) -> (h', aux_l)``. A node is a layer, or a chunk of layers
fused into one. ``params`` and ``ctx`` hold what differs between nodes, ``shared`` is the same for all of them, ``aux``
is what a node leaves behind (keys and values, statistics). The trace h = (h_1 .. h_N) solves ``h_l = f_l(h_{l-1})``.

Weights come in one of two forms. A *stack* has leaves [W, ...], one row a layer; ``vmap`` and ``scan`` read it. A
*list* holds one tree a layer, which may differ in structure; loops over it are unrolled. ``rows`` says which row each
node reads. Rows may repeat: that is a looped model, and a sweep reads its weights once for all loops.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.collectives import Axis
from snlp_jax.solver.linear import layer, stack
from snlp_jax.types import is_list

PyTree = Any
BlockFn = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
SkipFn = Callable[[PyTree, PyTree, PyTree], jax.Array]


class BatchAxes(NamedTuple):
    """Trees, or prefixes of trees, with the batch axis of every leaf (None: it has none), as ``jax.vmap`` reads its
    ``in_axes``."""

    ctx: PyTree
    """Of one node's context."""
    shared: PyTree
    aux: int
    """Of all leaves that one node leaves behind."""


class LayerFns(NamedTuple):
    """The functions of one kind of node."""

    block: BlockFn
    """One node; differentiable in forward mode where a correction asks for that."""
    sweep: BlockFn | None = None
    """All nodes of a stack at once, every argument but the last leading with the node axis; equals ``vmap(block)``,
    which None stands for."""
    keep: BlockFn | None = None
    """As ``sweep``, where what nodes leave behind is wanted alone; its first result means nothing. None: ``sweep``."""
    skip: SkipFn | None = None
    """``(params_l, ctx_l, aux_l) -> a_l``, the derivative of a node's skip path: a scalar, or matrices [..., R, R] that
    mix residual streams. None means 1."""
    batch_axes: BatchAxes | None = None
    """Where the batch stands that every leaf of the state leads with; needed by microbatches, by a batch that is spread
    over devices, and by tolerances."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where the rows of a trace stand in the whole chain.

    Without ``index_L`` row i is node i. With it a row whose index lies outside 0 .. size - 1 passes its input on: it
    fills up the devices, or belongs to another region.
    """

    size: int = field(metadata={"static": True})
    """Nodes that count, on all devices."""
    index_L: jax.Array | None = None
    """int32 [n], of the (local) rows."""
    row_B: jax.Array | None = None
    """int32 [B], of the (local) rows of the batch, where it is spread over devices."""
    axis: Axis | None = None
    is_padded: bool = field(default=False, metadata={"static": True})
    """Whether any row, on any device, passes its input on."""

    def indices(self, num_rows: int) -> jax.Array:
        """int32 [num_rows]: the node that each row is."""
        return jnp.arange(num_rows) if self.index_L is None else self.index_L

    def is_padding(self) -> jax.Array | None:
        """bool [n]: whether a row passes its input on; None where none does."""
        if self.index_L is None or not self.is_padded:
            return None
        return (self.index_L < 0) | (self.index_L >= self.size)

    def batch_rows(self, num_rows: int) -> jax.Array:
        """int32 [num_rows]: rows of the whole batch."""
        return jnp.arange(num_rows) if self.row_B is None else self.row_B


class MethodData(NamedTuple):
    """Inputs of single methods, handed to those that ask for them."""

    fit: PyTree = None
    """A ``Calibration``, for calibrated corrections and initial traces."""
    warm_L: PyTree = None
    """A trace from elsewhere, for the ``Warm`` initial trace."""
    anchor: PyTree = None
    """The model's embedding x0, for the ``Preheat`` initial trace."""
    key: jax.Array | None = None
    """PRNG key of stochastic corrections; None means a fixed one."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """N nodes in a row and the state that enters the first.

    ``params`` leads with W rows (or is a list of W trees), ``ctx`` with N (or is a list of N trees, or None).
    ``h_in`` is any pytree without a node axis. On one device's share of a spread chain N is what that device holds.
    """

    fns: LayerFns = field(metadata={"static": True})
    params: PyTree
    ctx: PyTree
    shared: PyTree
    h_in: PyTree
    place: Place
    num_nodes: int = field(metadata={"static": True})
    rows: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    """Row of ``params`` that each node reads; None: node i reads row i."""

    @classmethod
    def of(
        cls,
        fns: LayerFns | BlockFn,
        params: PyTree,
        h_in: PyTree,
        *,
        ctx: PyTree = None,
        shared: PyTree = None,
        rows: tuple[int, ...] | None = None,
    ) -> "Chain":
        """A chain on one device, of the nodes that ``rows`` or else ``params`` says.

        Raises:
            ValueError: ``rows`` reads rows that ``params`` does not have, or ``ctx`` has another number of nodes.
        """
        fns = fns if isinstance(fns, LayerFns) else LayerFns(fns)
        width = len(params) if is_list(params) else jax.tree.leaves(params)[0].shape[0]
        num_nodes = width if rows is None else len(rows)
        if rows is not None and not (rows and min(rows) >= 0 and max(rows) < width):
            raise ValueError(f"rows {rows} must be some of the {width} rows of params, counted from 0.")
        lengths = {len(ctx)} if is_list(ctx) else {leaf.shape[0] for leaf in jax.tree.leaves(ctx)}
        if lengths - {num_nodes}:
            raise ValueError(f"ctx has {sorted(lengths)} nodes along its first axis, but the chain has {num_nodes}.")
        return cls(fns, params, ctx, shared, h_in, Place(num_nodes), num_nodes, rows)

    @property
    def is_list(self) -> bool:
        """Whether nodes are evaluated in an unrolled loop, and leave lists behind."""
        return is_list(self.params)

    @property
    def num_loops(self) -> int:
        """How often the rows are read as a whole, one time after another."""
        rows = self.rows or ()
        for period in range(1, len(rows)):
            if len(rows) % period == 0 and rows == rows[:period] * (len(rows) // period):
                return len(rows) // period
        return 1

    def stack(self) -> PyTree:
        """The rows of the stack that one loop reads, leaves [N / num_loops, ...]: a slice where they are consecutive,
        else a copy."""
        if self.rows is None:
            return self.params
        rows = self.rows[: self.num_nodes // self.num_loops]
        if rows != tuple(range(rows[0], rows[0] + len(rows))):
            return jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], self.params)
        return jax.tree.map(lambda leaf: leaf[rows[0] : rows[0] + len(rows)], self.params)

    def node(self, index: int) -> tuple[PyTree, PyTree]:
        """``(params_l, ctx_l)`` of one node."""
        row = index if self.rows is None else self.rows[index]
        params = self.params[row] if self.is_list else layer(self.params, row)
        return params, self.ctx[index] if is_list(self.ctx) else layer(self.ctx, index)

    def sweep(self, x_L: PyTree) -> tuple[PyTree, PyTree]:
        """All nodes at once at inputs ``x_L`` [N, ...]: ``(y_L, aux_L)``, outputs [N, ...] and what the nodes leave
        behind, leaves [N, ...] of a stack and a list of N trees of a list."""
        if self.is_list:
            block = jax.jit(self.fns.block)  # nodes that are alike are traced once; XLA inlines the calls
            pairs = [block(*self._arguments(index, x_L)) for index in range(self.num_nodes)]
            return self.pass_on(x_L, stack([y for y, _ in pairs])), [aux for _, aux in pairs]
        y_L, aux_L = self._batched(self.fns.sweep or jax.vmap(self.fns.block, in_axes=(0, 0, 0, None)), x_L)
        return self.pass_on(x_L, y_L), aux_L

    def left_behind(self, x_L: PyTree) -> PyTree:
        """What the nodes leave behind at inputs ``x_L`` alone, as :meth:`sweep` returns it."""
        if self.fns.keep is None:
            return self.sweep(x_L)[1]
        if not self.is_list:
            return self._batched(self.fns.keep, x_L)[1]
        kept = []
        for index in range(self.num_nodes):
            *alone, shared = self._arguments(index, x_L)
            params, x, ctx = jax.tree.map(lambda leaf: leaf[None], alone)
            kept.append(layer(self.fns.keep(params, x, ctx, shared)[1], 0))
        return kept

    def pass_on(self, x_L: PyTree, y_L: PyTree) -> PyTree:
        """The outputs y, and for rows that do not count their inputs x."""
        is_padding_L = self.place.is_padding()
        if is_padding_L is None:
            return y_L
        return jax.tree.map(lambda x, y: jnp.where(is_padding_L.reshape(-1, *(1,) * (y.ndim - 1)), x, y), x_L, y_L)

    def skips(self, aux_L: PyTree) -> jax.Array:
        """[N] scalars or [N, ..., R, R] matrices: the derivative of every node's skip path."""
        if self.fns.skip is None:
            return jnp.ones((self.num_nodes,))
        if self.is_list or self.num_loops > 1:
            skips = []
            for index in range(self.num_nodes):
                params, ctx = self.node(index)
                skips.append(self.fns.skip(params, ctx, aux_L[index] if self.is_list else layer(aux_L, index)))
            return jnp.stack(skips)
        return jax.vmap(self.fns.skip)(self.stack(), self.ctx, aux_L)

    def _batched(self, sweep: BlockFn, x_L: PyTree) -> tuple[PyTree, PyTree]:
        """``sweep`` over the stack; the loops of rows that repeat are a batch that reads the weights once."""
        loops = self.num_loops
        if loops == 1:
            return sweep(self.stack(), x_L, self.ctx, self.shared)
        split = lambda leaf: leaf.reshape(loops, -1, *leaf.shape[1:])  # noqa: E731
        join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        x_RL, ctx_RL = jax.tree.map(split, (x_L, self.ctx))
        return jax.tree.map(join, jax.vmap(sweep, in_axes=(None, 0, 0, None))(self.stack(), x_RL, ctx_RL, self.shared))

    def _arguments(self, index: int, x_L: PyTree) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        params, ctx = self.node(index)
        return params, layer(x_L, index), ctx, self.shared
