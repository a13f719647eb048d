"""Affine recurrences along depth: ``d_l = A_l d_{l-1} + r_l``, solved by ``jax.lax.associative_scan``.

A pair (A, r) composes as ``(A2, r2) . (A1, r1) = (A2 A1, A2 r1 + r2)``, which is associative, so all N layers are
solved in ceil(log2 N) combined steps. A family of surrogates is a small pytree: ``apply`` (A d), ``compose`` (A2 A1),
``damp`` ((1 - k) A) and ``identity_where`` (I for some layers). The identity has no leaves, so its scan is a plain
prefix sum.

Over a layer axis that is sharded with ``shard_map`` each device scans its own layers and exchanges one affine total in
one ``all_gather``; everything else is local.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

PyTree = Any


@dataclass(frozen=True)
class Axis:
    """The mesh axis over which layers are sharded, within ``shard_map``.

    Places are handed in and not asked for where they are needed: the TPU's compiler cannot tell them within a loop of a
    program that leaves another axis automatic (jax 0.10 to 0.12).
    """

    name: str
    index: jax.Array | None = None
    """This device's place on it, int32; None asks for it."""
    rows_name: str | None = None
    """Mesh axis over which the first axis of the state (a batch) is spread, if it is."""
    rows_index: jax.Array | None = None

    @property
    def size(self) -> int:
        return jax.lax.axis_size(self.name)

    @property
    def here(self) -> jax.Array:
        return jax.lax.axis_index(self.name) if self.index is None else self.index


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

    def identity_where(self, is_identity_L: jax.Array) -> "LinearMap":
        """I for the layers marked by the bool array [N], A for the others."""
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

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        return ScalarMap(is_identity_L.astype(jnp.float32))


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

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScalarMap(LinearMap):
    """A_l = a_l I."""

    a_L: jax.Array

    def apply(self, d: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _trailing(self.a_L, leaf.ndim).astype(leaf.dtype) * leaf, d)

    def compose(self, earlier: Self) -> Self:
        return type(self)(self.a_L * earlier.a_L)

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return ScalarMap((1.0 - amount) * self.a_L) if amount else self

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        return ScalarMap(jnp.where(is_identity_L, 1.0, self.a_L))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiagonalMap(LinearMap):
    """A_l = diag(a_l): a tree like the state whose leaves have its rank (axes of length 1 are shared)."""

    a_L: PyTree

    def apply(self, d: PyTree) -> PyTree:
        return jax.tree.map(lambda a, leaf: a.astype(leaf.dtype) * leaf, self.a_L, d)

    def compose(self, earlier: Self) -> Self:
        return type(self)(jax.tree.map(jnp.multiply, self.a_L, earlier.a_L))

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return DiagonalMap(jax.tree.map(lambda a: (1.0 - amount) * a, self.a_L)) if amount else self

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        one = lambda a: jnp.where(_trailing(is_identity_L, a.ndim), 1.0, a)  # noqa: E731
        return DiagonalMap(jax.tree.map(one, self.a_L))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixMap(LinearMap):
    """A_l mixes the last axis but one of the state, the R residual streams: ``(A d)_r = sum_s A_rs d_s``.

    Attributes:
        a_L: [N, ..., R, R] of the state's rank; axes of length 1 between are shared (static maps share all tokens).
    """

    a_L: jax.Array

    def apply(self, d: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: mix_streams(self.a_L, leaf), d)

    def compose(self, earlier: Self) -> Self:
        return type(self)(mix_streams(self.a_L, earlier.a_L))

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return MatrixMap((1.0 - amount) * self.a_L) if amount else self

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        eye = jnp.eye(self.a_L.shape[-1]).reshape((1,) * (self.a_L.ndim - 2) + self.a_L.shape[-2:])
        return MatrixMap(jnp.where(_trailing(is_identity_L, self.a_L.ndim), eye, self.a_L))


