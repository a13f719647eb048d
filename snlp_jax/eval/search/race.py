"""Which candidate to measure next, on how many windows, and when to stop.

With ``d_w`` the difference of the negative log-likelihoods of a candidate and of the sequential pass on window w, the
candidate's PPL change is ``exp(mean d_w) - 1``. After 16, 32, 64, ... windows its one-sided Student bounds say

    failed     the lower bound is above the limit
    passed     the upper bound is not
    beaten     something that has passed costs surely no more
    implied    something easier of the same family has failed by far

and whoever is none of these goes on with twice the windows. Each of the R looks spends alpha / R, so that a candidate
within the limit fails, and one above it passes, with probability alpha at most (to the accuracy of Student's interval).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from snlp_jax.eval.search.space import Candidate

FIRST_RUNG = 16
"""Windows of the first look."""
NEW_COST = 64
"""Windows whose evaluation takes as long as the compilation of a new candidate, roughly."""
MARGIN = 0.5
"""A failure implies that of harder candidates if the lower bound exceeds the limit by this share of it, ..."""
LEAST_MARGIN = 1e-3
"""... and by so much at least: the order of candidates is a guide, not a theorem."""
NOISE = 0.05
"""Relative error of measured costs: a program that is compiled and laid out in memory anew may differ by as much."""

Status = Literal["open", "failed", "passed", "beaten", "implied", "undecided", "refuted"]


class Bounds(NamedTuple):
    """A PPL change and what it may be, as fractions."""

    low: float
    change: float
    high: float


class Sums(NamedTuple):
    """Of each window: the weighted sum of its tokens' differences, and their weight."""

    total_W: np.ndarray
    weight_W: np.ndarray

    def join(self, other: "Sums") -> "Sums":
        return Sums(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))

    def bounds(self, alpha: float) -> Bounds:
        """``exp(m -+ t s / sqrt(W)) - 1``: one-sided bounds of level ``alpha`` each, m = sum(total) / sum(weight).

        s is the deviation of ``(total_w - m weight_w) / mean(weight)``, the linearised ratio's.
        """
        W = len(self.total_W)
        mean = float(self.total_W.sum() / max(self.weight_W.sum(), 1e-9))
        if W < 2:
            return Bounds(-math.inf, _expm1(mean), math.inf)
        residual_W = (self.total_W - mean * self.weight_W) / max(self.weight_W.mean(), 1e-9)
        half = -float(stdtrit(W - 1, alpha)) * math.sqrt(float(residual_W @ residual_W) / (W - 1) / W)
        return Bounds(_expm1(mean - half), _expm1(mean), _expm1(mean + half))


def rungs_of(num_windows: int) -> tuple[int, ...]:
    """Windows after which the race looks: 16, 32, ... and ``num_windows``."""
    rungs = [FIRST_RUNG]
    while rungs[-1] * 2 < num_windows:
        rungs.append(rungs[-1] * 2)
    return (*(rung for rung in rungs if rung < num_windows), num_windows)


