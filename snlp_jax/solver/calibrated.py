"""Surrogates and initial traces whose numbers were fitted on real text (``snlp_jax/linearize/calibrate.py``).

They hold no arrays: these ride in ``problem.calibration``, so that they are arguments of a compiled function and are
sharded with the layers.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import Guess, Init, _guess
from snlp_jax.solver.linear import Basis, DiagonalMap, LinearMap, ScalarMap, SharedBasisMap
from snlp_jax.solver.problem import Iteration, LayerProblem

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Calibration:
    """The fitted numbers of a region of N layers, for iterations 1 to K (K is a shape). D is the state's last axis.

    Attributes:
        layers: leads with the layer axis. One kind of surrogate: ``scale`` c [N, K]; or ``channel`` a [N, K, D]; or
            ``scale`` with ``core`` M [N, K, r, r]. Optionally ``intercept`` b [N, K, D]. For ``CalibratedInit``
            ``init_scale`` [N], ``init_u``, ``init_v`` [N, D, r], ``init_intercept`` [N, D]; for ``Preheat``
            ``preheat_u``, ``preheat_v``, ``preheat_intercept``.
        common: what all layers share: the bases ``u``, ``v`` [K, D, r] of ``core``.
    """

    layers: dict[str, jax.Array]
    common: dict[str, jax.Array]


@dataclass(frozen=True)
class Calibrated(Correction):
    """``A_l^k`` = c_l I, diag(a_l) or c_l I + U M_l V^T, and ``y_l + b_l^k`` for y_l: fitted for each iteration k.

    Which of the three it is, the calibration says. An iteration after the last fitted one takes that one's A and
    b = 0. Cost: a scan of scalars, of channels or of r x r matrices, and states. Exact in one step on chains of such
    maps that it was fitted on.

    The intercept stands for what A d cannot say of h*_l - y_l on average. It is 0 for the first k layers, whose
    evaluation is already the sequential one, so that k iterations settle k layers whatever the numbers are.
    """

    def surrogate(self, problem: LayerProblem, iteration: Iteration, state: PyTree) -> LinearMap:
        calibration = _of(problem, self)
        layers = calibration.layers
        _only_leaf(iteration.h_L)
        if "channel" in layers:
            a_LD = _at(layers["channel"], iteration.index)
            return DiagonalMap(jax.tree.map(lambda leaf: _on_last_axis(a_LD, leaf.ndim), iteration.h_L))
        c_L = _at(layers["scale"], iteration.index)
        if "core" not in layers:
            return ScalarMap(c_L)
        u_DX, v_DX = (_at(calibration.common[name], iteration.index, axis=0) for name in "uv")
        return SharedBasisMap(c_L, _at(layers["core"], iteration.index), Basis(u_DX, v_DX))

    def predict(self, problem: LayerProblem, iteration: Iteration) -> PyTree:
        intercept = _of(problem, self).layers.get("intercept")
        if intercept is None:
            return iteration.y_L
        indices, is_padding_L = problem.indices(), problem.is_padding()
        is_open_L = (indices > iteration.index) & (iteration.index < intercept.shape[1])
        if is_padding_L is not None:
            is_open_L &= ~is_padding_L
        b_LD = jnp.where(is_open_L[:, None], _at(intercept, iteration.index), 0.0)
        return jax.tree.map(lambda y: y + _on_last_axis(b_LD, y.ndim).astype(y.dtype), iteration.y_L)


@dataclass(frozen=True)
class CalibratedInit(Init):
    """``h_l = c_l h_S + U_l V_l^T h_S + b_l``: the low-rank linear estimate of every layer's output from the region's
    input h_S. Cost: 2 r D multiply-adds a token and layer, no evaluation. Exact on affine chains at full rank."""

    def __call__(self, problem: LayerProblem) -> Guess:
        layers = _of(problem, self).layers
        c_L = layers["init_scale"]

        def one(h: jax.Array) -> jax.Array:
            low = _low_rank(layers, "init", h)
            return (c_L.reshape(-1, *(1,) * h.ndim) * h[None] + low).astype(h.dtype)

        _only_leaf(problem.h_in)
        return _guess(problem, jax.tree.map(one, problem.h_in))


@dataclass(frozen=True)
class Preheat(Init):
    """``h_l = U_l V_l^T x0 + b_l`` from ``problem.anchor``, the model's embedding x0: the authors' initial trace.

    Cost as :class:`CalibratedInit`. It ignores what the layers before the region have made of x0.
    """

    def __call__(self, problem: LayerProblem) -> Guess:
        layers = _of(problem, self).layers
        if problem.anchor is None:
            raise ValueError("the Preheat initial trace needs problem.anchor, the state that entered the first layer.")
        h = _only_leaf(problem.h_in)
        h_L = _low_rank(layers, "preheat", spread_streams(_only_leaf(problem.anchor), h)).astype(h.dtype)
        return _guess(problem, jax.tree.map(lambda _: h_L, problem.h_in))


def spread_streams(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B, T, D] for a state that may be one of streams [B, T, R, D]."""
    return jnp.broadcast_to(x.reshape(*x.shape[:-1], *(1,) * (like.ndim - x.ndim), x.shape[-1]), like.shape)


