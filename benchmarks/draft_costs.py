"""Cost model of self-speculation.

    s(g) = v_W + c g

seconds for g drafts and a verification of W + 1 tokens, W >= g the least width that is compiled, against p of a plain
step. With drafts that are accepted independently at rate a it gives (1 + a + ... + a^g) p / s(g) times the speed of
plain decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of speculation by one drafter."""

    plain: float
    verify: dict[int, float]
    """Width W -> v_W."""
    draft: float

    def ratio(self, acceptance: float, draft_len: int) -> float:
        verify = self.verify[min(width for width in self.verify if width >= draft_len)]
        tokens = sum(acceptance**index for index in range(draft_len + 1))
        return tokens * self.plain / (verify + self.draft * draft_len)

    def best(self, acceptance: float) -> tuple[int, float]:
        """The draft length of the highest ratio, and that ratio."""
        best = max(range(1, max(self.verify) + 1), key=lambda length: self.ratio(acceptance, length))
        return best, self.ratio(acceptance, best)

    def acceptance_for(self, ratio: float) -> float | None:
        """The least one that reaches ``ratio`` by some draft length; None where not even 1 does."""
        if self.best(1.0)[1] < ratio:
            return None
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle)[1] >= ratio else (middle, high)
        return high


def fit_costs(plain: float, points: Sequence[tuple[int, int, float]]) -> tuple[Costs, float]:
    """s = v_W + c g by least squares through (W, g, s), and its largest relative error."""
    widths = sorted({width for width, _, _ in points})
    design = np.asarray([[*(float(width == each) for each in widths), length] for width, length, _ in points])
    seconds = np.asarray([each for _, _, each in points])
    *verify, draft = map(float, np.linalg.lstsq(design, seconds, rcond=None)[0])
    error = float(np.max(np.abs(design @ np.asarray([*verify, draft]) / seconds - 1)))
    return Costs(plain, dict(zip(widths, verify, strict=True)), max(draft, 0.0)), error
