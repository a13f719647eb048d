"""Affine recurrences along depth: ``d_l = A_l d_{l-1} + r_l``, solved by ``jax.lax.associative_scan``.

A pair (A, r) composes as ``(A2, r2) . (A1, r1) = (A2 A1, A2 r1 + r2)``, which is associative, so all N layers are
solved in ceil(log2 N) combined steps. The maps A are those of ``maps.py``.

Over a layer axis that is spread with ``shard_map`` each device scans its own layers. The devices exchange one affine
total each in one ``all_gather``; everything else is local.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.collectives import Axis, all_gather_packed
from snlp_jax.solver.maps import LinearMap

PyTree = Any


class Corrected(NamedTuple):
    """The new trace of the (local) layers and what the exchange brought."""

    h_L: PyTree
    entering: PyTree
    """State that enters the first (local) layer: the region's input on one device."""
    leaving: PyTree
    """Output of the region's last layer, on every device."""
    tapped: tuple[PyTree, ...]
    """Outputs of the layers that were asked for, on every device."""
    packed: PyTree
    """What the devices sent along, leaves [devices, ...]."""


def layer(tree: PyTree, index: int | slice | jax.Array) -> PyTree:
    """Index the leading (layer) axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack(rows: Sequence[PyTree]) -> PyTree:
    """Trees of one structure as one whose leaves lead with the layer axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def add(a: PyTree, b: PyTree) -> PyTree:
    """``a + b``, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """``a - b``, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def shift(h_L: PyTree, entering: PyTree) -> PyTree:
    """Inputs of the layers from their outputs: ``x_1 = entering``, ``x_l = h_{l-1}``."""
    return jax.tree.map(lambda h, h_in: jnp.concatenate([h_in[None], h[:-1]]), h_L, entering)


def affine_scan(maps: LinearMap, r_L: PyTree) -> tuple[LinearMap, PyTree]:
    """Inclusive scan: the products A_l ... A_1 and the d_l for d_0 = 0, both leading with the layer axis."""

    def combine(early: tuple[LinearMap, PyTree], late: tuple[LinearMap, PyTree]) -> tuple[LinearMap, PyTree]:
        (early_map, early_r), (late_map, late_r) = early, late
        return late_map.compose(early_map), add(late_map.apply(early_r), late_r)

    return jax.lax.associative_scan(combine, (maps, r_L))


def correct(
    maps: LinearMap,
    y_L: PyTree,
    h_L: PyTree,
    entering: PyTree,
    axis: Axis | None = None,
    *,
    taps: tuple[int, ...] = (),
    packed: PyTree = (),
) -> Corrected:
    """One correction: ``d_l = A_l d_{l-1} + (y_l - h_l)``, ``h'_l = y_l + A_l d_{l-1}``.

    Exactness: where ``d_{l-1}`` is 0 the new state is the evaluation ``y_l`` bit for bit, for any A.

    Args:
        maps: A_l for each (local) layer.
        y_L: evaluations f_l(h_{l-1}), leaves [N, ...].
        h_L: trace before the correction, leaves [N, ...].
        entering: state that entered the first (local) layer in this evaluation.
        axis: mesh axis over which the layers are spread, inside ``shard_map``.
        taps: layers of the whole region whose outputs every device wants; they travel in the same exchange.
        packed: anything small that the devices want to tell each other; it travels there too.
    """
    zero = jax.tree.map(jnp.zeros_like, entering)
    products, d_L = affine_scan(maps, subtract(y_L, h_L))
    new_L = add(y_L, maps.apply(shift(d_L, zero)))
    if axis is None or axis.size == 1:
        return corrected_alone(new_L, entering, taps, packed)
    return _join_devices(maps, products, d_L, y_L, new_L, entering, axis, (taps, packed))


def corrected_alone(new_L: PyTree, entering: PyTree, taps: tuple[int, ...], packed: PyTree) -> Corrected:
    """What a correction on one device gives, from its new trace."""
    tapped = tuple(layer(new_L, tap) for tap in taps)
    return Corrected(new_L, entering, layer(new_L, -1), tapped, jax.tree.map(lambda leaf: leaf[None], packed))


def _join_devices(
    maps: LinearMap,
    products: LinearMap,
    d_L: PyTree,
    y_L: PyTree,
    new_L: PyTree,
    entering: PyTree,
    axis: Axis,
    along: tuple[tuple[int, ...], PyTree],
) -> Corrected:
    """The correction over all devices, from what each would make of a delta of 0 before its layers.

    With a delta d_in entering the device, output l is ``new_l + (A_l ... A_1) d_in``. One all_gather brings each
    device's total product and delta, its last state, its tapped states and what was packed (``along``).
    """
    taps, packed = along
    num_layers = jax.tree.leaves(y_L)[0].shape[0]
    tapped_rows = [layer((products, new_L), tap % num_layers) for tap in taps]
    totals = all_gather_packed((layer(products, -1), layer(d_L, -1), layer(new_L, -1), tapped_rows, packed), axis)
    d_before, states_before = [jax.tree.map(jnp.zeros_like, entering)], [entering]
    for device in range(axis.size):
        product, d_total, state, *_ = layer(totals, device)
        moved = product.apply(d_before[-1])
        states_before.append(add(state, moved))
        d_before.append(add(d_total, moved))
    d_in = _select(d_before[:-1], axis.index)
    # Device 0 keeps the region's input; the others take their neighbour's last state.
    new_entering = _select(states_before[:-1], axis.index)
    d_L = add(products.apply(_broadcast_layers(d_in, d_L)), d_L)
    new_L = add(y_L, maps.apply(shift(d_L, d_in)))
    tapped = []
    for tap, of_all in zip(taps, totals[3], strict=True):
        owner = tap // num_layers
        product, state = layer(of_all, owner)
        tapped.append(add(state, product.apply(d_before[owner])))
    return Corrected(new_L, new_entering, states_before[-1], tuple(tapped), totals[4])


def _select(candidates: list[PyTree], index: jax.Array) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[index], *candidates)


def _broadcast_layers(state: PyTree, like_L: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf[None], like.shape), state, like_L)
