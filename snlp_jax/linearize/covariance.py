"""Means and covariances of streams of pairs (x, y), without keeping a sample.

A batch is reduced to its count, its means and its sums of centred products; two such summaries merge by the formula of
Chan, Golub and LeVeque (1979), ``S = S_1 + S_2 + (n_1 n_2 / n) (m_2 - m_1)(m_2 - m_1)^T``, whose terms do not cancel
where a mean is large against the spread.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.types import PyTree

Array = Any


class Moments(NamedTuple):
    """Summary of samples (x, y); a pytree of arrays, in float32 on a device or in float64 on the host.

    Axes between the samples and the last one are independent problems: x [S, ..., X] gives ``xx`` [..., X, X].
    """

    count: Array
    mean_x: Array
    """On a device a pair, whose sum float32 could not hold: the rounded mean, and the mean of what it is off."""
    mean_y: Array
    xx: Array
    """Sum over samples of (x - mean)(x - mean)^T."""
    yx: Array
    """The same of (y - mean)(x - mean)^T."""
    yy: Array | None = None
    """The same of (y - mean)(y - mean)^T, where it was asked for."""

    @classmethod
    def of(cls, x: Array, y: Array, *, with_yy: bool = False) -> "Moments":
        """Of one batch: jax arrays (inside jit) in their precision, numpy arrays on the host in float64."""
        xp: Any = jnp if isinstance(x, jax.Array) else np
        (x, mean_x), (y, mean_y) = _centred(x), _centred(y)
        products = lambda a, b: xp.einsum("s...i,s...j->...ij", a, b)  # noqa: E731
        with jax.default_matmul_precision("highest"):
            xx, yx, yy = products(x, x), products(y, x), products(y, y) if with_yy else None
        found = cls(xp.asarray(len(x), x.dtype), mean_x, mean_y, xx, yx, yy)
        return found if xp is jnp else found.on_host()

    def merge(self, other: "Moments") -> "Moments":
        """Of both streams, in float64 on the host. Associative and commutative up to rounding."""
        a, b = self.on_host(), other.on_host()
        count = a.count + b.count
        dx, dy, weight = b.mean_x - a.mean_x, b.mean_y - a.mean_y, a.count * b.count / count
        return Moments(
            count,
            a.mean_x + dx * (b.count / count),
            a.mean_y + dy * (b.count / count),
            a.xx + b.xx + weight * _outer(dx, dx),
            a.yx + b.yx + weight * _outer(dy, dx),
            None if a.yy is None or b.yy is None else a.yy + b.yy + weight * _outer(dy, dy),
        )

    def covariance(self, *, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """``(C_xx, C_yx)`` on the host; without ``centred`` the raw second moments E[x x^T], E[y x^T]."""
        xx, yx = self.xx / self.count, self.yx / self.count
        if centred:
            return xx, yx
        return xx + _outer(self.mean_x, self.mean_x), yx + _outer(self.mean_y, self.mean_x)

    def with_residual(self) -> "Moments":
        """Of (x, y + x), on the host."""
        assert self.yy is not None
        yy = self.yy + self.yx + self.yx.T + self.xx
        return self._replace(mean_y=self.mean_y + self.mean_x, yx=self.yx + self.xx, yy=yy)

    def on_host(self) -> "Moments":
        """In float64."""
        whole = lambda mean: np.add(*mean, dtype=np.float64) if isinstance(mean, tuple) else mean  # noqa: E731
        found = self._replace(mean_x=whole(self.mean_x), mean_y=whole(self.mean_y))
        return jax.tree.map(lambda part: np.asarray(part, np.float64), found)


def total(parts: Iterable[PyTree]) -> PyTree:
    """Equal trees of moments, each merged over all parts, in float64 on the host."""
    each = functools.partial(jax.tree.map, is_leaf=lambda node: isinstance(node, Moments))
    return each(Moments.on_host, functools.reduce(functools.partial(each, Moments.merge), parts))


def _centred(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """``x`` [S, ...] without its mean, which is a pair."""
    mean = x.mean(0)
    off = (x - mean[None]).mean(0)
    return x - mean[None] - off[None], (mean, off)


def _outer(p: Array, q: Array) -> Array:
    return p[..., :, None] * q[..., None, :]
