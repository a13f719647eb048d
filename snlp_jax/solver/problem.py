"""What the solver knows of a network: a chain of layers behind one function type.

The seam of the project is ``block_fn(params_l, h, ctx_l, shared) -> (h', aux_l)``. ``params`` and ``ctx`` lead with
the layer axis (or are lists with one entry a layer), ``shared`` is the same for all layers, ``aux`` is what a layer
leaves behind (keys and values, statistics). The trace h = (h_1 .. h_N) solves ``h_l = f_l(h_{l-1})``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp

from snlp_jax.solver.linear import layer

PyTree = Any
BlockFn = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class LayerProblem:
    """N layers in a row and the state that enters the first.

    Attributes:
        block_fn: one layer; must be differentiable in forward mode where ``Exact`` is used.
        params: leaves [N, ...], or a list of N trees (unrolled; what a CPU prefers for long sequences).
        ctx: leaves [N, ...], per-layer inputs that are not parameters.
        shared: inputs common to all layers.
        h_in: state entering the first layer; any pytree, no layer axis.
        num_layers: N (on one device's shard, where ``axis_name`` is set).
        sweep_fn: ``(params, x_L, ctx, shared) -> (y_L, aux_L)``, all layers at once; must equal ``vmap(block_fn)``.
        residual_map: ``(params_l, ctx_l) -> a_l``, the scalar derivative of the layer's skip path. None means 1.
        axis_name: mesh axis over which the layers are sharded, when the problem lives inside ``shard_map``.
    """

    block_fn: BlockFn
    params: PyTree
    ctx: PyTree
    shared: PyTree
    h_in: PyTree
    num_layers: int
    sweep_fn: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    residual_map: Callable[[PyTree, PyTree], jax.Array] | None = None
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if not self.is_unrolled:
            chex.assert_tree_shape_prefix((self.params, self.ctx), (self.num_layers,))

    @property
    def is_unrolled(self) -> bool:
        return isinstance(self.params, list)

    def layer(self, index: int) -> tuple[PyTree, PyTree]:
        """``(params_l, ctx_l)`` of one layer."""
        return self.params[index] if self.is_unrolled else layer(self.params, index), layer(self.ctx, index)

    def sweep(self, x_L: PyTree) -> tuple[PyTree, PyTree]:
        """Evaluate all layers at once at inputs ``x_L``: ``(y_L, aux_L)``, both leading with the layer axis."""
        if self.is_unrolled:
            outputs = [
                self.block_fn(*self._block_args(index, layer(x_L, index)), self.shared)
                for index in range(self.num_layers)
            ]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        if self.sweep_fn is not None:
            return self.sweep_fn(self.params, x_L, self.ctx, self.shared)
        return jax.vmap(self.block_fn, in_axes=(0, 0, 0, None))(self.params, x_L, self.ctx, self.shared)

    def residual_scales(self) -> jax.Array:
        """[N] scalars: the derivative of every layer's skip path."""
        if self.residual_map is None:
            return jnp.ones((self.num_layers,))
        if self.is_unrolled:
            return jnp.stack([self.residual_map(*self.layer(index)) for index in range(self.num_layers)])
        return jax.vmap(self.residual_map)(self.params, self.ctx)

    def _block_args(self, index: int, x: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        params, ctx = self.layer(index)
        return params, x, ctx
