"""Closed-form fits on real text: surrogates and initial traces for the solver."""

from snlp_jax.linearize.calibrate import fit_calibration, fit_init
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.store import About, fingerprint, load_calibration, save_calibration

__all__ = [
    "About",
    "Moments",
    "fingerprint",
    "fit_calibration",
    "fit_init",
    "load_calibration",
    "save_calibration",
]
