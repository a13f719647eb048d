"""Knobs of the search for the fastest setting."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from snlp_jax.config.check import Between, Checked, Rule, Size
from snlp_jax.errors import InputError

Objective = Literal["decode", "prefill", "depth"]
Layers = Annotated[int, Rule(lambda value: value >= 2, "it must be at least 2")]
Confidence = Annotated[float, Rule(lambda value: 0.5 <= value < 1, "give a share from 0.5 to 1, such as 0.95")]


@dataclass(frozen=True)
class SearchConfig(Checked):
    """The search of eval.py; each field is also a flag of it. No part of a run's config."""

    search: bool = False
    """Instead of measuring given settings: find the fastest whose perplexity is at most so much higher than that of
    the sequential pass, and write it to RUN_DIR/solver.json."""
    max_ppl_increase: str = "1%"
    """The limit: 1%, or 0.01."""
    objective: Objective = "decode"
    """What is to be small: the time of a decoded token, of a forward over seq_len tokens, or the number of dependent
    block evaluations."""
    confidence: Confidence = 0.95
    """Of the intervals by which settings are dropped, passed and, on fresh windows, confirmed."""
    region_sizes: tuple[Layers, ...] = ()
    """Numbers of layers that are solved together; by default about a dozen."""
    max_iters: Size = 4
    tolerances: tuple[Between, ...] = (0.2, 0.5)
    """Of iterations that stop by themselves (not for objective decode)."""
    finalists: Size = 4
    """Settings that are timed together, and once more at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_share(self.max_ppl_increase)

    @property
    def limit(self) -> float:
        """The largest PPL / sequential PPL - 1."""
        return parse_share(self.max_ppl_increase)


def parse_share(text: str) -> float:
    """``1%`` or ``0.01`` as 0.01.

    Raises:
        InputError: no number, a negative one, or one from 1 on without a percent sign, which may mean either.
    """
    words = text.strip()
    try:
        number = float(words.removesuffix("%"))
    except ValueError:
        number = math.nan
    is_percent = words.endswith("%")
    if not math.isfinite(number) or number < 0:
        raise InputError(f"max_ppl_increase {text!r} is no share of 0 or more; write it as 1% or 0.01.")
    if number >= 1 and not is_percent:
        raise InputError(f"max_ppl_increase {text!r} may mean {words}% or {100 * number:g}%; write a percent sign.")
    return number / 100 if is_percent else number
