"""Affine nodes among others: a correction that takes their own derivative and leaves the rest to another one.

Layers whose branches were both replaced by linear maps, or dropped, are affine in the state. Their derivative is exact
and costs as much as an evaluation, so no iteration need be spent on them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain
from snlp_jax.solver.corrections import Correction, Exact, Iteration, Wrapping, jvp_of
from snlp_jax.solver.linear import Corrected, add, affine_scan, corrected_alone, layer, shift, subtract
from snlp_jax.solver.maps import LinearMap

PyTree = Any


@dataclass(frozen=True)
class WithAffine(Wrapping):
    """``A_l = df_l/dh_{l-1}`` for the affine ``nodes``, and that of ``base`` for the others.

    Exactness: as many iterations as there are other nodes are exact for any base, and one more where the first node is
    affine. Cost: one JVP for each affine node, in order.

    Raises:
        ValueError: the nodes are spread over devices, each of which would count its own.
    """

    nodes: tuple[int, ...] = ()

    def __call__(
        self, chain: Chain, it: Iteration, state: PyTree = (), *, taps: tuple[int, ...] = (), packed: PyTree = ()
    ) -> Corrected:
        if chain.place.axis is not None and chain.place.axis.size > 1:
            raise ValueError("affine nodes cannot be told apart on several devices; keep the chain on one.")
        y_L = self.base.predict(chain, it, state)
        if y_L is not it.y_L:
            rows = jnp.asarray(self.nodes)
            y_L = jax.tree.map(lambda new, y: new.at[rows].set(y[rows]), y_L, it.y_L)
        maps, r_L = self.base.maps(chain, it, state), subtract(y_L, it.h_L)
        new_L = add(y_L, self._moves(chain, it, maps, r_L))
        return corrected_alone(new_L, it.entering, taps, packed)

    def apply(self, chain: Chain, it: Iteration, state: PyTree, v_L: PyTree, jv_L: PyTree) -> PyTree:
        rows = jnp.asarray(self.nodes)
        applied_L = self.base.apply(chain, it, state, v_L, jv_L)
        # Unique, or the scatter could not be transposed, as a power iteration does.
        put = lambda applied, jv: applied.at[rows].set(jv[rows], unique_indices=True)  # noqa: E731
        return jax.tree.map(put, applied_L, jv_L)

    def _moves(self, chain: Chain, it: Iteration, maps: LinearMap, r_L: PyTree) -> PyTree:
        """``A_l d_{l-1}`` of all nodes: a scan of the maps for every run of nodes between affine ones."""
        d = jax.tree.map(jnp.zeros_like, it.entering)
        moves: list[PyTree] = []
        start = 0
        for index in (*self.nodes, chain.num_nodes):
            if start < index:
                run, run_maps = layer((r_L, maps), slice(start, index))
                first = add(layer(run, 0), layer(run_maps, 0).apply(d))
                run = jax.tree.map(lambda r, f: jnp.concatenate([f[None], r[1:]]), run, first)
                d_L = affine_scan(run_maps, run)[1]
                moves.append(run_maps.apply(shift(d_L, d)))
                d = layer(d_L, -1)
            if index < chain.num_nodes:
                move = jvp_of(chain, *chain.node(index), layer(it.x_L, index), d)
                moves.append(jax.tree.map(lambda leaf: leaf[None], move))
                d = add(layer(r_L, index), move)
            start = index + 1
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moves)


def with_affine(correction: Correction, nodes: tuple[int, ...]) -> Correction:
    """``correction``, told which nodes are affine. ``Exact`` already takes every derivative: it is only not damped."""
    if not nodes or isinstance(correction, WithAffine):
        return correction
    if isinstance(correction, Exact):
        return dataclasses.replace(correction, undamped=nodes) if correction.damping else correction
    return WithAffine(0.0, correction, nodes)
