"""Fits the numbers of ``Calibrated`` surrogates and initial traces to the chains of real text.

Iterations are fitted one after another. For iteration k, with the initial trace and the surrogates of the earlier
iterations fixed, let h be the trace before it, y_l = f_l(h_{l-1}), r_l = y_l - h_l, and h* the sequential trace. The
solver will make

    d_l = A_l d_{l-1} + r_l + b_l,  h'_l = y_l + b_l + A_l d_{l-1},  d_0 = 0,

so A_l, b_l are the regression of t_l = h*_l - y_l on d_{l-1}, layer after layer: on the update that the solver itself
makes, with its own errors, not on the true one h*_{l-1} - h_{l-1}. No layer waits for the one before to be fitted:
with W_{l,j} = A_l ... A_{j+1} the update is ``d_l = sum_{j<=l} W_{l,j} r_j + beta_l``, linear in the residuals, whose
weights are known once the earlier layers are. One pass over the text collects moments of (r, t), and

    Cov(d, d) = sum_ij W_i Cov(r_i, r_j) W_j^T,   Cov(t_l, d) = sum_j Cov(t_l, r_j) W_j^T

are all that the regression of layer l needs; it is solved on the host in float64. Scalars and channels need the N x N
moments of each channel. With bases the weights are ``W_{l,j} = w_{l,j} I + U Q_{l,j} V^T``, and what is needed beside
are moments of the r-vectors V^T r_j, U^T r_j and U^T t_l (see :func:`_solve_basis`).

The first k layers of iteration k have t = 0 and take b = 0; their A, which meets d = 0, is set to I.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.linearize.covariance import Moments, total
from snlp_jax.linearize.regression import ridge_regression, top_eigenvectors
from snlp_jax.solver import Chain, Init, MethodData, PrefixState, sequential, start, step
from snlp_jax.solver.calibrated import Calibrated, CalibratedInit, Calibration, Preheat, spread_streams
from snlp_jax.solver.linear import shift
from snlp_jax.types import PyTree

Kind = Literal["scalar", "channel", "basis"]
Pair = tuple[Chain, MethodData]
Text = Sequence[Pair] | Callable[[], Iterable[Pair]]
"""A region's chains on batches of text, with the anchor that ``Preheat`` reads, if it is fitted."""
Measure = Callable[[Chain, Init, jax.Array, MethodData], Any]


def fit_calibration(
    text: Text,
    *,
    num_iters: int,
    kind: Kind = "basis",
    rank: int = 16,
    intercept: bool = False,
    init: Init | None = None,
    init_rank: int = 64,
    ridge: float = 1e-4,
) -> Calibration:
    """Fit surrogates for ``num_iters`` iterations, and the initial trace where ``init`` is one that is fitted.

    Passes over the text: one an iteration (two for ``basis``), one for the initial trace. Memory is that of a batch.

    Args:
        text: the region's chains on batches of text, of equal shapes; a function gives them anew for every pass. They
            differ in their arrays only: functions are taken from the first. Streams count as samples.
        kind: ``scalar`` c_l I, ``channel`` diag(a_l), or ``basis`` c_l I + U M_l V^T with U, V of ``rank`` columns.
        intercept: also fit b_l; without it the regressions go through the origin. It lowers the squared error of the
            states, yet on the demo's model it raised the perplexity.
        init: ``PrefixState()`` if None. The surrogates fit this initial trace only.
        init_rank: columns of U_l, V_l of ``CalibratedInit`` and ``Preheat``.
        ridge: relative to the mean eigenvalue of the regressor's covariance; draws channels and cores to the scalar.

    Raises:
        InputError: a number out of range, no text, or a state of more than one array.
    """
    if kind not in get_args(Kind):
        raise InputError(f"calibration kind {kind!r} is not one of {', '.join(get_args(Kind))}.")
    if num_iters < 1:
        raise InputError(f"num_iters is {num_iters}; fit at least one iteration.")
    chains, init = _Chains(text), init or PrefixState()
    layers, common = fit_init(chains, init, rank=init_rank, ridge=ridge), {}
    num_nodes, width = chains.num_nodes, chains.width
    name = "channel" if kind == "channel" else "scale"
    layers[name] = np.ones((num_nodes, num_iters, width)[: 3 if kind == "channel" else 2])
    u_DX, m_LXX, v_DX = np.zeros((width, 0)), np.zeros((num_nodes, 0, 0)), np.zeros((width, 0))
    if kind == "basis":
        rank = _check_rank(rank, width)
        layers["core"] = np.zeros((num_nodes, num_iters, rank, rank))
        common = {basis: np.zeros((num_iters, width, rank)) for basis in "uv"}
    if intercept:
        layers["intercept"] = np.zeros((num_nodes, num_iters, width))
    for index in range(num_iters):
        reduce = lambda measure: chains.reduce(measure, init, index, _calibration(layers, common))  # noqa: B023, E731
        if kind == "basis":
            u_DX, v_DX = _shared_bases(reduce(_true_updates), index, rank, intercept, ridge)
            common["u"][index], common["v"][index] = u_DX, v_DX
            channels, projected = reduce(_projected_residuals)
            c_L, m_LXX = _solve_basis(channels, projected, u_DX, v_DX, index, intercept, ridge)
            a_LX, layers["core"][:, index] = c_L[:, None], m_LXX
        else:
            channels = reduce(_residuals)
            a_LX = _solve_channels(channels, index, intercept, ridge, pooled=kind == "scalar")
        layers[name][:, index] = a_LX if kind == "channel" else a_LX[:, 0]
        if intercept:
            layers["intercept"][:, index] = _intercepts(channels, index, a_LX, u_DX, m_LXX, v_DX)
    return _calibration(layers, common)


