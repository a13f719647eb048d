"""What a schedule costs: exactly in depth, by a linear model in time.

    ms = ends + layer x layers in order + sweep x sweeps + swept x layers swept + scan x nodes corrected

The coefficients are fitted, none below zero, to some schedules that are measured; fused layers and each correction have
one of their own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from snlp_jax.solver import Chunkwise, Jacobi, ParallelSegment, Schedule, SequentialSegment

Parts = Counter[str]
NUM_SPARE = 3
"""Schedules measured beyond the number of coefficients: they tell how well the model predicts."""
RIDGE = 1e-3
EVAL_COST = 1e-4
"""Of equal depth the candidate with fewer block evaluations is cheaper."""


def depth_cost(schedule: Schedule, mean_depth: float | None = None) -> float:
    """Dependent block evaluations, then all of them."""
    depth = schedule.depth if mean_depth is None else mean_depth
    return depth + EVAL_COST * schedule.num_block_evals


def parts_of(schedule: Schedule, iterations: Sequence[float] | None = None) -> Parts:
    """How often a forward pass, or a decoded token, does each thing that takes time.

    Args:
        iterations: made in each region on average, where some stop by themselves; else all.
    """
    parts: Parts = Counter({"ends": 1})
    left = iter(iterations if iterations is not None else [region.num_iters for region in schedule.regions])
    for segment in schedule.segments:
        if isinstance(segment, SequentialSegment):
            parts["layer"] += segment.num_layers
        elif isinstance(segment, ParallelSegment):
            made = next(left)
            sweeps = segment.init.num_evals + made
            kind = "fused" if isinstance(segment.stage, Chunkwise) else "swept"
            parts["sweep"] += sweeps  # type: ignore[assignment]
            parts[kind] += sweeps * segment.num_layers  # type: ignore[assignment]
            if not isinstance(segment.correction, Jacobi):
                parts[f"scan {type(segment.correction).__name__}"] += made * segment.num_nodes  # type: ignore[assignment]
    return parts


def choose_probes(parts: Sequence[Parts]) -> list[int]:
    """Which to measure, the first one always: one by one that about whose time the others so far say least.

    That is the largest ``x^T (X^T X + r I)^-1 x``, x the parts, each divided by its largest count.
    """
    names = _names(parts)
    x_PF = _matrix(parts, names)
    x_PF = x_PF / np.maximum(x_PF.max(axis=0), 1e-9)
    gram_FF = RIDGE * np.eye(len(names))
    chosen: list[int] = []
    while len(chosen) < min(len(names) + NUM_SPARE, len(parts)):
        unknown_P = np.einsum("pf,fg,pg->p", x_PF, np.linalg.inv(gram_FF), x_PF)
        unknown_P[chosen] = -1.0
        best = int(unknown_P.argmax()) if chosen else 0
        chosen.append(best)
        gram_FF = gram_FF + np.outer(x_PF[best], x_PF[best])
    return chosen


@dataclass(frozen=True)
class CostModel:
    """See the module."""

    ms: dict[str, float]
    """Of one unit of each part."""
    error: float
    """Root mean square of the relative errors of what was measured, after the fit."""

    @classmethod
    def fit(cls, parts: Sequence[Parts], times_ms: Sequence[float]) -> "CostModel":
        """Least squares of the relative errors, coefficients >= 0."""
        names = _names(parts)
        relative_PF = _matrix(parts, names) / np.asarray(times_ms)[:, None]
        scale_F = np.maximum(relative_PF.max(axis=0), 1e-30)
        solution_F, _ = nnls(relative_PF / scale_F, np.ones(len(times_ms)))
        errors = relative_PF @ (solution_F / scale_F) - 1
        return cls(dict(zip(names, map(float, solution_F / scale_F), strict=True)), float(np.sqrt(np.mean(errors**2))))

    def predict(self, parts: Parts) -> float:
        return sum(count * self.ms[name] for name, count in parts.items())


def _names(parts: Sequence[Parts]) -> list[str]:
    return sorted(set().union(*parts))


def _matrix(parts: Sequence[Parts], names: Sequence[str]) -> np.ndarray:
    return np.asarray([[float(each[name]) for name in names] for each in parts])
