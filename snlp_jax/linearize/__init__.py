"""Closed-form fits on real text: surrogates and initial traces for the solver, affine maps in place of branches."""

from snlp_jax.linearize.calibrate import Kind, fit_calibration, fit_init
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.maps import BranchMap, cca_bound, fit_map, nmse
from snlp_jax.linearize.nbl import Candidate, Linearized, apply, choose, linearize, measure
from snlp_jax.linearize.replace import AffineMap, replace
from snlp_jax.linearize.statistics import Branch, branch_moments
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
    "AffineMap",
    "Branch",
    "BranchMap",
    "Candidate",
    "Kind",
    "Linearized",
    "Moments",
    "apply",
    "branch_moments",
    "cca_bound",
    "check_name",
    "choose",
    "fingerprint",
    "fit_calibration",
    "fit_init",
    "fit_map",
    "linearize",
    "load_calibration",
    "measure",
    "nmse",
    "replace",
    "save_calibration",
    "stored_calibrations",
]
