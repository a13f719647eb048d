"""How many iterations a region needs, and how many the growth of perturbations predicts. On the host, in numbers.

To first order the errors of a region's nodes after one more iteration are ``e'_l = (J_l - A_l) e_{l-1} + A_l e'_{l-1}``
with ``e_0 = 0``. With gains in place of the matrices this is a recursion of norms; see docs/math.md, section 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.01
"""Relative error of a region's output that counts as solved."""


@dataclass(frozen=True)
class Gains:
    """Of the N nodes of a region, as factors of norms."""

    log_growth: Sequence[float]
    """``log(||J_l v|| / ||v||)``."""
    left: Sequence[float]
    """``||(J_l - A_l) v|| / ||v||``."""
    carried: Sequence[float]
    """``||A_l v|| / ||v||``."""
    sizes: Sequence[float]
    """``||h_l||`` of the input and the N outputs."""


@dataclass(frozen=True)
class Predictions:
    """Iterations until a region's output is within a tolerance."""

    by_exponent: int
    """If every Jacobian were e to the power of the largest Lyapunov exponent, a number."""
    by_left: int
    """By what the correction leaves of perturbations that came down the layers."""
    by_norms: int
    """By ``||J_l - A_l||_2``: an upper estimate, no perturbation leaves more."""


def exponent(log_growth: Sequence[float]) -> float:
    """The largest Lyapunov exponent over the depth: mean log growth of a perturbation, in nats a node."""
    return float(np.mean(log_growth))


def iterations_needed(error: Sequence[float], tolerance: float = TOLERANCE) -> int:
    """The first iteration whose error, and that of all later ones, is at most the tolerance.

    Args:
        error: relative error of the region's output after 0, 1, .. iterations; the last is the exact one.
    """
    above = [k for k, value in enumerate(error) if not value <= tolerance]
    return above[-1] + 1 if above else 0


def predict(error: Sequence[float], gains: Gains, norms: Sequence[float], tolerance: float = TOLERANCE) -> Predictions:
    """The iterations that gains predict.

    Args:
        error: relative error of the initial trace, of N nodes.
        norms: ``||J_l - A_l||_2``.
    """
    growth = math.exp(min(exponent(gains.log_growth), 80.0))  # stays finite
    by_growth = np.abs(growth - np.asarray(gains.carried)).tolist()
    curves = (predicted_errors(error, left, gains) for left in (by_growth, gains.left, norms))
    return Predictions(*(iterations_needed(curve, tolerance) for curve in curves))


def predicted_errors(error: Sequence[float], left: Sequence[float], gains: Gains) -> list[float]:
    """The relative error of the region's output after 0 .. N iterations, each of which makes
    ``e'_l = left_l e_{l-1} + carried_l e'_{l-1}`` of the errors e; the last is 0."""
    shrunk = np.asarray(gains.sizes[:-1]) / np.maximum(gains.sizes[1:], 1e-30)
    new_factor, old_factor = np.asarray(left) * shrunk, np.asarray(gains.carried) * shrunk
    errors = np.asarray(error, np.float64)
    curve = [float(errors[-1])]
    with np.errstate(all="ignore"):  # what grows beyond all numbers is above any tolerance
        for _ in range(len(errors)):
            made = np.zeros_like(errors)
            for node in range(1, len(errors)):
                made[node] = new_factor[node] * errors[node - 1] + old_factor[node] * made[node - 1]
            errors = made
            curve.append(float(errors[-1]))
    return [*curve[:-1], 0.0]
