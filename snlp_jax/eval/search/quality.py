"""What a setting changes of perplexity: paired differences to the sequential pass on held-out windows, and bounds."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from snlp_jax.eval.fidelity import pass_over
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, ParallelSegment, Schedule
from snlp_jax.types import Array, Params


class Bounds(NamedTuple):
    """A PPL change and what it may be, as fractions."""

    low: float
    change: float
    high: float


EXACT = Bounds(0.0, 0.0, 0.0)


class Sums(NamedTuple):
    """Of each window: the weighted sum of its tokens' differences, and their weight."""

    total_W: np.ndarray
    weight_W: np.ndarray

    def bounds(self, alpha: float) -> Bounds:
        """``exp(m -+ t s / sqrt(W)) - 1``: one-sided bounds of level ``alpha`` each, m = sum(total) / sum(weight).

        s is the deviation of ``(total_w - m weight_w) / mean(weight)``, the linearised ratio's.
        """
        W = len(self.total_W)
        mean, half = float(self.total_W.sum() / max(self.weight_W.sum(), 1e-9)), math.inf
        if W > 1:
            residual_W = (self.total_W - mean * self.weight_W) / max(self.weight_W.mean(), 1e-9)
            half = -float(stdtrit(W - 1, alpha)) * math.sqrt(float(residual_W @ residual_W) / (W - 1) / W)
        return Bounds(*(math.expm1(min(value, 700.0)) for value in (mean - half, mean, mean + half)))


class Measured(NamedTuple):
    """Some windows under one setting."""

    sums: Sums
    iterations: list[np.ndarray]
    """Of each region, [W]: how many were made."""

    def join(self, other: "Measured") -> "Measured":
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), self, other)


class Quality:
    """Paired differences to the sequential pass, which is run once.

    Args:
        windows: ``tokens`` [W, T + 1] and, where there are any, ``weight`` [W, T] and ``document`` [W, T + 1].
        batch_size: windows at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        windows: Mapping[str, np.ndarray],
        batch_size: int,
        fits: Mapping[str, Calibration],
    ):
        self.model, self.params, self.windows, self.fits = model, params, windows, fits
        self.num_windows, self.num_tokens = windows["tokens"][:, 1:].shape
        self.batch_size = min(batch_size, self.num_windows)
        self._nll = jax.jit(partial(_nll, model))

    def measure(self, schedule: Schedule, start: int, stop: int) -> Measured:
        """Windows ``start`` to ``stop``."""
        nll_WT, iterations = self._run(schedule, range(start, stop))
        difference_WT = nll_WT - self._sequential_WT[start:stop]
        weight_WT = self.windows.get("weight", np.ones((self.num_windows, self.num_tokens)))[start:stop]
        weight_WT = np.asarray(weight_WT, np.float64)
        return Measured(Sums((weight_WT * difference_WT).sum(axis=1), weight_WT.sum(axis=1)), iterations)

    @cached_property
    def _sequential_WT(self) -> np.ndarray:
        return self._run(Schedule.of(self.model.config.num_layers), range(self.num_windows))[0]

    def _run(self, schedule: Schedule, indices: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Negative log-likelihoods [W, T], and [W] iterations of each region."""
        num_tokens = self.batch_size * self.num_tokens
        weights = prepare(self.model, self.params, schedule, num_tokens=num_tokens, layout="stack", fits=self.fits)
        documents, parts = self.windows.get("document"), []
        for start in range(0, len(indices), self.batch_size):
            chosen = np.asarray(indices[start : start + self.batch_size])
            rows = np.resize(chosen, self.batch_size)  # one shape for all
            document_BT = None if documents is None else documents[rows]
            found = self._nll(weights, self.windows["tokens"][rows], document_BT)
            parts.append([np.asarray(each, np.float64)[: len(chosen)] for each in found])
        nll_WT, *iterations = (np.concatenate(each) for each in zip(*parts, strict=True))
        return nll_WT, iterations


def _nll(model: LanguageModel, weights: Weights, window_BT: Array, document_BT: Array | None) -> list[Array]:
    """Negative log-likelihoods, then the iterations of each region: all, unless a tolerance has stopped them."""
    output, nll_BT = pass_over(model, weights, window_BT, document_BT)
    regions = [segment for segment in weights.segments if isinstance(segment, ParallelSegment)]
    every = [jnp.full(nll_BT.shape[:1], region.num_iters) for region in regions]
    made = zip(output.solutions, every, strict=True)
    return [nll_BT, *(solution.stats.get("sequence_iters", most_B) for solution, most_B in made)]
