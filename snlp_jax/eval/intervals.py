"""How sure shares and differences are: 95 % intervals for paired and unpaired measurements."""

import math

import numpy as np

BOOTSTRAP_SEED = 0
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

Interval = tuple[float, float]


def wilson_interval(num_right: int, num_examples: int) -> Interval:
    """95 % interval of a share (Wilson 1927): within [0, 1], with a width at 0 and 1, right from a few examples on."""
    from scipy.stats import binomtest  # not before: it takes as long to import as all of this package

    low, high = binomtest(num_right, num_examples).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def paired_share_interval(num_gained: int, num_lost: int, num_examples: int) -> Interval:
    """95 % interval of the difference of two shares over the same examples (Tango 1998).

    With b examples that only the first got right and c that only the second did, all differences d with

        |b - c - n d| <= z sqrt(n (2 q + d (1 - d))),

    q the likeliest probability of c under d: the interval that McNemar's test (d = 0, where the right side is
    ``z sqrt(b + c)``) belongs to. Unlike a bootstrap it has a width, +- z^2 / (n + z^2), where b = c = 0. It
    may exclude 0 where :func:`exact_p_value`, which is conservative, does not reject.
    """
    b, c, n = num_gained, num_lost, num_examples

    def distance(d: float) -> float:
        """Of what was seen from what d predicts, in standard deviations; falls with d."""
        half = ((2 * n - b + c) * d - b - c) / 2
        q = (math.sqrt(max(half * half + 2 * n * c * d * (1 - d), 0.0)) - half) / (2 * n)
        variance = n * (2 * q + d * (1 - d))
        difference = b - c - n * d
        return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)

    def falls_below(level: float, low: float, high: float) -> float:
        for _ in range(60):  # bisection that looks at neither end: there the deviation may be 0
            middle = (low + high) / 2
            low, high = (middle, high) if distance(middle) > level else (low, middle)
        return (low + high) / 2

    return falls_below(Z, -1.0, (b - c) / n), falls_below(-Z, (b - c) / n, 1.0)


def exact_p_value(num_gained: int, num_lost: int) -> float:
    """McNemar's exact test: how often coin flips would divide the b + c examples at least as unevenly. Two-sided."""
    from scipy.stats import binomtest

    total = num_gained + num_lost
    return float(binomtest(num_gained, total).pvalue) if total else 1.0


def paired_ratio_interval(difference_E: np.ndarray, size_E: np.ndarray, *, num_bootstrap: int) -> Interval | None:
    """95 % interval of ``sum(difference) / sum(size)`` by a bootstrap over examples; None with fewer than two.

    Differences of two passes over the same example, so how hard the examples are cancels. The same seed draws the same
    examples for every setting.
    """
    num_examples = len(difference_E)
    if num_examples < 2:
        return None
    picks = np.random.default_rng(BOOTSTRAP_SEED).integers(num_examples, size=(num_bootstrap, num_examples))
    ratios = difference_E[picks].sum(axis=1) / np.maximum(size_E[picks].sum(axis=1), 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