class Race:
    """Finds the cheapest candidates that keep within the limit.

    Args:
        costs: of each candidate, predicted or measured.
        slack: relative error of predicted costs: a passed candidate beats only what is dearer by more. Of two measured
            costs, as those of lossless candidates are, the error is ``NOISE`` at most.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        costs: Sequence[float],
        limit: float,
        *,
        alpha: float,
        num_windows: int,
        slack: float = 0.0,
    ):
        self.candidates, self.costs, self.limit = candidates, np.asarray(costs, np.float64), limit
        self.rungs = rungs_of(num_windows)
        self.alpha = alpha / len(self.rungs)
        self.sums: dict[int, Sums] = {}
        self.refuted: set[int] = set()
        self._is_lossless_P = np.asarray([candidate.is_lossless for candidate in candidates])
        self.slack, self.is_timed_P = slack, self._is_lossless_P.copy()
        self._is_harder_PP = np.asarray([[one.is_harder_than(other) for other in candidates] for one in candidates])
        self._low_P = np.where(self._is_lossless_P, 0.0, -np.inf)
        self._high_P = np.where(self._is_lossless_P, 0.0, np.inf)

    def bounds(self, index: int) -> Bounds | None:
        """None before the first window."""
        if self._is_lossless_P[index]:
            return Bounds(0.0, 0.0, 0.0)
        return self.sums[index].bounds(self.alpha) if index in self.sums else None

    def statuses(self) -> list[Status]:
        """Of every candidate, from what is known now."""
        is_refuted_P = np.isin(np.arange(len(self.candidates)), list(self.refuted))
        has_passed_P = (self._high_P <= self.limit) & ~is_refuted_P
        is_beaten_P = np.any(self._beats_PP() & has_passed_P[:, None], axis=0)
        has_failed_by_far_P = self._low_P > self.limit + max(MARGIN * self.limit, LEAST_MARGIN)
        is_implied_P = np.any(self._is_harder_PP & has_failed_by_far_P, axis=1) & (self._seen_P() == 0)
        told: list[tuple[Status, Any]] = [
            ("refuted", is_refuted_P),
            ("failed", self._low_P > self.limit),
            ("beaten", is_beaten_P),
            ("passed", has_passed_P),
            ("implied", is_implied_P),
            ("undecided", self._seen_P() >= self.rungs[-1]),
        ]
        choices = np.select([mask for _, mask in told], range(len(told)), len(told))
        return [told[choice][0] if choice < len(told) else "open" for choice in choices]

    def _beats_PP(self) -> np.ndarray:
        """Whether the one is surely no dearer than the other; of equal ones the first."""
        are_timed_PP = self.is_timed_P[:, None] & self.is_timed_P[None]
        slack_PP = np.where(are_timed_PP, min(NOISE, self.slack), self.slack)
        mine, its = self.costs[:, None] * (1 + slack_PP), self.costs[None]
        order = np.arange(len(self.costs))
        return (mine < its) | ((mine == its) & (order[:, None] < order[None]))

    def next(self) -> tuple[int, int, int] | None:
        """A candidate and the windows it is to be measured on, from and to; None when all is decided.

        The one of which either outcome settles most: were it to pass, what is dearer; were it to fail, what is harder;
        for the windows that takes, a compilation counted as some.
        """
        is_open_P = np.asarray([status == "open" for status in self.statuses()])
        if not is_open_P.any():
            return None
        settled_if_passed_P = (self._beats_PP() & is_open_P).sum(axis=1)
        settled_if_failed_P = (self._is_harder_PP & is_open_P[:, None]).sum(axis=0)
        worth = {}
        for index in map(int, np.flatnonzero(is_open_P)):
            start, stop = self._windows(index)
            effort = stop - start + (0 if start else NEW_COST)
            worth[index] = (1 + min(settled_if_passed_P[index], settled_if_failed_P[index])) / effort
        best = max(worth, key=lambda index: (worth[index], -self.costs[index]))
        return best, *self._windows(best)

    def report(self, index: int, sums: Sums, cost: float | None = None) -> None:
        """What the windows asked for have shown; a cost that is known better now."""
        self.sums[index] = self.sums[index].join(sums) if index in self.sums else sums
        self._low_P[index], _, self._high_P[index] = self.sums[index].bounds(self.alpha)
        if cost is not None:
            self.costs[index] = cost

    def run(self, measure: Callable[[int, int, int], tuple[Sums, float | None]]) -> list[int]:
        """Ask and report until all is decided. Returns the passed ones that nothing beats, cheapest first."""
        while (request := self.next()) is not None:
            self.report(request[0], *measure(*request))
        standing = [index for index, status in enumerate(self.statuses()) if status == "passed"]
        return sorted(standing, key=lambda index: self.costs[index])

    def _seen_P(self) -> np.ndarray:
        """Windows so far."""
        return np.asarray([len(self.sums[i].total_W) if i in self.sums else 0 for i in range(len(self.candidates))])

    def _windows(self, index: int) -> tuple[int, int]:
        seen = len(self.sums[index].total_W) if index in self.sums else 0
        return seen, next(rung for rung in self.rungs if rung > seen)


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))