def check_calibration(calibration: Calibration, method: Correction | Init, num_layers: int) -> None:
    """Raises ValueError where ``calibration`` does not hold what a method of this module reads; others read nothing."""
    if not isinstance(method, Calibrated | CalibratedInit | Preheat):
        return
    lengths = {leaf.shape[0] for leaf in calibration.layers.values()}
    if lengths != {num_layers}:
        fitted = ", ".join(map(str, sorted(lengths))) or "no"
        raise ValueError(
            f"the calibration was fitted to {fitted} layers, but this region has {num_layers}: fit it again."
        )
    if isinstance(method, Calibrated):
        if not {"scale", "channel"} & set(calibration.layers):
            raise ValueError("this calibration holds no surrogate, only an initial trace: fit it with a kind.")
        return
    part = "init" if isinstance(method, CalibratedInit) else "preheat"
    if f"{part}_u" not in calibration.layers:
        raise ValueError(f"this calibration holds no {part!r} part: fit it with this initial trace.")


def _of(problem: LayerProblem, method: Correction | Init) -> Calibration:
    """The problem's calibration, which holds what the method reads."""
    if problem.calibration is None:
        raise ValueError("a calibrated method needs problem.calibration: fit one to this region and name it.")
    check_calibration(problem.calibration, method, problem.num_layers)
    return problem.calibration


def _only_leaf(state: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(state)
    if len(leaves) != 1:
        raise ValueError(f"a calibration is for a state of one array, but this state is a tree of {len(leaves)}.")
    return leaves[0]


def _at(fitted: jax.Array, index: jax.Array | int, axis: int = 1) -> jax.Array:
    """The row of an iteration, which may be traced; the last row for those not fitted."""
    row = jnp.minimum(index, fitted.shape[axis] - 1)
    return jax.lax.dynamic_index_in_dim(fitted, row, axis, keepdims=False)


def _on_last_axis(a_LD: jax.Array, ndim: int) -> jax.Array:
    """[N, D] shaped to act on states [N, ..., D] of ``ndim`` axes."""
    return a_LD.reshape(a_LD.shape[0], *(1,) * (ndim - 2), a_LD.shape[-1])


def _low_rank(layers: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """``U_l V_l^T x + b_l`` for all layers [N, ...]."""
    u_LDX, v_LDX, b_LD = (layers[f"{name}_{part}"] for part in ("u", "v", "intercept"))
    low = jnp.einsum("...D,LDX->L...X", x, v_LDX)
    return jnp.einsum("L...X,LDX->L...D", low, u_LDX) + _on_last_axis(b_LD, x.ndim + 1)