def fit_init(text: "Text | _Chains", init: Init, *, rank: int, ridge: float = 1e-4) -> dict[str, np.ndarray]:
    """What ``init`` reads of ``Calibration.layers``; nothing for one that is not fitted.

    ``CalibratedInit``: the reduced-rank regression of h*_l - c_l h_S on h_S, which keeps the directions that explain
    most of it. ``Preheat``: the regression of h*_l on the first principal components of x0, as the authors do.
    """
    if not isinstance(init, CalibratedInit | Preheat):
        return {}
    chains = text if isinstance(text, _Chains) else _Chains(text)
    rank = _check_rank(rank, chains.width)
    moments = chains.reduce(_outputs, init, 0, Calibration({}, {}))
    c_xx, c_yx = moments.covariance()
    c_LDD = c_yx.reshape(chains.num_nodes, chains.width, chains.width)
    scale_L, parts = np.zeros(chains.num_nodes), []
    for l, c_DD in enumerate(c_LDD):
        if isinstance(init, CalibratedInit):
            scale_L[l] = _ratio(np.trace(c_DD), np.trace(c_xx))
            b_DD = ridge_regression(c_DD - scale_L[l] * c_xx, c_xx, ridge)
            u_DX = top_eigenvectors(b_DD @ c_xx @ b_DD.T, rank)
            parts.append((u_DX, b_DD.T @ u_DX))
        else:
            v_DX = top_eigenvectors(c_xx, rank)
            parts.append((ridge_regression(c_DD @ v_DX, v_DX.T @ c_xx @ v_DX, ridge), v_DX))
    u_LDX, v_LDX = (np.stack(part) for part in zip(*parts, strict=True))
    explained_LD = scale_L[:, None] * moments.mean_x + np.einsum("LDX,LEX,E->LD", u_LDX, v_LDX, moments.mean_x)
    b_LD = moments.mean_y.reshape(explained_LD.shape) - explained_LD
    if isinstance(init, Preheat):
        return {"preheat_u": u_LDX, "preheat_v": v_LDX, "preheat_intercept": b_LD}
    return {"init_scale": scale_L, "init_u": u_LDX, "init_v": v_LDX, "init_intercept": b_LD}


class _Chains:
    """The chains of a region on batches of text, and one compiled function for each statistic of a batch."""

    def __init__(self, text: Text):
        self._stream: Callable[[], Iterable[Pair]] = text if callable(text) else lambda: text
        first = next(iter(self._stream()), None)
        if first is None:
            raise InputError("there is no text to calibrate on; give at least one batch.")
        chain, _ = first
        leaves = jax.tree.leaves(chain.h_in)
        if len(leaves) != 1:
            raise InputError(f"a calibration is for a state of one array, but this state is a tree of {len(leaves)}.")
        self._fns, self.num_nodes, self.width = chain.fns, chain.num_nodes, leaves[0].shape[-1]
        run = lambda measure, init, index, chain, data: measure(chain, init, index, data)  # noqa: E731
        self._run = jax.jit(run, static_argnums=(0, 1))

    def reduce(self, measure: Measure, init: Init, index: int, calibration: Calibration) -> Any:
        """Moments over all of the text, of the trace that iteration ``index`` finds."""

        def of(chain: Chain, data: MethodData) -> Any:
            chain = dataclasses.replace(chain, fns=self._fns)  # equal functions compile once
            return jax.device_get(self._run(measure, init, index, chain, data._replace(fit=calibration)))

        return total(of(*pair) for pair in self._stream())


