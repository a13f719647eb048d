"""Perplexity of two passes over the same windows, and how sure their difference is."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.eval.intervals import paired_ratio_interval
from snlp_jax.types import Array

NUM_POSITION_BINS = 8


def token_nll(logits_BTV: Array, targets_BT: Array) -> Array:
    """Negative log-likelihood of every target, [B, T] float32, in nats."""
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def token_mean(values_WT: np.ndarray, weight_WT: np.ndarray | None = None) -> float:
    """Mean over all windows and positions, or over those that count, by their weights."""
    return float(np.average(np.asarray(values_WT, np.float64), weights=weight_WT))


def perplexity(nll_WT: np.ndarray, weight_WT: np.ndarray | None = None) -> float:
    """``exp`` of the mean negative log-likelihood (:func:`token_mean`)."""
    return math.exp(min(token_mean(nll_WT, weight_WT), 700.0))


def relative_change(nll_WT: np.ndarray, reference_WT: np.ndarray, weight_WT: np.ndarray | None = None) -> float:
    """PPL / PPL of the reference - 1, both over the same windows."""
    return math.expm1(min(token_mean(nll_WT - reference_WT, weight_WT), 700.0))


def paired_interval(
    nll_WT: np.ndarray, reference_WT: np.ndarray, *, num_bootstrap: int, weight_WT: np.ndarray | None = None
) -> tuple[float, float] | None:
    """95 % interval of :func:`relative_change` by a paired bootstrap over windows; None with fewer than two.

    Every resample takes the same windows of both passes. How hard the windows are then cancels, and only how much the
    passes differ on them remains: the log of the ratio is the mean of the windows' differences, each counted by its
    weight.
    """
    weight_WT = np.ones(nll_WT.shape) if weight_WT is None else weight_WT
    total_W = (weight_WT * (nll_WT - reference_WT)).sum(axis=1, dtype=np.float64)
    interval = paired_ratio_interval(total_W, weight_WT.sum(axis=1, dtype=np.float64), num_bootstrap=num_bootstrap)
    return interval and (math.expm1(min(interval[0], 700.0)), math.expm1(min(interval[1], 700.0)))


def change_by_position(
    nll_WT: np.ndarray,
    reference_WT: np.ndarray,
    *,
    num_bins: int = NUM_POSITION_BINS,
    weight_WT: np.ndarray | None = None,
) -> tuple[float, ...]:
    """Mean change of the negative log-likelihood, in nats, in equal bins over the positions of a window; NaN where no
    position of a bin counts."""
    weight_WT = np.ones(nll_WT.shape) if weight_WT is None else weight_WT
    total_T = (weight_WT * (nll_WT - reference_WT)).sum(axis=0, dtype=np.float64)
    weight_T = weight_WT.sum(axis=0, dtype=np.float64)
    bins = (np.array_split(each_T, min(num_bins, len(each_T))) for each_T in (total_T, weight_T))
    sums = ((float(total.sum()), float(weight.sum())) for total, weight in zip(*bins, strict=True))
    return tuple(total / weight if weight > 0 else math.nan for total, weight in sums)
