"""A trust region: a correction that holds another one back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain
from snlp_jax.solver.collectives import pipeline
from snlp_jax.solver.corrections import Iteration, Wrapping
from snlp_jax.solver.linear import layer
from snlp_jax.solver.maps import DiagonalMap, IdentityMap, LinearMap, ScalarMap

PyTree = Any


@dataclass(frozen=True)
class TrustRegion(Wrapping):
    """The correction ``base``, of scalars or diagonals a_l, with g_l a_l in place of a_l.

    ``trust`` lambda >= 0 sets g_l, the gain of a scalar Kalman filter down the depth. The filter estimates what should
    be added to y_l from two sources: the chain's prediction ``a_l d_{l-1}``, whose variance ``P-_l = a_l^2 P_{l-1}``
    grows with every layer whose linearisation it rests on (unit variance each), and the evaluation's own answer 0, of
    variance 1 / lambda:

        g_l = 1 / (1 + lambda P-_l),  P_l = g_l P-_l + 1,  P_0 = 0.

    lambda = 0 trusts the chain (no change), lambda -> infinity is Jacobi. (Quasi-)ELK (Gonzalez et al., arXiv
    2407.19115) anchors the filter at the old trace h_l instead, which damps the residual as well and gives up that
    k iterations settle k layers; here they do, for any lambda. Cost: a scan of N scalars (elementwise for Diagonal),
    which over spread layers goes round the devices in every iteration.
    """

    trust: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.trust < float("inf"):
            raise ValueError(f"trust {self.trust} must be 0 or more.")

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        maps = self.base.maps(chain, it, state)
        if isinstance(maps, DiagonalMap):
            return DiagonalMap(jax.tree.map(lambda a_L: self._hold_back(chain, a_L), maps.a_L))
        if isinstance(maps, IdentityMap):
            return ScalarMap(self._hold_back(chain, jnp.ones((chain.num_nodes,))))
        if not isinstance(maps, ScalarMap):
            raise ValueError(f"a trust region holds scalars and diagonals back, not {type(self.base).__name__}.")
        return ScalarMap(self._hold_back(chain, maps.a_L))

    def _hold_back(self, chain: Chain, a_L: jax.Array) -> jax.Array:
        def step(variance: jax.Array, row: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
            a, is_padding = row
            predicted = jnp.square(a) * variance
            gain = 1.0 / (1.0 + self.trust * predicted)
            new = gain * predicted + 1.0
            return (new if is_padding is None else jnp.where(is_padding, variance, new)), gain * a

        scan = lambda variance, _: jax.lax.scan(step, variance, (a_L, chain.place.is_padding()))  # noqa: E731
        nothing = jnp.zeros_like(a_L[0])
        if chain.place.axis is None:
            return scan(nothing, 0)[1]
        return layer(pipeline(scan, nothing[None], chain.place.axis)[2], 0)