# ---------------------------------------------------------------- statistics of a batch, compiled


def _outputs(chain: Chain, init: Init, index: jax.Array, data: MethodData) -> Moments:
    """x = h_S, or for ``Preheat`` the anchor; y = (h*_1 .. h*_N)."""
    x = _leaf(chain.h_in)
    if isinstance(init, Preheat):
        if data.anchor is None:
            raise InputError("the Preheat initial trace maps data.anchor, but this text has none; give it.")
        x = spread_streams(_leaf(data.anchor), x)
    truth_SLD = _samples(_leaf(sequential(chain, with_trace=True).trace))
    return Moments.of(_samples(x[None])[:, 0], _flat(truth_SLD))


def _true_updates(chain: Chain, init: Init, index: jax.Array, data: MethodData) -> Moments:
    """x = h*_{l-1} - h_{l-1}, y = t_l, each layer a regression of its own."""
    x_SLD, _, t_SLD = _before(chain, init, index, data)
    return Moments.of(x_SLD, t_SLD)


def _residuals(chain: Chain, init: Init, index: jax.Array, data: MethodData) -> Moments:
    """x = (r_1 .. r_N), y = (t_1 .. t_N), each channel a regression of its own."""
    _, r_SLD, t_SLD = _before(chain, init, index, data)
    return Moments.of(r_SLD.swapaxes(1, 2), t_SLD.swapaxes(1, 2))


def _projected_residuals(chain: Chain, init: Init, index: jax.Array, data: MethodData) -> tuple[Moments, Moments]:
    """Those of the channels; and of x = (V^T r_j), y = (U^T r_j, U^T t_l)."""
    _, r_SLD, t_SLD = _before(chain, init, index, data)
    u_DX, v_DX = (jnp.take(data.fit.common[name], index, axis=0) for name in "uv")
    with jax.default_matmul_precision("highest"):
        x_SLX, y_SLX = r_SLD @ v_DX, jnp.concatenate([r_SLD, t_SLD], axis=1) @ u_DX
    return Moments.of(r_SLD.swapaxes(1, 2), t_SLD.swapaxes(1, 2)), Moments.of(_flat(x_SLX), _flat(y_SLX))


