"""What the solver knows of a network: a chain of layers behind one function type.

The seam of the project is ``block_fn(params_l, h, ctx_l, shared) -> (h', aux_l)``. ``params`` and ``ctx`` lead with
the layer axis (or are lists with one entry a layer), ``shared`` is the same for all layers, ``aux`` is what a layer
leaves behind (keys and values, statistics). Layers may differ: their parameters are then a list, or stacked by
structure, and what only some of them leave behind is stacked over those. The trace h = (h_1 .. h_N) solves
``h_l = f_l(h_{l-1})``.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from snlp_jax.solver.linear import Axis, layer, stack_rows
from snlp_jax.types import Groups

PyTree = Any
BlockFn = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
ResidualMap = Callable[[PyTree, PyTree, PyTree], jax.Array]


class Iteration(NamedTuple):
    """One evaluation of all (local) layers, which a correction turns into the next trace."""

    index: jax.Array | int  # type: ignore[assignment]  # not tuple.index
    """Counted from 0."""
    x_L: PyTree
    """Inputs of the layers."""
    y_L: PyTree
    """Outputs of the layers."""
    aux_L: PyTree
    """What the layers left behind."""
    h_L: PyTree
    """The trace before the correction."""
    entering: PyTree
    """State that entered the first layer."""


class BatchAxes(NamedTuple):
    """Trees, or prefixes of trees, with the batch axis of every leaf (None: it has none), as ``jax.vmap`` reads its
    ``in_axes``."""

    ctx: PyTree
    """Of one layer's context."""
    shared: PyTree
    aux: int
    """Of all leaves that one layer leaves behind."""


