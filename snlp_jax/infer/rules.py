"""What a decoding engine may be asked for: the cache rules and their invariants, and drafters that make sense.

The rules, and why the invariants hold: docs/math.md, section 8.
"""

from typing import Literal, get_args

from snlp_jax.errors import InputError
from snlp_jax.notation import Drafter
from snlp_jax.solver import Diagonal, Exact, Kept, PerLayer, Schedule, SequentialSegment

CacheRule = Literal["last_eval", "refreshed", "per_iteration"]
KEPT: dict[CacheRule, Kept] = {"last_eval": "last", "refreshed": "refreshed", "per_iteration": "every"}


def check_settings(
    schedule: Schedule,
    rule: CacheRule,
    draft: Drafter | None,
    draft_len: int | None,
    max_draft: int | None,
    num_heads: int,
) -> None:
    """Refuse what has no invariant or no meaning; the arguments are those of :class:`Engine`, and the number of the
    model's multi-token-prediction heads.

    Raises:
        InputError: names the setting and what would do.
    """
    _check_rule(schedule, rule)
    if draft is not None:
        _check_draft(schedule, rule, draft, draft_len, max_draft)
    if draft == "mtp":
        _check_heads(draft_len, max_draft, num_heads)


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
        if isinstance(region.correction, Diagonal | Exact):
            name = type(region.correction).__name__
            raise InputError(
                f"cache rule 'per_iteration' needs surrogates that are a token's own, and {name} differentiates "
                "through attention; use another rule."
            )


def _check_draft(
    schedule: Schedule, rule: CacheRule, draft: Drafter, draft_len: int | None, max_draft: int | None
) -> None:
    if not schedule.is_sequential:
        raise InputError("speculation verifies with the sequential pass; give a solver setting or a drafter, not both.")
    if rule != "last_eval":
        raise InputError(f"a drafter reads the exact cache, so cache rule {rule!r} means nothing; leave it out.")
    if isinstance(draft, Schedule) and all(isinstance(segment, SequentialSegment) for segment in draft.segments):
        raise InputError("a drafter that is the sequential pass itself saves nothing; give another setting.")
    if max_draft is not None and max_draft < 1:
        raise InputError(f"max_draft is {max_draft}; it must be at least 1.")
    if draft_len is not None and draft_len < 1:
        raise InputError(f"the draft length is {draft_len}; it must be at least 1.")
    if draft_len is not None and max_draft is not None and draft_len > max_draft:
        raise InputError(f"a draft length of {draft_len} exceeds max_draft {max_draft}; change one.")


def _check_heads(draft_len: int | None, max_draft: int | None, num_heads: int) -> None:
    if num_heads == 0:
        raise InputError(
            "this model has no multi-token-prediction heads to draft with; train one with model.num_mtp_heads and "
            "loss.mtp.weight, or draft with a setting such as idn:n=8,k=1."
        )
    for name, count in (("a draft length", draft_len), ("a max_draft", max_draft)):
        if count is not None and count > num_heads:
            raise InputError(
                f"{name} of {count} exceeds the model's {num_heads} multi-token-prediction heads, each of which drafts "
                f"one token; ask for at most {num_heads}."
            )
