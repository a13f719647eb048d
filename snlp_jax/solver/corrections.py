"""Corrections: cheap models of the layer Jacobians that carry an update down the depth.

One iteration evaluates ``y_l = f_l(h_{l-1})`` for all layers and then solves ``d_l = A_l d_{l-1} + (y_l - h_l)``,
``h'_l = y_l + A_l d_{l-1}`` with a surrogate A_l for df_l/dh_{l-1} (SNLP, arXiv 2605.17842, section 3). Whatever A
is, after k iterations the first k layers are exact.

A new correction is one frozen dataclass here and one row in ``tests/problems.py``.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.linear import Corrected, IdentityMap, LinearMap, ScalarMap, ZeroMap, correct, layer, shift
from snlp_jax.solver.problem import LayerProblem

PyTree = Any


@dataclass(frozen=True)
class Correction:
    """Base of all corrections. ``damping`` k in [0, 1] replaces A by (1 - k) A."""

    damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"damping {self.damping} lies outside 0 to 1.")

    def __call__(self, problem: LayerProblem, y_L: PyTree, h_L: PyTree, entering: PyTree) -> Corrected:
        """Correct the trace ``h_L`` after the evaluation ``y_L``; ``entering`` went into the first layer."""
        maps = self.surrogate(problem).damp(self.damping, problem.num_layers)
        return correct(maps, y_L, h_L, entering, problem.axis_name)

    def surrogate(self, problem: LayerProblem) -> LinearMap:
        """A_l for every layer of the problem."""
        raise NotImplementedError

    def serial_evals(self, num_layers: int) -> int:
        """Block evaluations that one correction itself puts on the critical path."""
        return 0

    @property
    def needs_forward_mode(self) -> bool:
        """Whether ``block_fn`` is differentiated in forward mode."""
        return False


@dataclass(frozen=True)
class Jacobi(Correction):
    """``A_l = 0``. Cost: none. Exact in one step on layers that ignore their input; the floor to beat."""

    def surrogate(self, problem: LayerProblem) -> LinearMap:
        return ZeroMap()


@dataclass(frozen=True)
class Identity(Correction):
    """IDN, ``A_l = I``. Cost: a prefix sum. Exact in one step on translations ``h -> h + c_l``."""

    def surrogate(self, problem: LayerProblem) -> LinearMap:
        return IdentityMap()


@dataclass(frozen=True)
class ScaledIdentity(Correction):
    """``A_l = s_l I`` with s_l the derivative of the skip path (``problem.residual_map``).

    Cost: a scan of scalars and states. Exact in one step on ``h -> s_l h + c_l``. The published code uses A = I even
    where the skip path is scaled.
    """

    def surrogate(self, problem: LayerProblem) -> LinearMap:
        return ScalarMap(problem.residual_scales())


@dataclass(frozen=True)
class Exact(Correction):
    """``A_l = df_l/dh_{l-1}`` by forward-mode differentiation and forward substitution: Newton's method, the oracle.

    Cost: N JVPs one after another. Exact in one step on any affine chain. Needs a ``block_fn`` with a forward-mode
    derivative (XLA attention) and all layers on one device.
    """

    def __call__(self, problem: LayerProblem, y_L: PyTree, h_L: PyTree, entering: PyTree) -> Corrected:
        if problem.axis_name is not None:
            raise ValueError("the Exact correction runs layer after layer and cannot be sharded over a layer axis.")

        def substitute(d: PyTree, row: tuple) -> tuple[PyTree, PyTree]:
            params, ctx, x, y, h = row
            _, slope = jax.jvp(lambda state: problem.block_fn(params, state, ctx, problem.shared)[0], (x,), (d,))
            new = jax.tree.map(lambda y, s: y + (1.0 - self.damping) * s, y, slope)
            return jax.tree.map(jnp.subtract, new, h), new

        x_L = shift(h_L, entering)
        d = jax.tree.map(jnp.zeros_like, entering)
        if problem.is_unrolled:
            news = []
            for index in range(problem.num_layers):
                d, new = substitute(d, (*problem.layer(index), *layer((x_L, y_L, h_L), index)))
                news.append(new)
            new_L = jax.tree.map(lambda *leaves: jnp.stack(leaves), *news)
        else:
            _, new_L = jax.lax.scan(substitute, d, (problem.params, problem.ctx, x_L, y_L, h_L))
        return Corrected(new_L, entering, layer(new_L, -1))

    def serial_evals(self, num_layers: int) -> int:
        return num_layers

    @property
    def needs_forward_mode(self) -> bool:
        return True
