"""Perplexity of two passes over the same windows, and how sure their difference is."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.types import Array

BOOTSTRAP_SEED = 0
NUM_POSITION_BINS = 8


def token_nll(logits_BTV: Array, targets_BT: Array) -> Array:
    """Negative log-likelihood of every target, [B, T] float32, in nats."""
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def perplexity(nll_WT: np.ndarray) -> float:
    """``exp`` of the mean negative log-likelihood over all windows and positions."""
    return math.exp(min(np.mean(nll_WT, dtype=np.float64), 700.0))


def relative_change(nll_WT: np.ndarray, reference_WT: np.ndarray) -> float:
    """PPL / PPL of the reference - 1, both over the same windows."""
    return math.expm1(min(np.mean(nll_WT - reference_WT, dtype=np.float64), 700.0))


def paired_interval(
    nll_WT: np.ndarray, reference_WT: np.ndarray, *, num_bootstrap: int, seed: int = BOOTSTRAP_SEED
) -> tuple[float, float] | None:
    """95 % interval of :func:`relative_change` by a paired bootstrap over windows; None with fewer than two.

    Each of the ``num_bootstrap`` resamples draws windows with replacement and uses the same ones for both passes. How
    hard the windows are then cancels, and only how much the passes differ on them remains: the log of the ratio is the
    mean of the windows' differences. The same seed draws the same windows for every setting.
    """
    difference_W = (nll_WT - reference_WT).astype(np.float64).mean(axis=1)
    num_windows = len(difference_W)
    if num_windows < 2:
        return None
    picks = np.random.default_rng(seed).integers(num_windows, size=(num_bootstrap, num_windows))
    low, high = np.quantile(difference_W[picks].mean(axis=1), [0.025, 0.975])
    return math.expm1(min(low, 700.0)), math.expm1(min(high, 700.0))


def change_by_position(
    nll_WT: np.ndarray, reference_WT: np.ndarray, *, num_bins: int = NUM_POSITION_BINS
) -> tuple[float, ...]:
    """Mean change of the negative log-likelihood, in nats, in equal bins over the positions of a window."""
    change_T = (nll_WT - reference_WT).astype(np.float64).mean(axis=0)
    return tuple(float(part.mean()) for part in np.array_split(change_T, min(num_bins, len(change_T))))