def _before(chain: Chain, init: Init, index: jax.Array, data: MethodData) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h*_{l-1} - h_{l-1}, r_l and t_l, [S, N, D] each, which iteration ``index`` finds after those before it, which run
    as they will in the solver."""
    guess, _, state = start(chain, Calibrated(), init, data)
    advance = lambda index, guess: step(chain, Calibrated(), guess, state, index).guess  # noqa: E731
    guess = jax.lax.fori_loop(0, index, advance, guess)
    found = step(chain, Calibrated(), guess, state, index).iteration
    h_L, y_L, truth_L = map(_leaf, (found.h_L, found.y_L, sequential(chain, with_trace=True).trace))
    update_L = shift(truth_L - h_L, jnp.zeros_like(_leaf(chain.h_in)))
    return _samples(update_L), _samples(y_L - h_L), _samples(truth_L - y_L)


def _leaf(state: PyTree) -> jax.Array:
    return jax.tree.leaves(state)[0]


def _samples(rows_L: jax.Array) -> jax.Array:
    """[S, N, D] in float32 of [N, .., D]: all axes between are samples."""
    return rows_L.reshape(len(rows_L), -1, rows_L.shape[-1]).astype(jnp.float32).swapaxes(0, 1)


def _flat(rows_SLD: jax.Array) -> jax.Array:
    """[S, N * D]."""
    return rows_SLD.reshape(len(rows_SLD), -1)


# ---------------------------------------------------------------- regressions on the host


def _solve_channels(moments: Moments, index: int, centred: bool, ridge: float, *, pooled: bool) -> np.ndarray:
    """``a_LD`` layer after layer; ``pooled`` makes all channels of a layer one."""
    s_DLL, t_DLL = moments.covariance(centred=centred)
    width, num_layers = moments.mean_x.shape
    a_LD, w_LD = np.ones((num_layers, width)), np.zeros((num_layers, width))  # d_{l-1} = sum_j w_j r_j
    for l in range(num_layers):
        if l > index:
            variance_D = np.einsum("LD,DLM,MD->D", w_LD, s_DLL, w_LD)
            covariance_D = np.einsum("DL,LD->D", t_DLL[:, l], w_LD)
            scale = _ratio(covariance_D.sum(), variance_D.sum())
            pull = ridge * variance_D.mean()
            a_LD[l] = scale if pooled else _ratio(covariance_D + pull * scale, variance_D + pull)
        w_LD = a_LD[l] * w_LD
        w_LD[l] = 1.0
    return a_LD


def _solve_basis(
    channels: Moments,
    projected: Moments,
    u_DX: np.ndarray,
    v_DX: np.ndarray,
    index: int,
    centred: bool,
    ridge: float,
) -> tuple[np.ndarray, np.ndarray]:
    """``c_L, m_LXX`` layer after layer, for given bases (U orthonormal).

    With p_j = V^T r_j, g_j = U^T r_j, tau_l = U^T t_l, G = V^T U the update is
    ``d = sum_j w_j r_j + U Q_j p_j + beta``, so ``v = V^T d = sum_j P_j p_j`` with ``P_j = w_j I + G Q_j`` and
    ``e = U^T d = sum_j w_j g_j + Q_j p_j``, and through layer l ``w_j <- c w_j``, ``Q_j <- c Q_j + M P_j``. The
    regression of t on (d, U v) has ``M(c) = (C_tau,v - c C_e,v) R`` with ``R = (C_vv + ridge)^-1`` and, with M put in,
    ``c = (tr C_t,d - tr C_tau,v R C_v,e) / (tr C_d,d - tr C_e,v R C_v,e)``.
    """
    s_LL, t_LL = (moment.sum(0) for moment in channels.covariance(centred=centred))
    num_layers, rank = len(s_LL), u_DX.shape[1]
    c_xx, c_yx = projected.covariance(centred=centred)
    pp_LXLX = c_xx.reshape(num_layers, rank, num_layers, rank)
    gp_LXLX, taup_LXLX = c_yx.reshape(2, num_layers, rank, num_layers, rank)
    gram_XX = v_DX.T @ u_DX
    c_L, m_LXX = np.ones(num_layers), np.zeros((num_layers, rank, rank))
    w_L, q_LXX = np.zeros(num_layers), np.zeros((num_layers, rank, rank))
    for l in range(num_layers):
        p_LXX = w_L[:, None, None] * np.eye(rank) + gram_XX @ q_LXX
        if l > index:
            vv_XX = np.einsum("LXY,LYMZ,MWZ->XW", p_LXX, pp_LXLX, p_LXX, optimize=True)
            tauv_XX = np.einsum("XLY,LWY->XW", taup_LXLX[l], p_LXX)
            qpp_XLX = np.einsum("LXY,LYMZ->XMZ", q_LXX, pp_LXLX)
            ep_XLX = np.einsum("L,LXMZ->XMZ", w_L, gp_LXLX) + qpp_XLX
            ev_XX = np.einsum("XMZ,MWZ->XW", ep_XLX, p_LXX)
            dd = w_L @ s_LL @ w_L + 2 * np.einsum("L,LXMY,MXY->", w_L, gp_LXLX, q_LXX, optimize=True)
            dd += np.einsum("XMZ,MXZ->", qpp_XLX, q_LXX)
            td = t_LL[l] @ w_L + np.einsum("XLY,LXY->", taup_LXLX[l], q_LXX)
            c_L[l], m_LXX[l] = _scale_and_core(td, dd, tauv_XX, ev_XX, vv_XX, ridge)
        w_L, q_LXX = c_L[l] * w_L, c_L[l] * q_LXX + m_LXX[l] @ p_LXX
        w_L[l], q_LXX[l] = 1.0, 0.0
    return c_L, m_LXX


def _intercepts(
    moments: Moments, index: int, a_LX: np.ndarray, u_DX: np.ndarray, m_LXX: np.ndarray, v_DX: np.ndarray
) -> np.ndarray:
    """``b_LD``, which make up for the means, ``b_l = E[t_l] - A_l E[d_{l-1}]``: A_l is diag(a_l) + U M_l V^T, or with
    one column a_l I + U M_l V^T."""
    b_LD, mean_d_D = np.zeros(moments.mean_x.shape[::-1]), np.zeros(len(moments.mean_x))
    for l in range(len(b_LD)):
        moved_D = a_LX[l] * mean_d_D + u_DX @ (m_LXX[l] @ (v_DX.T @ mean_d_D))
        if l > index:
            b_LD[l] = moments.mean_y[:, l] - moved_D
        mean_d_D = moved_D + moments.mean_x[:, l] + b_LD[l]
    return b_LD


def _scale_and_core(
    td: float, dd: float, tauv_XX: np.ndarray, ev_XX: np.ndarray, vv_XX: np.ndarray, ridge: float
) -> tuple[float, np.ndarray]:
    """c and M(c) of the regression of t on (d, U v), see :func:`_solve_basis`."""
    explained_XX = ridge_regression(ev_XX, vv_XX, ridge)
    scale = float(_ratio(td - np.sum(tauv_XX * explained_XX), dd - np.sum(ev_XX * explained_XX)))
    return scale, ridge_regression(tauv_XX - scale * ev_XX, vv_XX, ridge)


BASIS_ROUNDS = 20
"""Turns between the bases and the scalars that go with them: a low-rank part has a trace, which c_l must not take."""


def _shared_bases(
    moments: Moments, index: int, rank: int, centred: bool, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """``u_DX`` (orthonormal) and ``v_DX``: a reduced-rank regression of t_l - c_l x on the true update x, pooled.

    U spans the directions that explain most of all layers' targets; V those of the update that predict them, of unit
    covariance over all layers. The scalars c_l and the bases are found in turns.
    """
    xx_LDD, tx_LDD = (moment[index + 1 :] for moment in moments.covariance(centred=centred))
    width, num_layers = moments.mean_x.shape[-1], len(xx_LDD)
    if not num_layers:  # all layers are exact by now
        return np.eye(width, rank), np.eye(width, rank)
    pooled_DD = xx_LDD.mean(0)
    values_D, vectors_DD = np.linalg.eigh(pooled_DD + ridge * np.trace(pooled_DD) / width * np.eye(width))
    root_D = np.sqrt(np.maximum(values_D, np.finfo(np.float64).eps * values_D[-1]))
    root_DD, whiten_DD = ((vectors_DD * scales) @ vectors_DD.T for scales in (root_D, 1.0 / root_D))
    to_target, to_self = (
        np.stack([ridge_regression(yx, xx, ridge) for yx, xx in zip(yx_LDD, xx_LDD, strict=True)])
        for yx_LDD in (tx_LDD, xx_LDD)
    )
    td_L, dd_L = (np.trace(moment, axis1=1, axis2=2) for moment in (tx_LDD, xx_LDD))
    c_L = _ratio(td_L, dd_L)
    for _ in range(BASIS_ROUNDS):
        b_LDD = to_target - c_L[:, None, None] * to_self
        u_DX = top_eigenvectors((b_LDD @ xx_LDD @ b_LDD.swapaxes(1, 2)).sum(0), rank)
        rows_LXD = u_DX.T @ b_LDD @ root_DD
        v_DX = whiten_DD @ top_eigenvectors((rows_LXD.swapaxes(1, 2) @ rows_LXD).sum(0), rank)
        tauv_LXX, ev_LXX, vv_LXX = u_DX.T @ tx_LDD @ v_DX, u_DX.T @ xx_LDD @ v_DX, v_DX.T @ xx_LDD @ v_DX
        rows = zip(td_L, dd_L, tauv_LXX, ev_LXX, vv_LXX, strict=True)
        c_L = np.stack([_scale_and_core(*row, ridge)[0] for row in rows])
    return u_DX, v_DX


def _ratio(numerator: Any, denominator: Any) -> Any:
    """1 where there is nothing to divide by: an update that is always 0."""
    safe = denominator > np.finfo(np.float64).tiny
    return np.where(safe, numerator / np.where(safe, denominator, 1.0), 1.0)


def _check_rank(rank: int, width: int) -> int:
    if not 1 <= rank <= width:
        raise InputError(f"rank {rank} of a calibration lies outside 1 to the state's width {width}.")
    return rank


def _calibration(layers: dict[str, np.ndarray], common: dict[str, np.ndarray]) -> Calibration:
    to_device = lambda arrays: {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}  # noqa: E731
    return Calibration(to_device(layers), to_device(common))
