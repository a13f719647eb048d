"""Means and covariances of streams of pairs (x, y), without keeping a sample.

A batch is reduced to its count, its means and its sums of centred products; two such summaries merge by the formula of
Chan, Golub and LeVeque (1979), ``S = S_1 + S_2 + (n_1 n_2 / n) (m_2 - m_1)(m_2 - m_1)^T``, whose terms do not cancel
where a mean is large against the spread.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


class Moments(NamedTuple):
    """Summary of samples (x, y); a pytree of arrays, in float32 on a device or in float64 on the host.

    Axes between the samples and the last one are independent problems: x [S, ..., X] gives ``xx`` [..., X, X].
    """

    count: Array
    mean_x: Array
    mean_y: Array
    xx: Array
    """Sum over samples of (x - mean)(x - mean)^T."""
    yx: Array
    """The same of (y - mean)(x - mean)^T."""
    yy: Array | None = None
    """The same of (y - mean)(y - mean)^T, where it was asked for."""

    @classmethod
    def of(cls, x: Array, y: Array, *, with_yy: bool = False) -> Self:
        """Of one batch: jax arrays (inside jit) in their host precision, numpy arrays in float64."""
        if not isinstance(x, jax.Array):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        xp: Any = jnp if isinstance(x, jax.Array) else np
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x[None], y - mean_y[None]
        exact = {"precision": "highest"} if xp is jnp else {"optimize": True}
        products = lambda a, b: xp.einsum("s...i,s...j->...ij", a, b, **exact)  # noqa: E731
        count = xp.asarray(x.shape[0], mean_x.dtype)
        return cls(count, mean_x, mean_y, products(x, x), products(y, x), products(y, y) if with_yy else None)

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
        """``(C_xx, C_yx)`` divided by the count; without ``centred`` the raw second moments E[x x^T], E[y x^T]."""
        host = self.on_host()
        xx, yx = host.xx / host.count, host.yx / host.count
        if centred:
            return xx, yx
        return xx + _outer(host.mean_x, host.mean_x), yx + _outer(host.mean_y, host.mean_x)

    def moved(self, x: Array, y: Array) -> "Moments":
        """Of the samples (x_s + x, y_s + y): covariances do not change. In float64 on the host."""
        host = self.on_host()
        return host._replace(
            mean_x=host.mean_x + np.asarray(x, np.float64), mean_y=host.mean_y + np.asarray(y, np.float64)
        )

    def on_host(self) -> "Moments":
        """In float64."""
        return Moments(*(None if part is None else np.asarray(part, np.float64) for part in self))


def _outer(p: Array, q: Array) -> Array:
    return p[..., :, None] * q[..., None, :]
