"""Closed-form fits on real text: surrogates and initial traces for the solver."""

from snlp_jax.linearize.calibrate import fit_calibration, fit_init
from snlp_jax.linearize.covariance import Moments

__all__ = ["Moments", "fit_calibration", "fit_init"]