@dataclass(frozen=True, eq=False)
class Basis:
    """The bases U, V [D, r] that all layers share; compared by identity, lives within one trace."""

    u_DX: jax.Array
    v_DX: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedBasisMap(LinearMap):
    """A_l = c_l I + U M_l V^T on the last axis, with U and V common to all layers.

    Layer-wise low-rank maps add up their ranks when composed; with shared bases the family is closed:
    ``c = c2 c1``, ``M = c2 M1 + c1 M2 + M2 (V^T U) M1``.
    """

    c_L: jax.Array
    m_LXX: jax.Array
    basis: Basis = field(metadata={"static": True})

    def apply(self, d: PyTree) -> PyTree:
        def one(leaf: jax.Array) -> jax.Array:
            # One product a layer: [tokens, D] x [D, r] x [r, r] x [r, D], tokens flattened behind the layer axis (their
            # number is spelt out, since the scan also combines slices of no layers).
            num_tokens = math.prod(leaf.shape[self.c_L.ndim : -1])
            rows = leaf.reshape(*self.c_L.shape, num_tokens, leaf.shape[-1])
            low = (rows @ self.basis.v_DX) @ jnp.swapaxes(self.m_LXX, -1, -2) @ self.basis.u_DX.T
            return _trailing(self.c_L, leaf.ndim).astype(leaf.dtype) * leaf + low.reshape(leaf.shape).astype(leaf.dtype)

        return jax.tree.map(one, d)

    def compose(self, earlier: Self) -> Self:
        gram = self.basis.v_DX.T @ self.basis.u_DX
        c2, c1 = _trailing(self.c_L, self.m_LXX.ndim), _trailing(earlier.c_L, self.m_LXX.ndim)
        m_LXX = c2 * earlier.m_LXX + c1 * self.m_LXX + self.m_LXX @ gram @ earlier.m_LXX
        return type(self)(self.c_L * earlier.c_L, m_LXX, self.basis)

    def damp(self, amount: float, num_layers: int) -> LinearMap:
        return SharedBasisMap((1.0 - amount) * self.c_L, (1.0 - amount) * self.m_LXX, self.basis) if amount else self

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        c_L = jnp.where(is_identity_L, 1.0, self.c_L)
        return SharedBasisMap(c_L, jnp.where(_trailing(is_identity_L, 3), 0.0, self.m_LXX), self.basis)


def mix_streams(a: jax.Array, h: jax.Array) -> jax.Array:
    """``sum_s a[..., r, s] h[..., s, :]`` as R multiply-adds on the last axis: matrices of 4 x 4 are no work for a
    matrix unit, and a batched product of them would be made one token at a time."""
    terms = (a[..., :, s, None].astype(h.dtype) * h[..., s, None, :] for s in range(h.shape[-2]))
    return functools.reduce(jnp.add, terms)


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


