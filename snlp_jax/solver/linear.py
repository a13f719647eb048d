"""Affine recurrences along depth: ``d_l = A_l d_{l-1} + r_l``, solved by ``jax.lax.associative_scan``.

A pair (A, r) composes as ``(A2, r2) . (A1, r1) = (A2 A1, A2 r1 + r2)``, which is associative, so all N layers are
solved in ceil(log2 N) combined steps. A family of surrogates is a small pytree with three methods: ``apply`` (A d),
``compose`` (A2 A1) and ``damp`` ((1 - k) A). The identity has no leaves, so its scan is a plain prefix sum.

Over a layer axis that is sharded with ``shard_map`` each device scans its own layers and exchanges one affine total in
one ``all_gather``; everything else is local.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

PyTree = Any


class LinearMap:
    """A linear map of the state for each layer (leaves lead with the layer axis), or for one layer (without it)."""

    def apply(self, d: PyTree) -> PyTree:
        """A d, leaf by leaf."""
        raise NotImplementedError

    def compose(self, earlier: Self) -> Self:
        """The map ``self . earlier``."""
        raise NotImplementedError

    def damp(self, amount: float, num_layers: int) -> "LinearMap":
        """(1 - amount) A, for ``num_layers`` layers."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ZeroMap(LinearMap):
    """A = 0."""

    def apply(self, d: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, d)

    def compose(self, earlier: Self) -> Self:
        return self

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IdentityMap(LinearMap):
    """A = I."""

    def apply(self, d: PyTree) -> PyTree:
        return d

    def compose(self, earlier: Self) -> Self:
        return self

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return ScalarMap(jnp.full((num_layers,), 1.0 - amount)) if amount else self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScalarMap(LinearMap):
    """A_l = a_l I."""

    a_L: jax.Array

    def apply(self, d: PyTree) -> PyTree:
        def scale(leaf: jax.Array) -> jax.Array:
            a = self.a_L.reshape(self.a_L.shape + (1,) * (leaf.ndim - self.a_L.ndim))
            return a.astype(leaf.dtype) * leaf

        return jax.tree.map(scale, d)

    def compose(self, earlier: Self) -> Self:
        return type(self)(self.a_L * earlier.a_L)

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return ScalarMap((1.0 - amount) * self.a_L) if amount else self


class Corrected(NamedTuple):
    """The new trace of the (local) layers and the two states at its ends."""

    h_L: PyTree
    entering: PyTree
    """State that enters the first (local) layer: the region's input on one device."""
    leaving: PyTree
    """Output of the region's last layer, on every device."""


def layer(tree: PyTree, index: int | slice) -> PyTree:
    """Index the leading (layer) axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def shift(h_L: PyTree, entering: PyTree) -> PyTree:
    """Inputs of the layers from their outputs: ``x_1 = entering``, ``x_l = h_{l-1}``."""
    return jax.tree.map(lambda h, h_in: jnp.concatenate([h_in[None], h[:-1]]), h_L, entering)


def affine_scan(maps: LinearMap, r_L: PyTree) -> tuple[LinearMap, PyTree]:
    """Inclusive scan: the products A_l ... A_1 and the d_l for d_0 = 0, both leading with the layer axis."""

    def combine(early: tuple[LinearMap, PyTree], late: tuple[LinearMap, PyTree]) -> tuple[LinearMap, PyTree]:
        (early_map, early_r), (late_map, late_r) = early, late
        return late_map.compose(early_map), jax.tree.map(jnp.add, late_map.apply(early_r), late_r)

    return jax.lax.associative_scan(combine, (maps, r_L))


def correct(maps: LinearMap, y_L: PyTree, h_L: PyTree, entering: PyTree, axis_name: str | None = None) -> Corrected:
    """One correction: ``d_l = A_l d_{l-1} + (y_l - h_l)``, ``h'_l = y_l + A_l d_{l-1}``.

    Exactness: where ``d_{l-1}`` is 0 the new state is the evaluation ``y_l`` bit for bit, for any A.

    Args:
        maps: A_l for each (local) layer.
        y_L: evaluations f_l(h_{l-1}).
        h_L: trace before the correction.
        entering: state that entered the first (local) layer in this evaluation.
        axis_name: mesh axis over which the layers are sharded, inside ``shard_map``. One all_gather of each device's
            affine total (A and d of its layers for a delta of 0 before them) and of its last corrected state.
    """
    r_L = jax.tree.map(jnp.subtract, y_L, h_L)
    products, d_L = affine_scan(maps, r_L)
    zero = jax.tree.map(jnp.zeros_like, entering)
    if axis_name is None:
        carried = maps.apply(shift(d_L, zero))
        new_L = jax.tree.map(jnp.add, y_L, carried)
        return Corrected(new_L, entering, layer(new_L, -1))

    last_carried = layer(maps.apply(shift(d_L, zero)), -1)
    last_state = jax.tree.map(jnp.add, layer(y_L, -1), last_carried)
    total, unravel = ravel_pytree((layer(products, -1), layer(d_L, -1), last_state))
    totals = jax.vmap(unravel)(jax.lax.all_gather(total, axis_name))

    d_before, states_before = [zero], [entering]
    for device in range(jax.lax.axis_size(axis_name)):
        product, d_total, state = layer(totals, device)
        moved = product.apply(d_before[-1])
        states_before.append(jax.tree.map(jnp.add, state, moved))
        d_before.append(jax.tree.map(jnp.add, d_total, moved))
    here = jax.lax.axis_index(axis_name)
    d_in = _select(d_before[:-1], here)
    # Device 0 keeps the region's input; the others take their neighbour's last state.
    new_entering = _select(states_before[:-1], here)
    d_L = jax.tree.map(jnp.add, products.apply(_broadcast_layers(d_in, d_L)), d_L)
    new_L = jax.tree.map(jnp.add, y_L, maps.apply(shift(d_L, d_in)))
    return Corrected(new_L, new_entering, states_before[-1])


def _select(candidates: list[PyTree], index: jax.Array) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[index], *candidates)


def _broadcast_layers(state: PyTree, like_L: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf[None], like.shape), state, like_L)
