"""Surrogates and initial traces whose numbers were fitted on real text (``snlp_jax/linearize/calibrate.py``).

They hold no arrays: these ride in ``MethodData.fit``, so that they are arguments of a compiled function and are spread
with the layers.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction, Iteration
from snlp_jax.solver.init import NO_DATA, Guess, Init, guess_of
from snlp_jax.solver.maps import HIGHEST, Basis, DiagonalMap, LinearMap, ScalarMap, SharedBasisMap

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

    def start(self, chain: Chain, x_L: PyTree, data: MethodData = NO_DATA) -> PyTree:
        """The calibration."""
        only_leaf(x_L)
        return _fit_of(chain, data, self)

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        layers = state.layers
        if "channel" in layers:
            a_LD = _at(layers["channel"], it.index)
            return DiagonalMap(jax.tree.map(lambda leaf: _on_last_axis(a_LD, leaf.ndim), it.h_L))
        c_L = _at(layers["scale"], it.index)
        if "core" not in layers:
            return ScalarMap(c_L)
        u_DX, v_DX = (_at(state.common[name], it.index, axis=0) for name in "uv")
        return SharedBasisMap(c_L, _at(layers["core"], it.index), Basis(u_DX, v_DX))

    def predict(self, chain: Chain, it: Iteration, state: PyTree) -> PyTree:
        intercept = state.layers.get("intercept")
        if intercept is None:
            return it.y_L
        is_open_L = (chain.place.indices(chain.num_nodes) > it.index) & (it.index < intercept.shape[1])
        is_padding_L = chain.place.is_padding()
        if is_padding_L is not None:
            is_open_L &= ~is_padding_L
        b_LD = jnp.where(is_open_L[:, None], _at(intercept, it.index), 0.0)
        return jax.tree.map(lambda y: y + _on_last_axis(b_LD, y.ndim).astype(y.dtype), it.y_L)


@dataclass(frozen=True)
class CalibratedInit(Init):
    """``h_l = c_l h_S + U_l V_l^T h_S + b_l``: the low-rank linear estimate of every layer's output from the region's
    input h_S. Cost: 2 r D multiply-adds a token and layer, no evaluation. Exact on affine chains at full rank."""

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        layers = _fit_of(chain, data, self).layers
        c_L = layers["init_scale"]

        def one(h: jax.Array) -> jax.Array:
            low = _low_rank(layers, "init", h)
            return (c_L.reshape(-1, *(1,) * h.ndim) * h[None] + low).astype(h.dtype)

        only_leaf(chain.h_in)
        return guess_of(chain, jax.tree.map(one, chain.h_in))


@dataclass(frozen=True)
class Preheat(Init):
    """``h_l = U_l V_l^T x0 + b_l`` from ``data.anchor``, the model's embedding x0: the authors' initial trace.

    Cost as :class:`CalibratedInit`. It ignores what the layers before the region have made of x0.
    """

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        layers = _fit_of(chain, data, self).layers
        if data.anchor is None:
            raise ValueError("the Preheat initial trace needs data.anchor, the state that entered the first layer.")
        h = only_leaf(chain.h_in)
        h_L = _low_rank(layers, "preheat", spread_streams(only_leaf(data.anchor), h)).astype(h.dtype)
        return guess_of(chain, jax.tree.map(lambda _: h_L, chain.h_in))


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


def _fit_of(chain: Chain, data: MethodData, method: Correction | Init) -> Calibration:
    """The calibration in ``data``, which holds what the method reads."""
    if data.fit is None:
        raise ValueError("a calibrated method needs data.fit: fit a calibration to this region and name it.")
    check_calibration(data.fit, method, chain.num_nodes)
    return data.fit


def only_leaf(state: PyTree) -> jax.Array:
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
    low = jnp.einsum("...D,LDX->L...X", x, v_LDX, precision=HIGHEST)
    return jnp.einsum("L...X,LDX->L...D", low, u_LDX, precision=HIGHEST) + _on_last_axis(b_LD, x.ndim + 1)
