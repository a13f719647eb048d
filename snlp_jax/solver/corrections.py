"""Corrections: cheap models of the layer Jacobians that carry an update down the depth.

One iteration evaluates ``y_l = f_l(h_{l-1})`` for all layers and then solves ``d_l = A_l d_{l-1} + (y_l - h_l)``,
``h'_l = y_l + A_l d_{l-1}`` with a surrogate A_l for df_l/dh_{l-1} (SNLP, arXiv 2605.17842, section 3). Whatever A
is, after k iterations the first k layers are exact.

A new correction is one frozen dataclass here and one row in ``tests/problems.py``. ``Calibrated`` stands in
``calibrated.py``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snlp_jax.solver.linear import (
    Corrected,
    DiagonalMap,
    IdentityMap,
    LinearMap,
    MatrixMap,
    ScalarMap,
    ZeroMap,
    correct,
    layer,
    pass_round,
    tell_all,
)
from snlp_jax.solver.problem import Iteration, LayerProblem

PyTree = Any


@dataclass(frozen=True)
class Correction:
    """Base of all corrections. ``damping`` k in [0, 1] replaces A by (1 - k) A."""

    damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"damping {self.damping} lies outside 0 to 1.")

    def __call__(
        self,
        problem: LayerProblem,
        iteration: Iteration,
        state: PyTree = (),
        *,
        taps: tuple[int, ...] = (),
        packed: PyTree = (),
    ) -> Corrected:
        """The next trace. ``taps`` and ``packed``: see :func:`snlp_jax.solver.linear.correct`."""
        maps = self.surrogate(problem, iteration, state).damp(self.damping, problem.num_layers)
        y_L, is_padding_L = self.predict(problem, iteration), problem.is_padding()
        if is_padding_L is not None:
            maps = maps.identity_where(is_padding_L)
        if problem.affine and y_L is not iteration.y_L:
            rows = jnp.asarray(problem.affine)
            y_L = jax.tree.map(lambda new, y: new.at[rows].set(y[rows]), y_L, iteration.y_L)
        told: dict[str, Any] = {"slopes": problem.slopes, "taps": taps, "packed": packed}
        return correct(maps, y_L, iteration.h_L, iteration.entering, problem.axis, **told)

    def start(self, problem: LayerProblem, x_L: PyTree) -> PyTree:
        """State that all iterations share, made once at the inputs of the first; () where there is none."""
        return ()

    def surrogate(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        """A_l for every layer of the problem."""
        raise NotImplementedError

    def predict(self, problem: LayerProblem, iteration: Iteration) -> PyTree:
        """The new outputs for an update of 0: the evaluations themselves."""
        return iteration.y_L

    def serial_evals(self, num_layers: int, num_iters: int) -> int:
        """Block evaluations that the corrections themselves put on the critical path."""
        return 0

    def extra_evals(self, num_layers: int, num_iters: int) -> int:
        """Block evaluations that the corrections cost, on the critical path or beside it (a JVP counted as one)."""
        return 0

    @property
    def needs_forward_mode(self) -> bool:
        """Whether ``block_fn`` is differentiated in forward mode."""
        return False


@dataclass(frozen=True)
class Jacobi(Correction):
    """``A_l = 0``. Cost: none. Exact in one step on layers that ignore their input; the floor to beat."""

    def surrogate(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        return ZeroMap()


@dataclass(frozen=True)
class Trusting(Correction):
    """Base of the scalar and diagonal corrections, which a trust region may hold back.

    ``trust`` lambda >= 0 replaces a_l by g_l a_l with the gain of a scalar Kalman filter down the depth. The filter
    estimates what should be added to y_l from two sources: the chain's prediction ``a_l d_{l-1}``, whose variance
    ``P-_l = a_l^2 P_{l-1}`` grows with every layer whose linearisation it rests on (unit variance each), and the
    evaluation's own answer 0, of variance 1 / lambda:

        g_l = 1 / (1 + lambda P-_l),  P_l = g_l P-_l + 1,  P_0 = 0.

    lambda = 0 trusts the chain (no change), lambda -> infinity is Jacobi. (Quasi-)ELK (Gonzalez et al., arXiv
    2407.19115) anchors the filter at the old trace h_l instead, which damps the residual as well and gives up that
    k iterations settle k layers; here they do, for any lambda. Cost: a scan of N scalars (elementwise for Diagonal),
    which over sharded layers goes round the devices in every iteration.
    """

    trust: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.trust < float("inf"):
            raise ValueError(f"trust {self.trust} must be 0 or more.")

    def surrogate(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        maps = self.slopes(problem, iteration, state)
        if not self.trust:
            return maps
        if isinstance(maps, DiagonalMap):
            return DiagonalMap(jax.tree.map(lambda a_L: self._hold_back(problem, a_L), maps.a_L))
        a_L = maps.a_L if isinstance(maps, ScalarMap) else jnp.ones((problem.num_layers,))
        return ScalarMap(self._hold_back(problem, a_L))

    def slopes(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        """A_l without the trust region: identity, scalars or diagonals."""
        raise NotImplementedError

    def _hold_back(self, problem: LayerProblem, a_L: jax.Array) -> jax.Array:
        def step(variance: jax.Array, row: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
            a, is_padding = row
            predicted = jnp.square(a) * variance
            gain = 1.0 / (1.0 + self.trust * predicted)
            new = gain * predicted + 1.0
            return (new if is_padding is None else jnp.where(is_padding, variance, new)), gain * a

        scan = lambda variance, _: jax.lax.scan(step, variance, (a_L, problem.is_padding()))  # noqa: E731
        nothing = jnp.zeros_like(a_L[0])
        if problem.axis is None:
            return scan(nothing, 0)[1]
        return layer(pass_round(scan, nothing[None], problem.axis)[2], 0)


@dataclass(frozen=True)
class Identity(Trusting):
    """IDN, ``A_l = I``. Cost: a prefix sum. Exact in one step on translations ``h -> h + c_l``."""

    def slopes(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        return IdentityMap()


@dataclass(frozen=True)
class ScaledIdentity(Trusting):
    """``A_l = s_l I`` with s_l the derivative of the skip path (``problem.residual_map``).

    Cost: a scan of scalars and states. Exact in one step on ``h -> s_l h + c_l``. The published code uses A = I even
    where the skip path is scaled.
    """

    def slopes(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        residuals = problem.residuals(iteration.aux_L)
        if residuals.ndim > 1:
            raise ValueError("ScaledIdentity needs a scalar skip path; for one that mixes streams use HyperConnection.")
        return ScalarMap(residuals)


@dataclass(frozen=True)
class HyperConnection(Correction):
    """HCN, ``A_l = H_l``: the R x R matrices with which a layer's skip path mixes its residual streams.

    They come from ``problem.residual_map``: one matrix a layer (static maps), or one a token (dynamic maps, whose own
    derivative is neglected). Cost: a scan of R x R matrices and states. Exact in one step on ``h -> H_l h + c_l``,
    where H_l acts on the last axis but one of the state.
    """

    def surrogate(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        residuals = problem.residuals(iteration.aux_L)
        if residuals.ndim < 3:
            raise ValueError("HyperConnection needs a skip path that mixes streams; for a scalar use ScaledIdentity.")
        ndim = jax.tree.leaves(iteration.h_L)[0].ndim
        shared_axes = (1,) * (ndim - residuals.ndim)
        return MatrixMap(residuals.reshape(residuals.shape[0], *shared_axes, *residuals.shape[1:]))


@dataclass(frozen=True)
class Diagonal(Trusting):
    """``A_l = diag(df_l/dh_{l-1})``, estimated by Hutchinson's ``mean over probes of z * (J z)``, z = +-1.

    Exact in one step on ``h -> a_l * h + c_l`` (elementwise, |a| <= 2; one probe suffices, since z * (a * z) = a). On
    other layers an entry carries the noise of its row's off-diagonal entries.

    Cost for each probe: one evaluation for ``jvp`` and ``finite_difference``, beside the iteration's own, two for
    ``vjp`` (which uses J^T, of the same diagonal, and works with attention kernels that have no forward mode); a scan
    of states.

    Attributes:
        num_probes: vectors z.
        mode: how J z is made.
        step: of the finite difference ``(f(h + step z) - f(h)) / step``.
        limit: entries are clipped to plus and minus this, as published: a probe's noise must not blow up.
        stride: of the region only layers 0, stride, 2 stride ... are estimated, the others keep A = I (published for
            training; the products are still made for all).
        reuse: estimate once, at the first iteration's inputs, for all iterations.
        detach: the estimate is a constant to reverse-mode differentiation (published for training: no second
            derivatives).
        seed: of z where the problem has no key. z depends on the key, the iteration and the layer alone: the same
            key gives the same result, on any number of devices.
    """

    num_probes: int = 1
    mode: Literal["jvp", "vjp", "finite_difference"] = "jvp"
    step: float = 1e-2
    limit: float = 2.0
    stride: int = 1
    reuse: bool = False
    detach: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_probes < 1:
            raise ValueError(f"probes={self.num_probes}: the Diagonal correction needs at least one probe.")
        if self.mode not in ("jvp", "vjp", "finite_difference"):
            raise ValueError(f"mode {self.mode!r} is not one of jvp, vjp, finite_difference.")
        if not self.step > 0 or not self.limit > 0 or self.stride < 1:
            raise ValueError(f"step {self.step}, limit {self.limit} and stride {self.stride} must be positive.")

    def start(self, problem: LayerProblem, x_L: PyTree) -> PyTree:
        return self._estimate(problem, 0, x_L, problem.sweep(x_L)[0]) if self.reuse else ()

    def slopes(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        if self.reuse:
            return state
        return self._estimate(problem, iteration.index, iteration.x_L, iteration.y_L)

    def probe(self, problem: LayerProblem, index: jax.Array | int, number: int, like_L: PyTree) -> PyTree:
        """z of one probe for all layers, a tree like ``like_L`` of +-1."""
        key = jax.random.key(self.seed) if problem.key is None else problem.key
        key = jax.random.fold_in(jax.random.fold_in(key, index), number)
        leaves, tree = jax.tree.flatten(like_L)

        def one(position: int, leaf: jax.Array) -> jax.Array:
            fold_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            keys = fold_each(jax.random.fold_in(key, position), problem.indices())
            shape = leaf.shape[1:]
            if shape:  # a key for each row as well, the same wherever it lies
                keys, shape = jax.vmap(fold_each, in_axes=(0, None))(keys, problem.row_indices(shape[0])), shape[1:]
            return jax.vmap(lambda key: jax.random.rademacher(key, shape, leaf.dtype))(keys.reshape(-1)).reshape(
                leaf.shape
            )

        return jax.tree.unflatten(tree, [one(position, leaf) for position, leaf in enumerate(leaves)])

    def _estimate(self, problem: LayerProblem, index: jax.Array | int, x_L: PyTree, y_L: PyTree) -> LinearMap:
        sweep = lambda x_L: problem.sweep(x_L)[0]  # noqa: E731
        total = None
        for number in range(self.num_probes):
            z_L = self.probe(problem, index, number, x_L)
            if self.mode == "jvp":
                slope_L = jax.jvp(sweep, (x_L,), (z_L,))[1]
            elif self.mode == "vjp":
                slope_L = jax.vjp(sweep, x_L)[1](z_L)[0]
            else:
                moved_L = sweep(jax.tree.map(lambda x, z: x + self.step * z, x_L, z_L))
                slope_L = jax.tree.map(lambda moved, y: (moved - y) / self.step, moved_L, y_L)
            estimate = jax.tree.map(jnp.multiply, z_L, slope_L)
            total = estimate if total is None else jax.tree.map(jnp.add, total, estimate)
        maps = DiagonalMap(jax.tree.map(lambda a: jnp.clip(a / self.num_probes, -self.limit, self.limit), total))
        maps = jax.lax.stop_gradient(maps) if self.detach else maps
        return maps if self.stride == 1 else maps.identity_where(problem.indices() % self.stride > 0)

    def serial_evals(self, num_layers: int, num_iters: int) -> int:
        # A backward pass follows a forward pass; the other two differentiate beside the evaluation.
        return (1 if self.reuse else num_iters) if self.mode == "vjp" else 0

    def extra_evals(self, num_layers: int, num_iters: int) -> int:
        per_estimate = num_layers * self.num_probes * (2 if self.mode == "vjp" else 1)
        return per_estimate * (1 if self.reuse else num_iters)

    @property
    def needs_forward_mode(self) -> bool:
        return self.mode == "jvp"


@dataclass(frozen=True)
class Exact(Correction):
    """``A_l = df_l/dh_{l-1}`` by forward-mode differentiation and forward substitution: Newton's method, the oracle.

    Cost: N JVPs one after another, over sharded layers round all devices in every iteration. Exact in one step on any
    affine chain. Needs a ``block_fn`` with a forward-mode derivative (XLA attention).
    """

    def __call__(
        self,
        problem: LayerProblem,
        iteration: Iteration,
        state: PyTree = (),
        *,
        taps: tuple[int, ...] = (),
        packed: PyTree = (),
    ) -> Corrected:
        _, x_L, y_L, _, h_L, entering = iteration
        is_padding_L = problem.is_padding()

        def substitute(d: PyTree, row: tuple) -> tuple[PyTree, PyTree]:
            params, ctx, x, y, h, is_padding = row
            _, slope = jax.jvp(lambda state: problem.block_fn(params, state, ctx, problem.shared)[0], (x,), (d,))
            slope = jax.tree.map(lambda s: (1.0 - self.damping) * s, slope)
            if is_padding is not None:
                slope = jax.tree.map(lambda s, d: jnp.where(is_padding, d, s), slope, d)
            new = jax.tree.map(jnp.add, y, slope)
            return jax.tree.map(jnp.subtract, new, h), new

        def substitute_all(d: PyTree) -> tuple[PyTree, PyTree]:
            if problem.is_stack:
                rows = (problem.params, problem.ctx, x_L, y_L, h_L, is_padding_L)
                return jax.lax.scan(substitute, d, rows)
            news = []
            for index in range(problem.num_layers):
                d, new = substitute(d, (*problem.layer(index), *layer((x_L, y_L, h_L), index), None))
                news.append(new)
            return d, jax.tree.map(lambda *leaves: jnp.stack(leaves), *news)

        d = jax.tree.map(jnp.zeros_like, entering)
        if problem.axis is None:
            new_L = substitute_all(d)[1]
            tapped = tuple(layer(new_L, tap) for tap in taps)
            return Corrected(new_L, entering, layer(new_L, -1), tapped, jax.tree.map(lambda leaf: leaf[None], packed))

        # The delta goes round the devices, and with it the state that enters the next one.
        def evaluate(carry: tuple[PyTree, PyTree], _: jax.Array) -> tuple[tuple[PyTree, PyTree], PyTree]:
            d, new_L = substitute_all(carry[0])
            return (d, layer(new_L, -1)), new_L

        start = jax.tree.map(lambda leaf: leaf[None], (d, problem.h_in))
        entered, _, new_L = pass_round(evaluate, start, problem.axis)
        new_L, num_layers = layer(new_L, 0), problem.num_layers
        mine = (layer(new_L, -1), tuple(layer(new_L, tap % num_layers) for tap in taps), packed)
        leaving, told, packed_of_all = tell_all(mine, problem.axis)
        tapped = tuple(layer(of_all, tap // num_layers) for of_all, tap in zip(told, taps, strict=True))
        return Corrected(new_L, layer(entered[1], 0), layer(leaving, -1), tapped, packed_of_all)

    def serial_evals(self, num_layers: int, num_iters: int) -> int:
        return num_layers * num_iters

    def extra_evals(self, num_layers: int, num_iters: int) -> int:
        return num_layers * num_iters

    @property
    def needs_forward_mode(self) -> bool:
        return True
