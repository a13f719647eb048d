"""The affine map that stands best for a branch, and how well it does: all from the moments of (x, y), in float64.

LMMSE: ``W = C_yx C_xx^-1``, ``b = E[y] - W E[x]``; its error ``E |y - W x - b|^2`` is tr(C_yy - C_yx C_xx^-1 C_xy).
With a ridge, with low rank, or on other text than it was fitted to, that identity no longer holds; what is reported is
always the full quadratic form

    tr(C_yy - 2 W C_xy + W C_xx W^T) + |E[y] - W E[x] - b|^2,

of the moments at hand, on the host, so that a candidate costs no pass through the model. NMSE divides it by tr(C_yy);
with the residual (the authors' convention, Y = y + x) by tr Cov(y + x), which is what the layers behind see.
"""

import math
from dataclasses import dataclass

import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.regression import inverse_root, top_eigenvectors
from snlp_jax.linearize.replace import AffineMap

MAX_CONDITION = 1e7
"""Of C_xx without a ridge. Beyond it the smallest eigenvalues are below the rounding of products in float32, relative
to the largest, and what W does along them is noise."""
RIDGES = tuple(10.0**power for power in range(-8, 0))
"""Tried where C_xx is worse than that, relative to its mean eigenvalue."""


@dataclass(frozen=True)
class BranchMap:
    """``y = W x + b``, in float64."""

    weight_YX: np.ndarray
    bias_Y: np.ndarray
    ridge: float
    """Relative to the mean eigenvalue of C_xx."""
    condition: float
    """Of C_xx without it; infinite where that is singular."""

    @property
    def affine(self) -> AffineMap:
        """As the model reads it."""
        return AffineMap(self.weight_YX.T, self.bias_Y)  # type: ignore[arg-type]  # becomes jax arrays there


def fit_map(
    moments: Moments,
    held_out: Moments | None = None,
    *,
    ridge: float | None = None,
    shrinkage: float = 0.0,
    rank: int = 0,
) -> BranchMap:
    """The LMMSE map of y on x, ``W = C_yx (C_xx + ridge tr(C_xx) / X I)^-1``; of least norm where that is singular.

    Args:
        held_out: of other text, by whose NMSE a ridge is chosen.
        ridge: relative to tr(C_xx) / X. None takes 0 where the condition of C_xx is at most ``MAX_CONDITION``, and
            otherwise the best of ``RIDGES`` on ``held_out``, of equals the smallest, or the smallest of all without it.
        shrinkage: ``C_xx`` is replaced by ``(1 - shrinkage) C_xx + shrinkage tr(C_xx) / X I``.
        rank: with r > 0 the best map of that rank: by the theorem of Eckart and Young, in the metric of C_xx,
            ``U U^T W`` with U the r leading left singular vectors of ``W C_xx^{1/2}``.
    """
    c_xx, c_yx = moments.covariance()
    values_X, vectors_XX = np.linalg.eigh(c_xx)
    values_X = (1.0 - shrinkage) * values_X + shrinkage * np.trace(c_xx) / len(c_xx)
    condition = float(values_X[-1] / values_X[0]) if values_X[0] > 0 else math.inf

    def fit(ridge: float) -> BranchMap:
        loaded_X = values_X + ridge * values_X.mean()
        kept_X = loaded_X > 1e-12 * loaded_X[-1]
        inverse_X = np.where(kept_X, 1.0 / np.where(kept_X, loaded_X, 1.0), 0.0)
        weight_YX = c_yx @ (vectors_XX * inverse_X) @ vectors_XX.T
        if rank:
            moved_YX = weight_YX @ (vectors_XX * np.sqrt(np.maximum(loaded_X, 0.0)))
            basis_YR = top_eigenvectors(moved_YX @ moved_YX.T, rank)
            weight_YX = basis_YR @ (basis_YR.T @ weight_YX)
        return BranchMap(weight_YX, moments.mean_y - weight_YX @ moments.mean_x, ridge, condition)

    if ridge is None and condition > MAX_CONDITION and held_out is not None:
        return min(map(fit, RIDGES), key=lambda fit: squared_error(fit, held_out))
    return fit(ridge if ridge is not None else 0.0 if condition <= MAX_CONDITION else RIDGES[0])


def squared_error(fit: BranchMap, moments: Moments) -> float:
    """``E |y - W x - b|^2`` of the samples that the moments are of."""
    (c_xx, c_yx), weight_YX = moments.covariance(), fit.weight_YX
    off_Y = moments.mean_y - weight_YX @ moments.mean_x - fit.bias_Y
    around_mean = variance(moments) - 2.0 * np.sum(weight_YX * c_yx) + np.sum((weight_YX @ c_xx) * weight_YX)
    return max(float(around_mean + off_Y @ off_Y), 0.0)


def variance(moments: Moments) -> float:
    """tr(C_yy)."""
    return float(np.trace(moments.yy) / moments.count)  # type: ignore[arg-type]


def nmse(fit: BranchMap, moments: Moments, *, residual: bool = False) -> float:
    """The squared error over the variance of y, or of y + x: 0 is exact, 1 is what the mean alone does."""
    spread = variance(moments.with_residual() if residual else moments)
    return squared_error(fit, moments) / spread if spread > 0 else 0.0  # a branch that says one thing is affine


def cca_bound(moments: Moments) -> float:
    """The authors' bound on the NMSE of the LMMSE map, by which they rank layers, with moments of (x, y + x):

        NMSE <= (Y - r) + sum_i (1 - rho_i^2),    rho_i the singular values of C_yy^-1/2 C_yx C_xx^-1/2,

    by tr(A B) <= tr(A) tr(B) with A = C_yy / tr(C_yy), B = I - R R^T. Usually above 1 at real widths, while the NMSE
    itself never is. Directions without variance count as uncorrelated.
    """
    (c_xx, c_yx), c_yy = moments.covariance(), moments.yy / moments.count  # type: ignore[operator]
    correlation_YX = inverse_root(c_yy).T @ c_yx @ inverse_root(c_xx)
    return float(len(c_yy) - np.sum(correlation_YX**2))  # the sum of its squared singular values


def check_samples(num_samples: int, width: int) -> None:
    """Refuse text that is too short for a map of this width.

    Raises:
        InputError: fewer than two samples for each of its columns.
    """
    if num_samples < 2 * width:
        raise InputError(
            f"{num_samples} tokens are too few to fit maps of width {width}; give at least {2 * width} (better ten "
            "times as many) with --tokens and enough text."
        )
