"""Linear regressions from covariances, in float64 on the host."""

import numpy as np


def ridge_regression(c_yx: np.ndarray, c_xx: np.ndarray, ridge: float) -> np.ndarray:
    """``C_yx (C_xx + ridge * tr(C_xx) / dim)^-1``; the least norm solution where that is singular."""
    loaded = c_xx + ridge * np.trace(c_xx) / len(c_xx) * np.eye(len(c_xx))
    return np.linalg.lstsq(loaded, c_yx.T, rcond=1e-12)[0].T


def top_eigenvectors(symmetric: np.ndarray, rank: int) -> np.ndarray:
    """[dim, rank], of the largest eigenvalues."""
    return np.linalg.eigh(symmetric)[1][:, ::-1][:, :rank]


def inverse_root(symmetric: np.ndarray, rtol: float = 1e-12) -> np.ndarray:
    """``R`` [dim, r] with ``R^T C R = I`` on the r directions whose eigenvalues exceed ``rtol`` of the largest."""
    values, vectors = np.linalg.eigh(symmetric)
    kept = values > rtol * max(values[-1], 0.0)
    return vectors[:, kept] / np.sqrt(values[kept])
