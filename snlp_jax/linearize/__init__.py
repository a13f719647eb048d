"""Closed-form fits on real text: surrogates and initial traces for the solver, affine maps in place of branches."""

from snlp_jax.linearize.calibrate import Kind as Kind
from snlp_jax.linearize.calibrate import fit_calibration as fit_calibration
from snlp_jax.linearize.calibrate import fit_init as fit_init
from snlp_jax.linearize.covariance import Moments as Moments
from snlp_jax.linearize.nbl import linearize as linearize
from snlp_jax.linearize.replace import AffineMap as AffineMap
from snlp_jax.linearize.replace import replace as replace
from snlp_jax.linearize.store import About as About
from snlp_jax.linearize.store import check_name as check_name
from snlp_jax.linearize.store import fingerprint as fingerprint
from snlp_jax.linearize.store import load_calibration as load_calibration
from snlp_jax.linearize.store import save_calibration as save_calibration
from snlp_jax.linearize.store import stored_calibrations as stored_calibrations
