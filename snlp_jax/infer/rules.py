"""What a decoding engine may be asked for: the cache rules and their invariants, and drafters that make sense.

The rules, and why the invariants hold: docs/math.md, section 8.
"""

import dataclasses
from dataclasses import dataclass
from typing import get_args

from jax.sharding import Mesh

from snlp_jax.config.check import require
from snlp_jax.errors import InputError
from snlp_jax.forward import CacheRule
from snlp_jax.infer import ngram
from snlp_jax.layout import Layout, Spread
from snlp_jax.notation import Drafter, parse_drafter
from snlp_jax.solver import Diagonal, Exact, ParallelSegment, PerLayer, Schedule, SequentialSegment

DRAFT_LEN = 3
"""Drafts a round where no number is asked for (docs/results.md, section 7)."""


@dataclass(frozen=True)
class Placement:
    """Where the weights lie and in which form; see :func:`snlp_jax.layout.prepare`."""

    mesh: Mesh | None = None
    sequential: Spread = "tensor"
    layout: Layout = "auto"
    """"stack" scans over layers in order, "list" unrolls them; "auto" scans where all windows are alike."""


@dataclass(frozen=True)
class Drafting:
    """Speculative decoding: what drafts, and how many tokens a round."""

    by: Drafter | str
    """A schedule, as text or parsed; "mtp": the model's heads that look further ahead; or "ngram": what followed the
    last tokens where they stood before."""
    length: int | None = None
    """Drafts a round. None takes 3, or as many as there are heads, or 7 with ngram, and drafts none while that is
    measured slower."""
    most: int | None = None
    """Drafts that the programs are compiled for, the length by default: the verification evaluates one token more."""

    def parsed(self, num_layers: int) -> "Drafting":
        """The same with the drafter parsed."""
        by = parse_drafter(self.by, num_layers) if isinstance(self.by, str) else self.by
        return dataclasses.replace(self, by=by)

    def lengths(self, num_heads: int) -> tuple[int, int]:
        """Drafts a round, and the most that the programs are compiled for."""
        usual = num_heads if self.by == "mtp" else ngram.DRAFT_LEN if self.by == "ngram" else DRAFT_LEN
        length = self.length or min(usual, self.most or usual)
        return length, self.most or length


def check_settings(schedule: Schedule, rule: CacheRule, drafting: Drafting | None = None, num_heads: int = 0) -> None:
    """Refuse what has no invariant or no meaning.

    Args:
        schedule, rule: see :class:`snlp_jax.infer.engine.Engine`.
        drafting: with the drafter parsed.
        num_heads: of the model, that look further ahead.

    Raises:
        InputError: names the setting and what would do.
    """
    known = get_args(CacheRule)
    require(rule in known, f"unknown cache rule {rule!r}; choose one of {', '.join(known)}.")
    for region in schedule.regions:
        if rule == "per_iteration":
            _check_each_evaluation(region)
        elif not isinstance(region.stage, PerLayer):
            raise InputError(
                f"cache rule {rule!r} has no exact limit for fused layers, whose iterations end at the fused model; "
                "use 'per_iteration', or these layers as a drafter."
            )
    if drafting is not None:
        _check_draft(schedule, rule, drafting, num_heads)


def _check_each_evaluation(region: ParallelSegment) -> None:
    wants, innermost = "cache rule 'per_iteration' needs", region.correction.innermost
    require(region.tolerance == 0, f"{wants} as many evaluations for every token; leave out tol=.")
    require(not region.init.is_oracle, f"{wants} a guess that no other token enters; leave out init=warm.")
    require(
        not isinstance(innermost, Diagonal | Exact),
        f"{wants} surrogates that are a token's own, and {type(innermost).__name__} differentiates through attention; "
        "use another rule.",
    )


def _check_draft(schedule: Schedule, rule: CacheRule, drafting: Drafting, num_heads: int) -> None:
    by, length, most = drafting.by, drafting.length, drafting.most
    require(
        schedule.is_sequential,
        "speculation verifies with the sequential pass; give a solver setting or a drafter, not both.",
    )
    require(
        rule == "last_eval", f"a drafter reads the exact cache, so cache rule {rule!r} means nothing; leave it out."
    )
    if isinstance(by, Schedule) and all(isinstance(segment, SequentialSegment) for segment in by.segments):
        raise InputError("a drafter that is the sequential pass itself saves nothing; give another setting.")
    require(most is None or most >= 1, f"max_draft is {most}; it must be at least 1.")
    require(length is None or length >= 1, f"the draft length is {length}; it must be at least 1.")
    if length is not None and most is not None and length > most:
        raise InputError(f"a draft length of {length} exceeds max_draft {most}; change one.")
    if by == "mtp":
        require(
            num_heads > 0,
            "this model has no multi-token-prediction heads to draft with; train one with model.num_mtp_heads and "
            "loss.mtp.weight, or draft with a setting such as idn:n=8,k=1.",
        )
        count = max(length or 0, most or 0)
        require(
            count <= num_heads,
            f"a draft length or max_draft of {count} exceeds the model's {num_heads} multi-token-prediction heads, "
            "each of which drafts one token.",
        )
