"""Families of linear maps A_l of the state, one map for each layer.

Each family is a small pytree that is closed under composition: ``apply`` (A d), ``compose`` (A2 A1), ``damp``
((1 - k) A) and ``identity_where`` (I for some layers). The identity has no leaves, so its scan is a plain prefix sum.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

PyTree = Any
HIGHEST = jax.lax.Precision.HIGHEST
"""Of small float32 maps: the default would be TF32 on a GPU and bfloat16 on a TPU, and N composed maps multiply the
error."""


class LinearMap:
    """A linear map of the state for each layer (leaves lead with the layer axis), or for one layer (without it)."""

    def apply(self, d: PyTree) -> PyTree:
        """A d, leaf by leaf."""
        raise NotImplementedError

    def compose(self, earlier: Self) -> Self:
        """The map ``self . earlier``."""
        raise NotImplementedError

    def damp(self, amount: float, num_layers: int) -> "LinearMap":
        """(1 - amount) A, for ``num_layers`` layers: every family is linear in its leaves."""
        return jax.tree.map(lambda leaf: (1.0 - amount) * leaf, self) if amount else self

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
        return jax.tree.map(lambda leaf: trailing(self.a_L, leaf.ndim).astype(leaf.dtype) * leaf, d)

    def compose(self, earlier: Self) -> Self:
        return type(self)(self.a_L * earlier.a_L)

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

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        one = lambda a: jnp.where(trailing(is_identity_L, a.ndim), 1.0, a)  # noqa: E731
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

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        eye = jnp.eye(self.a_L.shape[-1]).reshape((1,) * (self.a_L.ndim - 2) + self.a_L.shape[-2:])
        return MatrixMap(jnp.where(trailing(is_identity_L, self.a_L.ndim), eye, self.a_L))


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
            low = matmul(matmul(rows, self.basis.v_DX), jnp.swapaxes(self.m_LXX, -1, -2))
            low = matmul(low, self.basis.u_DX.T)
            return trailing(self.c_L, leaf.ndim).astype(leaf.dtype) * leaf + low.reshape(leaf.shape).astype(leaf.dtype)

        return jax.tree.map(one, d)

    def compose(self, earlier: Self) -> Self:
        gram_XX = matmul(self.basis.v_DX.T, self.basis.u_DX)
        c2, c1 = trailing(self.c_L, self.m_LXX.ndim), trailing(earlier.c_L, self.m_LXX.ndim)
        m_LXX = c2 * earlier.m_LXX + c1 * self.m_LXX + matmul(matmul(self.m_LXX, gram_XX), earlier.m_LXX)
        return type(self)(self.c_L * earlier.c_L, m_LXX, self.basis)

    def identity_where(self, is_identity_L: jax.Array) -> LinearMap:
        c_L = jnp.where(is_identity_L, 1.0, self.c_L)
        return SharedBasisMap(c_L, jnp.where(trailing(is_identity_L, 3), 0.0, self.m_LXX), self.basis)


def mix_streams(a: jax.Array, h: jax.Array) -> jax.Array:
    """``sum_s a[..., r, s] h[..., s, :]`` as R multiply-adds on the last axis: matrices of 4 x 4 are no work for a
    matrix unit, and a batched product of them would be made one token at a time."""
    terms = (a[..., :, s, None].astype(h.dtype) * h[..., s, None, :] for s in range(h.shape[-2]))
    return functools.reduce(jnp.add, terms)


def trailing(a: jax.Array, ndim: int) -> jax.Array:
    """``a`` with axes of length 1 appended up to ``ndim``."""
    return a.reshape(a.shape + (1,) * (ndim - a.ndim))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in the precision of its operands, see ``HIGHEST``."""
    return jnp.matmul(a, b, precision=HIGHEST)
