"""Neural block linearization: the maps and their errors from moments, and moments of a model's branches."""

import numpy as np
import pytest

from snlp_jax.errors import InputError
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.maps import (
    MAX_CONDITION,
    RIDGES,
    Regression,
    cca_bound,
    check_samples,
    fit_map,
    nmse,
    squared_error,
    variance,
)

WIDTH = 6


def samples(num=400, width=WIDTH, seed=0, noise=0.5, bend=0.5):
    """y is an affine function of x, with noise and something that no map explains."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(3, width, width))
    x = rng.normal(size=(num, width)) @ mix[0] + mix[1, 0]
    y = x @ mix[1] + bend * np.sin(x @ mix[2]) + noise * rng.normal(size=(num, width)) + 3.0
    return x, y


def moments(x, y):
    return Moments.of(x, y, with_yy=True)


def apply(fit, x):
    return x @ fit.weight_YX.T + fit.bias_Y


# ---------------------------------------------------------------- maps


def test_an_affine_branch_is_recovered_exactly():
    x, _ = samples()
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=WIDTH)
    of_branch = moments(x, x @ weight.T + bias)
    fit = fit_map(of_branch)
    # float64, times the condition of C_xx, about 1e3
    np.testing.assert_allclose(fit.weight_YX, weight, atol=1e-10)
    np.testing.assert_allclose(fit.bias_Y, bias, atol=1e-10)
    assert fit.ridge == 0 and nmse(fit, of_branch) < 1e-12 and nmse(fit, of_branch, residual=True) < 1e-12
    assert nmse(fit_map(of_branch, ridge=0.1), of_branch) > 1e-4


def test_nmse_in_sample_is_the_closed_form():
    """tr(C_yy - C_yx C_xx^-1 C_xy) / tr(C_yy); the residual Y = y + x changes the denominator alone."""
    x, y = samples()
    both = moments(x, y)
    c_xx, c_yx = both.covariance()
    c_yy = both.yy / both.count
    explained = c_yx @ np.linalg.solve(c_xx, c_yx.T)
    error = np.trace(c_yy - explained)
    fit = fit_map(both)
    assert nmse(fit, both) == pytest.approx(error / np.trace(c_yy), rel=1e-10)
    assert variance(both, residual=True) == pytest.approx(np.trace(np.cov((y + x).T, bias=True)), rel=1e-12)
    assert nmse(fit, both, residual=True) == pytest.approx(error / np.trace(np.cov((y + x).T, bias=True)), rel=1e-10)
    # The LMMSE map of Y = y + x is W + I: what it leaves is the same.
    with_residual = moments(x, y + x)
    again = fit_map(with_residual)
    np.testing.assert_allclose(again.weight_YX, fit.weight_YX + np.eye(WIDTH), atol=1e-10)
    assert nmse(again, with_residual) == pytest.approx(nmse(fit, both, residual=True), rel=1e-10)


@pytest.mark.parametrize("settings", ({}, {"ridge": 0.3}, {"shrinkage": 0.2}, {"rank": 2}, {"ridge": 0.1, "rank": 3}))
def test_error_on_other_samples_is_that_of_the_map_applied(settings):
    """By the quadratic form of their moments, without a look at them."""
    fit = fit_map(moments(*samples()), **settings)
    x, y = samples(num=90, seed=1)
    error = np.mean(np.sum((y - apply(fit, x)) ** 2, axis=1))
    held_out = moments(x, y)
    assert squared_error(fit, held_out) == pytest.approx(error, rel=1e-10)
    assert nmse(fit, held_out) == pytest.approx(error / np.sum(y.var(0)), rel=1e-10)


def test_a_ridge_shrinks_as_its_formula_says():
    x, y = samples()
    both = moments(x, y)
    c_xx, c_yx = both.covariance()
    mean = np.trace(c_xx) / WIDTH
    expected = c_yx @ np.linalg.inv(c_xx + 0.3 * mean * np.eye(WIDTH))
    np.testing.assert_allclose(fit_map(both, ridge=0.3).weight_YX, expected, atol=1e-12)
    expected = c_yx @ np.linalg.inv(0.8 * c_xx + 0.2 * mean * np.eye(WIDTH))
    np.testing.assert_allclose(fit_map(both, shrinkage=0.2).weight_YX, expected, atol=1e-12)


@pytest.mark.parametrize("rank", (1, 3, 5))
def test_low_rank_is_optimal_in_the_metric_of_the_inputs(rank):
    """Eckart and Young: what rank r adds to the error is the sum of the squared singular values of W C_xx^{1/2} beyond
    the r-th; no other map of that rank, that of the plain SVD of W among them, does better."""
    x, y = samples()
    both = moments(x, y)
    c_xx = both.covariance()[0]
    full, low = fit_map(both), fit_map(both, rank=rank)
    root = np.linalg.cholesky(c_xx)
    singular = np.linalg.svd(full.weight_YX @ root, compute_uv=False)
    added = squared_error(low, both) - squared_error(full, both)
    assert added == pytest.approx(np.sum(singular[rank:] ** 2), rel=1e-8)
    assert np.linalg.matrix_rank(low.weight_YX) == rank
    down, up = low.factors
    assert down.shape == (WIDTH, rank) and up.shape == (rank, WIDTH)
    np.testing.assert_allclose(down @ up, low.weight_YX.T, atol=1e-12)
    u, s, vt = np.linalg.svd(full.weight_YX)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    nudge = 0.01 * np.random.default_rng(2).normal(size=up.shape)
    for weight in (plain, (down @ (up + nudge)).T, ((down + nudge.T) @ up).T):
        other = type(low)(weight, both.mean_y - weight @ both.mean_x, None, 0.0)
        assert squared_error(other, both) > squared_error(low, both)
    np.testing.assert_allclose(fit_map(both, rank=WIDTH).weight_YX, full.weight_YX, atol=1e-12)


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("width, noise", ((1, 0.5), (3, 0.1), (3, 5.0), (6, 0.01)))
def test_cca_bound_holds_on_gaussians(residual, width, noise):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(300, width)) @ rng.normal(size=(width, width))
    both = moments(x, x @ rng.normal(size=(width, width)) + noise * rng.normal(size=(300, width)))
    bound, exact = cca_bound(both, residual=residual), nmse(fit_map(both), both, residual=residual)
    assert exact <= bound * (1 + 1e-9) and bound <= width + 1e-9
    if width == 1:  # one correlation: the bound is the error
        assert bound == pytest.approx(exact, rel=1e-9)


def test_cca_bound_is_the_sum_over_canonical_correlations():
    x, y = samples()
    both = np.cov(np.concatenate([x, y], axis=1).T)
    xx, yx, yy = both[:WIDTH, :WIDTH], both[WIDTH:, :WIDTH], both[WIDTH:, WIDTH:]
    rho_squared = np.linalg.eigvals(np.linalg.solve(yy, yx) @ np.linalg.solve(xx, yx.T)).real
    assert cca_bound(moments(x, y), residual=False) == pytest.approx(np.sum(1 - rho_squared), rel=1e-8)


def test_a_singular_covariance_gets_a_ridge():
    """A channel twice and one that never changes: the best ridge of the grid on other text, and finite maps."""
    x, y = samples(num=60)
    x_held, y_held = samples(num=500, seed=1)
    widen = lambda x: np.concatenate([x, x[:, :2], np.ones((len(x), 1))], axis=1)  # noqa: E731
    both, held_out = moments(widen(x), y), moments(widen(x_held), y_held)
    assert Regression.of(both).condition > MAX_CONDITION
    fit = fit_map(both, held_out)
    assert fit.ridge in RIDGES and np.isfinite(fit.weight_YX).all()
    best = min(squared_error(fit_map(both, ridge=ridge), held_out) for ridge in RIDGES)
    assert squared_error(fit, held_out) == best < variance(held_out)
    assert fit_map(both).ridge == RIDGES[0]  # without other text
    assert np.isfinite(fit_map(both, ridge=0.0).weight_YX).all()  # asked for: the least norm solution
    well = moments(x, y)
    assert Regression.of(well).condition < MAX_CONDITION and fit_map(well, moments(x_held, y_held)).ridge == 0


def test_a_branch_that_says_nothing_is_affine():
    x, _ = samples()
    both = moments(x, np.full_like(x, 2.0))
    fit = fit_map(both)
    assert nmse(fit, both) == 0
    np.testing.assert_allclose(apply(fit, x), 2.0, rtol=1e-12)
    assert np.isfinite(cca_bound(both))


def test_too_few_samples_are_refused():
    check_samples(12, 6)
    with pytest.raises(InputError, match="11 tokens are too few to fit maps of width 6; give at least 12"):
        check_samples(11, 6)
