"""Closed-form fits on real text: surrogates and initial traces for the solver, affine maps in place of branches."""

from snlp_jax.linearize.calibrate import Kind, fit_calibration, fit_init
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.nbl import linearize
from snlp_jax.linearize.replace import AffineMap, replace
from snlp_jax.linearize.store import (
    About,
    check_name,
    fingerprint,
    load_calibration,
    save_calibration,
    stored_calibrations,
)
