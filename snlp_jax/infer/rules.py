"""What a decoding engine may be asked for: the cache rules and their invariants, and drafters that make sense.

The rules, and why the invariants hold: docs/math.md, section 8.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from jax.sharding import Mesh

from snlp_jax.errors import InputError
from snlp_jax.layout import Layout, Spread
from snlp_jax.notation import Drafter, parse_drafter
from snlp_jax.solver import Diagonal, Exact, PerLayer, Schedule, SequentialSegment

CacheRule = Literal["last_eval", "refreshed", "per_iteration"]
EVALUATIONS: dict[CacheRule, Literal["last", "refreshed", "every"]] = {
    "last_eval": "last",
    "refreshed": "refreshed",
    "per_iteration": "every",
}
"""Whose keys and values the cache keeps, see :class:`snlp_jax.forward.Keep`."""
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
    """A schedule, as text or parsed, or "mtp": the model's heads that look further ahead."""
    length: int | None = None
    """Drafts a round. None takes 3, or as many as there are heads, and drafts none while that is measured slower."""
    most: int | None = None
    """Drafts that the programs are compiled for, the length by default: the verification evaluates one token more."""

    def parsed(self, num_layers: int) -> "Drafting":
        """The same with the drafter parsed."""
        by = parse_drafter(self.by, num_layers) if isinstance(self.by, str) else self.by
        return dataclasses.replace(self, by=by)

    def lengths(self, num_heads: int) -> tuple[int, int]:
        """Drafts a round, and the most that the programs are compiled for."""
        usual = num_heads if self.by == "mtp" else DRAFT_LEN
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
    _check_rule(schedule, rule)
    if drafting is not None:
        _check_draft(schedule, rule, drafting)
        if drafting.by == "mtp":
            _check_heads(drafting, num_heads)


def _check_rule(schedule: Schedule, rule: CacheRule) -> None:
    if rule not in get_args(CacheRule):
        raise InputError(f"unknown cache rule {rule!r}; choose one of {', '.join(get_args(CacheRule))}.")
    for region in schedule.regions:
        if rule != "per_iteration":
            if not isinstance(region.stage, PerLayer):
                raise InputError(
                    f"cache rule {rule!r} has no exact limit for fused layers, whose iterations end at the fused "
                    "model; use 'per_iteration', or these layers as a drafter."
                )
            continue
        if region.tolerance > 0:
            raise InputError("cache rule 'per_iteration' needs as many evaluations for every token; leave out tol=.")
        if region.init.is_oracle:
            raise InputError(
                "cache rule 'per_iteration' needs a guess that no other token enters; leave out init=warm."
            )
        if isinstance(region.correction.innermost, Diagonal | Exact):
            name = type(region.correction.innermost).__name__
            raise InputError(
                f"cache rule 'per_iteration' needs surrogates that are a token's own, and {name} differentiates "
                "through attention; use another rule."
            )


def _check_draft(schedule: Schedule, rule: CacheRule, drafting: Drafting) -> None:
    by, length, most = drafting.by, drafting.length, drafting.most
    if not schedule.is_sequential:
        raise InputError("speculation verifies with the sequential pass; give a solver setting or a drafter, not both.")
    if rule != "last_eval":
        raise InputError(f"a drafter reads the exact cache, so cache rule {rule!r} means nothing; leave it out.")
    if isinstance(by, Schedule) and all(isinstance(segment, SequentialSegment) for segment in by.segments):
        raise InputError("a drafter that is the sequential pass itself saves nothing; give another setting.")
    if most is not None and most < 1:
        raise InputError(f"max_draft is {most}; it must be at least 1.")
    if length is not None and length < 1:
        raise InputError(f"the draft length is {length}; it must be at least 1.")
    if length is not None and most is not None and length > most:
        raise InputError(f"a draft length of {length} exceeds max_draft {most}; change one.")


def _check_heads(drafting: Drafting, num_heads: int) -> None:
    if num_heads == 0:
        raise InputError(
            "this model has no multi-token-prediction heads to draft with; train one with model.num_mtp_heads and "
            "loss.mtp.weight, or draft with a setting such as idn:n=8,k=1."
        )
    for name, count in (("a draft length", drafting.length), ("a max_draft", drafting.most)):
        if count is not None and count > num_heads:
            raise InputError(
                f"{name} of {count} exceeds the model's {num_heads} multi-token-prediction heads, each of which drafts "
                f"one token; ask for at most {num_heads}."
            )
