"""Streaming moments: batches in any order and merging are one pass over all samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax.linearize import Moments


def pairs(num=600, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, 5)) @ rng.normal(size=(5, 5)) + offset
    return x, x @ rng.normal(size=(5, 3)) + rng.normal(size=(num, 3)) - offset


def joint(x, y):
    """[x; y]'s covariance by np.cov, cut into C_xx, C_yx, C_yy."""
    both = np.cov(np.concatenate([x, y], axis=1).T, bias=True)
    return both[:5, :5], both[5:, :5], both[5:, 5:]


@pytest.mark.parametrize("offset", (0.0, 1e6))
def test_batches_give_the_covariance_of_all_samples(offset):
    """An offset of a million leaves E[x x^T] - E[x] E[x]^T four digits; centred sums keep all but the data's own."""
    x, y = pairs(offset=offset)
    total = Moments.of(x[:7], y[:7], with_yy=True)
    for start, stop in ((7, 8), (8, 300), (300, 600)):
        total = total.merge(Moments.of(x[start:stop], y[start:stop], with_yy=True))
    xx, yx, yy = joint(x, y)
    rtol = 1e-12 if not offset else 1e-8  # float64; the samples are known to 1e-16 * offset
    np.testing.assert_allclose(total.covariance()[0], xx, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(total.covariance()[1], yx, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(total.yy / total.count, yy, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(total.mean_x, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.mean_y, y.mean(0), rtol=1e-12, atol=1e-12)
    assert total.count == 600
    raw_xx, raw_yx = total.covariance(centred=False)
    np.testing.assert_allclose(raw_xx, x.T @ x / 600, rtol=1e-12)
    np.testing.assert_allclose(raw_yx, y.T @ x / 600, rtol=1e-9)  # offsets of both signs cancel in some sums


def test_merging_is_associative_and_commutative():
    x, y = pairs(offset=100.0)
    a, b, c = (Moments.of(x[part], y[part]) for part in (slice(0, 50), slice(50, 400), slice(400, 600)))
    expected = Moments.of(x, y)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        for actual, desired in zip(merged[:5], expected[:5], strict=True):
            np.testing.assert_allclose(actual, desired, rtol=1e-10)  # float64 sums of 600 squares, in another order
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(a.merge(b).yx, expected.yx, rtol=1e-3)


def test_axes_between_samples_and_features_are_separate_problems():
    """On the device as on the host."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 2, 3)), rng.normal(size=(40, 2, 4))
    on_device = jax.jit(Moments.of)(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)).on_host()
    for index in range(2):
        alone = Moments.of(x[:, index], y[:, index])
        for actual, desired in zip(Moments.of(x, y)[1:5], alone[1:5], strict=True):
            np.testing.assert_allclose(actual[index], desired, rtol=1e-12, atol=1e-12)  # float64
        for actual, desired in zip(on_device[1:5], alone[1:5], strict=True):
            np.testing.assert_allclose(actual[index], desired, rtol=1e-5, atol=1e-4)  # float32 sums of forty products
