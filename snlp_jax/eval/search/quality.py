"""What a setting changes of perplexity: paired differences to the sequential pass on held-out windows, and bounds."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from snlp_jax.eval.fidelity import iterations_of, pass_over
from snlp_jax.layout import prepare
from snlp_jax.memory import check_room, program_bytes, rows_at_once
from snlp_jax.model import LanguageModel
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Array, Params


class Bounds(NamedTuple):
    """A PPL change and what it may be, as fractions."""

    low: float
    change: float
    high: float


EXACT = Bounds(0.0, 0.0, 0.0)


class Measured(NamedTuple):
    """Some windows under one setting."""

    total_W: np.ndarray
    """Of each window: the weighted sum of its tokens' differences."""
    weight_W: np.ndarray
    """Of each window: the weight of its tokens."""
    iterations: Sequence[np.ndarray] = ()
    """Of each region, [W]: how many were made."""

    def join(self, other: "Measured") -> "Measured":
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), self, other)

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
        self.model, self.params, self.fits = model, params, fits
        self.tokens, self.documents = windows["tokens"], windows.get("document")
        self.num_windows, self.num_tokens = self.tokens[:, 1:].shape
        self.weight_WT = np.asarray(windows.get("weight", np.ones((self.num_windows, self.num_tokens))), np.float64)
        rows = min(batch_size, self.num_windows)
        self.batch_size = rows_at_once(model.config, self.num_tokens, rows, backend=model.backend)
        self._programs: dict[Schedule, Any] = {}

    def measure(self, schedule: Schedule, start: int, stop: int) -> Measured:
        """Windows ``start`` to ``stop``."""
        nll_WT, *iterations = self._run(schedule, start, stop)
        weight_WT = self.weight_WT[start:stop]
        total_W = (weight_WT * (nll_WT - self._sequential_WT[start:stop])).sum(axis=1)
        return Measured(total_W, weight_WT.sum(axis=1), iterations)

    @cached_property
    def _sequential_WT(self) -> np.ndarray:
        return self._run(Schedule.of(self.model.config.num_layers), 0, self.num_windows)[0]

    def _inputs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self.tokens[rows], None if self.documents is None else self.documents[rows]

    def _program(self, schedule: Schedule, weights: Weights) -> Any:
        """Negative log-likelihoods [B, T] of windows, and [B] iterations of each region; compiled once a setting.

        Raises:
            InputError: it takes more memory than is free.
        """
        if schedule not in self._programs:

            def read(weights: Weights, window_BT: Array, document_BT: Array | None) -> tuple[Array, ...]:
                states, scores = pass_over(self.model, weights, window_BT, document_BT)
                return scores.nll_BT, *iterations_of(weights, states.solutions, len(window_BT))

            inputs = self._inputs(np.resize(np.arange(self.num_windows), self.batch_size))
            program = self._programs[schedule] = jax.jit(read).lower(weights, *inputs).compile()
            what = f"a setting of the search on {self.batch_size} windows of {self.num_tokens} tokens"
            check_room(what, program_bytes(program), "lower --seq-len or --batch-size, or give smaller --region-sizes")
        return self._programs[schedule]

    def _run(self, schedule: Schedule, start: int, stop: int) -> list[np.ndarray]:
        """As ``_program``, of windows ``start`` to ``stop``; as many at once every time, the last ones again."""
        num_tokens = self.batch_size * self.num_tokens
        weights = prepare(self.model, self.params, schedule, num_tokens=num_tokens, layout="stack", fits=self.fits)
        read = self._program(schedule, weights)
        parts = []
        for first in range(start, stop, self.batch_size):
            chosen = np.arange(first, min(first + self.batch_size, stop))
            rows = np.resize(chosen, self.batch_size)
            found = read(weights, *self._inputs(rows))
            parts.append([np.asarray(each, np.float64)[: len(chosen)] for each in found])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]
