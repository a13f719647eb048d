"""Closed-form fits on real text: surrogates and initial traces for the solver."""

from snlp_jax.linearize.calibrate import Kind, fit_calibration, fit_init
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.store import (
    About,
    check_name,
    fingerprint,
    load_calibration,
    save_calibration,
    stored_calibrations,
)

__all__ = [
    "About",
    "Kind",
    "Moments",
    "check_name",
    "fingerprint",
    "fit_calibration",
    "fit_init",
    "load_calibration",
    "save_calibration",
    "stored_calibrations",
]