@dataclass(frozen=True)
class LayerProblem:
    """N layers in a row and the state that enters the first.

    Attributes:
        block_fn: one layer; must be differentiable in forward mode where a correction asks for that.
        params: leaves [N, ...], or a list of N trees (unrolled; what a CPU prefers for wide layers), or ``Groups``
            of layers whose trees differ.
        ctx: per-layer inputs that are not parameters: leaves [N, ...], or a list of N trees where params are one.
        shared: inputs common to all layers.
        h_in: state entering the first layer; any pytree, no layer axis.
        num_layers: N (on one device's shard, where ``axis`` is set).
        sweep_fn: ``(params, x_L, ctx, shared) -> (y_L, aux_L)``, all (local) layers at once; must equal
            ``vmap(block_fn)``. It takes ``Groups`` where params are such; without it they are evaluated one by one.
        residual_map: ``(params_l, ctx_l, aux_l) -> a_l``, the structured derivative of the layer's skip path: a scalar,
            or matrices [..., R, R] that mix residual streams. None means 1.
        warm_L: a trace from elsewhere, for the ``Warm`` initial trace.
        anchor: a state that the ``Preheat`` initial trace reads.
        calibration: what ``Calibrated`` surrogates and initial traces were fitted to, see ``solver/calibrated.py``.
        key: PRNG key of stochastic corrections; None means a fixed one.
        real: ``(first, stop)`` of the layers that count, of all layers of the sharded axis; the others pass their input
            on, since they fill up the devices or belong to another region. None means all.
        batch_axes: where the batch stands that every leaf of the state leads with; None where nothing asks for it:
            microbatches do, and a batch that is spread over devices.
        axis: mesh axis over which the layers are sharded, when the problem lives inside ``shard_map``.
        refresh_fn: as ``sweep_fn``, where what layers leave behind is wanted alone and an evaluation is more than that.
        evaluations: ``(ctx, shared)`` of every evaluation, that of the initial trace included, where they differ.
        affine: layers that are affine in their state. Every correction takes their own derivative for the surrogate:
            as many iterations as there are other layers are exact, and one more where the first layer is affine. They
            must be differentiable in forward mode, and cannot be sharded.
    """

    block_fn: BlockFn
    params: PyTree
    ctx: PyTree
    shared: PyTree
    h_in: PyTree
    num_layers: int
    sweep_fn: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    residual_map: ResidualMap | None = None
    warm_L: PyTree = None
    anchor: PyTree = None
    calibration: PyTree = None
    key: jax.Array | None = None
    real: tuple[int, int] | None = None
    batch_axes: BatchAxes | None = None
    axis: Axis | None = None
    refresh_fn: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    evaluations: tuple[tuple[PyTree, PyTree], ...] = ()
    affine: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.is_stack:
            chex.assert_tree_shape_prefix((self.params, self.ctx), (self.num_layers,))

    def at(self, evaluation: int) -> "LayerProblem":
        """The problem as its evaluation of that number, the initial trace's included, reads it."""
        if not self.evaluations:
            return self
        ctx, shared = self.evaluations[evaluation]
        return dataclasses.replace(self, ctx=ctx, shared=shared, evaluations=())

    @property
    def is_unrolled(self) -> bool:
        return isinstance(self.params, list)

    @property
    def is_stack(self) -> bool:
        """Whether the layers are alike and can be scanned."""
        return not isinstance(self.params, list | Groups)

    @property
    def traced_once(self) -> BlockFn:
        """``block_fn`` for unrolled loops: layers that are alike are traced once, and XLA inlines the calls."""
        return jax.jit(self.block_fn)

    def layer(self, index: int) -> tuple[PyTree, PyTree]:
        """``(params_l, ctx_l)`` of one layer."""

        def pick(tree: PyTree) -> PyTree:
            if isinstance(tree, Groups):
                return tree.layer(index)
            return tree[index] if isinstance(tree, list) else layer(tree, index)

        return pick(self.params), pick(self.ctx)

    @property
    def slopes(self) -> dict[int, Callable[[PyTree], PyTree]]:
        """Of every affine layer its derivative, as a function of a change of its state."""

        def slope(params: PyTree, ctx: PyTree, d: PyTree) -> PyTree:
            return jax.jvp(lambda h: self.block_fn(params, h, ctx, self.shared)[0], (d,), (d,))[1]

        return {index: functools.partial(slope, *self.layer(index)) for index in self.affine}

    def indices(self) -> jax.Array:
        """[N] positions of the (local) layers in the whole region, counted from its first layer that counts."""
        first = 0 if self.axis is None else self.num_layers * self.axis.here
        return first + jnp.arange(self.num_layers) - (self.real[0] if self.real else 0)

    def row_indices(self, num_rows: int) -> jax.Array:
        """[num_rows] positions of the (local) rows of a state in the whole batch."""
        place = None if self.axis is None else self.axis.rows_index
        return (0 if place is None else num_rows * place) + jnp.arange(num_rows)

    def is_padding(self) -> jax.Array | None:
        """[N] whether a layer passes its input on; None where none does."""
        if self.real is None:
            return None
        indices = self.indices()
        return (indices < 0) | (indices >= self.real[1] - self.real[0])

    def sweep(self, x_L: PyTree) -> tuple[PyTree, PyTree]:
        """Evaluate all layers at once at inputs ``x_L``: ``(y_L, aux_L)``, both leading with the layer axis."""
        if self.is_unrolled or (self.sweep_fn is None and not self.is_stack):
            block_fn = self.traced_once
            outputs = [
                block_fn(*self._block_args(index, layer(x_L, index)), self.shared) for index in range(self.num_layers)
            ]
            return stack_rows(outputs)
        sweep_fn = self.sweep_fn or jax.vmap(self.block_fn, in_axes=(0, 0, 0, None))
        y_L, aux_L = sweep_fn(self.params, x_L, self.ctx, self.shared)
        return self.pass_on(x_L, y_L), aux_L

    def pass_on(self, x_L: PyTree, y_L: PyTree) -> PyTree:
        """The evaluations y, and for layers that do not count their inputs x."""
        is_padding_L = self.is_padding()
        if is_padding_L is None:
            return y_L
        keep = lambda x, y: jnp.where(is_padding_L.reshape(-1, *(1,) * (y.ndim - 1)), x, y)  # noqa: E731
        return jax.tree.map(keep, x_L, y_L)

    def residuals(self, aux_L: PyTree) -> jax.Array:
        """[N] scalars or [N, ..., R, R] matrices: the derivative of every layer's skip path."""
        if self.residual_map is None:
            return jnp.ones((self.num_layers,))
        if self.is_stack:
            return jax.vmap(self.residual_map)(self.params, self.ctx, aux_L)
        # What only some layers leave behind is no layer's row, and no map of the skip path.
        is_whole = lambda leaf: leaf.shape[0] == self.num_layers  # noqa: E731
        common_L = jax.tree.map(lambda leaf: leaf if is_whole(leaf) else None, aux_L)
        if isinstance(self.params, list):
            rows = (self.residual_map(*self.layer(i), layer(common_L, i)) for i in range(self.num_layers))
            return jnp.stack(list(rows))
        of_groups = []
        for group, members in zip(self.params.groups, self.params.members, strict=True):
            its_ctx, its_aux = layer((self.ctx, common_L), jnp.asarray(members))
            of_groups.append(jax.vmap(self.residual_map)(group, its_ctx, its_aux))
        return jnp.concatenate(of_groups)[jnp.asarray(self.params.rows)]

    def refresh(self, x_L: PyTree) -> PyTree:
        """What the layers leave behind at inputs ``x_L``, where that is cheaper than an evaluation."""
        if self.refresh_fn is None:
            return self.sweep(x_L)[1]
        if not self.is_unrolled:
            return self.refresh_fn(self.params, x_L, self.ctx, self.shared)[1]
        rows = []
        for index in range(self.num_layers):
            params, x, ctx = jax.tree.map(lambda leaf: leaf[None], self._block_args(index, layer(x_L, index)))
            rows.append(layer(self.refresh_fn(params, x, ctx, self.shared)[1], 0))
        return stack_rows(rows)

    def _block_args(self, index: int, x: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        params, ctx = self.layer(index)
        return params, x, ctx