def stack_rows(rows: Sequence[PyTree]) -> PyTree:
    """Trees of all layers as one whose leaves lead with the layer axis: with that of the layers which have them, where
    some have None in place of a sub-tree."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if jax.tree_util.all_leaves(present):
        return jnp.stack(present)
    children = lambda row: jax.tree.flatten(row, is_leaf=lambda node: node is not row)  # noqa: E731
    columns = zip(*(children(row)[0] for row in present), strict=True)
    return jax.tree.unflatten(children(present[0])[1], [stack_rows(column) for column in columns])


def shift(h_L: PyTree, entering: PyTree) -> PyTree:
    """Inputs of the layers from their outputs: ``x_1 = entering``, ``x_l = h_{l-1}``."""
    return jax.tree.map(lambda h, h_in: jnp.concatenate([h_in[None], h[:-1]]), h_L, entering)


def affine_scan(maps: LinearMap, r_L: PyTree) -> tuple[LinearMap, PyTree]:
    """Inclusive scan: the products A_l ... A_1 and the d_l for d_0 = 0, both leading with the layer axis."""

    def combine(early: tuple[LinearMap, PyTree], late: tuple[LinearMap, PyTree]) -> tuple[LinearMap, PyTree]:
        (early_map, early_r), (late_map, late_r) = early, late
        return late_map.compose(early_map), jax.tree.map(jnp.add, late_map.apply(early_r), late_r)

    return jax.lax.associative_scan(combine, (maps, r_L))


def correct(
    maps: LinearMap,
    y_L: PyTree,
    h_L: PyTree,
    entering: PyTree,
    axis: Axis | None = None,
    *,
    slopes: Mapping[int, Callable[[PyTree], PyTree]] | None = None,
    taps: tuple[int, ...] = (),
    packed: PyTree = (),
) -> Corrected:
    """One correction: ``d_l = A_l d_{l-1} + (y_l - h_l)``, ``h'_l = y_l + A_l d_{l-1}``.

    Exactness: where ``d_{l-1}`` is 0 the new state is the evaluation ``y_l`` bit for bit, for any A.

    Args:
        maps: A_l for each (local) layer.
        y_L: evaluations f_l(h_{l-1}).
        h_L: trace before the correction.
        entering: state that entered the first (local) layer in this evaluation.
        axis: mesh axis over which the layers are sharded, inside ``shard_map``. One all_gather of each device's
            affine total (A and d of its layers for a delta of 0 before them) and of its last corrected state.
        slopes: layer -> ``d -> A_l d`` in place of its map; not over devices. The scan ends there and begins anew.
        taps: layers of the whole region whose outputs every device wants; they travel in the same exchange.
        packed: anything small that the devices want to tell each other; it travels there too.
    """
    r_L = jax.tree.map(jnp.subtract, y_L, h_L)
    zero = jax.tree.map(jnp.zeros_like, entering)
    if slopes:
        assert axis is None or axis.size == 1, "layers that differ are not spread over devices"
        new_L = jax.tree.map(jnp.add, y_L, _moves(maps, r_L, slopes, zero))
    else:
        products, d_L = affine_scan(maps, r_L)
        new_L = jax.tree.map(jnp.add, y_L, maps.apply(shift(d_L, zero)))
    if axis is None or axis.size == 1:
        alone = jax.tree.map(lambda leaf: leaf[None], packed)
        return Corrected(new_L, entering, layer(new_L, -1), tuple(layer(new_L, tap) for tap in taps), alone)

    # With a delta d_in entering the device, output l is new_l + (A_l ... A_1) d_in.
    num_layers = jax.tree.leaves(h_L)[0].shape[0]
    mine = [layer((products, new_L), tap % num_layers) for tap in taps]
    totals = tell_all((layer(products, -1), layer(d_L, -1), layer(new_L, -1), mine, packed), axis)

    d_before, states_before = [zero], [entering]
    for device in range(axis.size):
        product, d_total, state, *_ = layer(totals, device)
        moved = product.apply(d_before[-1])
        states_before.append(jax.tree.map(jnp.add, state, moved))
        d_before.append(jax.tree.map(jnp.add, d_total, moved))
    d_in = _select(d_before[:-1], axis.here)
    # Device 0 keeps the region's input; the others take their neighbour's last state.
    new_entering = _select(states_before[:-1], axis.here)
    d_L = jax.tree.map(jnp.add, products.apply(_broadcast_layers(d_in, d_L)), d_L)
    new_L = jax.tree.map(jnp.add, y_L, maps.apply(shift(d_L, d_in)))
    tapped = []
    for tap, of_all in zip(taps, totals[3], strict=True):
        owner = tap // num_layers
        product, state = layer(of_all, owner)
        tapped.append(jax.tree.map(jnp.add, state, product.apply(d_before[owner])))
    return Corrected(new_L, new_entering, states_before[-1], tuple(tapped), totals[4])


def _moves(maps: LinearMap, r_L: PyTree, slopes: Mapping[int, Callable[[PyTree], PyTree]], d: PyTree) -> PyTree:
    """``A_l d_{l-1}`` of all layers for a delta d that enters the first: a scan of the maps for every run of layers
    between those that have slopes of their own."""
    num_layers = jax.tree.leaves(r_L)[0].shape[0]
    moves: list[PyTree] = []
    start = 0
    for index in (*sorted(slopes), num_layers):
        if start < index:
            run, its_maps = layer((r_L, maps), slice(start, index))
            first = jax.tree.map(jnp.add, layer(run, 0), layer(its_maps, 0).apply(d))
            run = jax.tree.map(lambda r, f: jnp.concatenate([f[None], r[1:]]), run, first)
            d_L = affine_scan(its_maps, run)[1]
            moves.append(its_maps.apply(shift(d_L, d)))
            d = layer(d_L, -1)
        if index < num_layers:
            move = slopes[index](d)
            moves.append(jax.tree.map(lambda leaf: leaf[None], move))
            d = jax.tree.map(jnp.add, layer(r_L, index), move)
        start = index + 1
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moves)


def pass_round(
    evaluate: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]], states_M: PyTree, axis: Axis
) -> tuple[PyTree, PyTree, PyTree]:
    """M states go through the devices of an axis one after another, like parts on a conveyor.

    Device i makes its output of state j in tick i + j, so M states take M + n - 1 ticks on n devices, and the state
    moves on M + n - 2 times (one collective-permute each). In the other ticks a device works on what nobody reads.

    Args:
        evaluate: ``(state, index) -> (state for the next device, anything to keep)``, of the local layers.
        states_M: leaves [M, ...], what enters the first device; the same on all.

    Returns:
        What entered this device, what left it and what it kept, leaves [M, ...].
    """
    here, num_devices = axis.here, axis.size
    num_states = jax.tree.leaves(states_M)[0].shape[0]
    neighbours = [(device, device + 1) for device in range(num_devices - 1)]

    def work(state: PyTree, tick: jax.Array | int) -> tuple[PyTree, PyTree]:
        new, kept = evaluate(state, jnp.clip(tick - here, 0, num_states - 1))
        return new, (state, new, kept)

    def move_and_work(state: PyTree, tick: jax.Array) -> tuple[PyTree, PyTree]:
        received = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis.name, neighbours), state)
        fresh = layer(states_M, jnp.minimum(tick, num_states - 1))
        return work(jax.tree.map(lambda new, old: jnp.where(here == 0, new, old), fresh, received), tick)

    state, first = work(layer(states_M, 0), 0)
    _, others = jax.lax.scan(move_and_work, state, jnp.arange(1, num_states + num_devices - 1))
    ticks = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, others)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, here, num_states), ticks)


def tell_all(mine: PyTree, axis: Axis) -> PyTree:
    """What every device of the axis has, leaves [devices, ...], in one all_gather.

    Filled up to a multiple of 128 numbers: of other sizes the TPU's compiler makes an all-reduce of all devices' parts.
    """
    flat, unravel = ravel_pytree(mine)
    told = jax.lax.all_gather(jnp.pad(flat, (0, -flat.size % 128)), axis.name)
    return jax.vmap(unravel)(told[:, : flat.size])


def tell_owned(owned: Sequence[tuple[int, PyTree]], axis: Axis) -> list[PyTree]:
    """Of pairs (device, tree) the tree as that device has it, on all devices, in one all_reduce."""
    mine = [jax.tree.map(lambda leaf: jnp.where(axis.here == owner, leaf, 0), tree) for owner, tree in owned]  # noqa: B023
    flat, unravel = ravel_pytree(mine)
    return unravel(jax.lax.psum(flat, axis.name))


def _trailing(a: jax.Array, ndim: int) -> jax.Array:
    """``a`` with axes of length 1 appended up to ``ndim``."""
    return a.reshape(a.shape + (1,) * (ndim - a.ndim))


def _select(candidates: list[PyTree], index: jax.Array) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[index], *candidates)


def _broadcast_layers(state: PyTree, like_L: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf[None], like.shape), state, like_L)
