"""Rotary embeddings of Hugging Face configs, in either form: ``rope_theta`` and ``rope_scaling``, or
``rope_parameters``.

Which form wins is as in transformers 5 (tests/data/config_table.json): ``rope_scaling`` replaces ``rope_parameters`` as
a whole, base included; where there is a dictionary a kind of layer, it is laid over that of full attention.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from snlp_jax.config import RopeConfig, RopeScaling
from snlp_jax.errors import InputError
from snlp_jax.model.convert.fields import LARGEST, REQUIRED, read_fields

KINDS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "dynamic": {"factor": REQUIRED},
    "llama3": {"factor": REQUIRED, "low_freq_factor": REQUIRED, "high_freq_factor": REQUIRED},
    "yarn": {
        "factor": REQUIRED,
        "attention_factor": None,
        "beta_fast": None,
        "beta_slow": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}
"""Scaling -> its fields, beside ``original_max_position_embeddings``. Dynamic scaling does nothing to texts within
the context, and no longer ones are admitted."""
PER_LAYER = ("full_attention", "sliding_attention")


class Rotary(NamedTuple):
    base: float
    rope: RopeConfig
    context: int
    """Tokens of the longest text."""


def read_rotary(values: Mapping[str, Any], has_sliding: bool) -> Rotary:
    """Base, scaling and context of a config whose fields have been read.

    YaRN and linear interpolation lengthen the context to ``factor`` times the original one; where layers differ in
    their rotary embeddings (Gemma 3) ``max_position_embeddings`` already says so.

    Args:
        has_sliding: whether any layer has a window.

    Raises:
        InputError: a field is missing or wrong, or the scaling is not known.
    """
    context = values["max_position_embeddings"]
    if "rope_local_base_freq" in values:
        base, scaling, local_base = _of_kinds(values, context, has_sliding)
        return Rotary(base, RopeConfig("forward", 1.0, local_base if has_sliding else 0.0, scaling), context)
    name = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    parameters = values[name] or {}
    if nested := [kind for kind in PER_LAYER if kind in parameters]:
        raise InputError(
            f"the config's field '{name}' holds {nested[0]!r}, but layers of this architecture share one rotary "
            "embedding; give its fields themselves."
        )
    base = _base(parameters, name, values["rope_theta"])
    outside = values["original_max_position_embeddings"]
    scaling, original = _scaling(parameters, name, values, outside)
    if scaling.kind in ("linear", "yarn"):
        context = min(max(context, round(scaling.factor * original)), LARGEST)
    return Rotary(base, RopeConfig("forward", scaling=scaling), context)


def _of_kinds(values: Mapping[str, Any], context: int, has_sliding: bool) -> tuple[float, RopeScaling, float]:
    """Base and scaling of full attention, and the base of sliding layers."""
    given = values["rope_parameters"] or {}
    if given and not set(PER_LAYER) & set(given):
        raise InputError(
            f"the config's field 'rope_parameters' holds none of {', '.join(PER_LAYER)}, between which this "
            "architecture distinguishes; put its fields into these."
        )
    kinds = read_fields(given, dict.fromkeys(PER_LAYER), "rope_parameters")
    full, sliding = ({"rope_type": "default"} if kinds[kind] is None else kinds[kind] for kind in PER_LAYER)
    full = {**full, **(values["rope_scaling"] or {})}
    base = _base(full, PER_LAYER[0], values["rope_theta"])
    local_base = _base(sliding, PER_LAYER[1], values["rope_local_base_freq"])
    scaling, _ = _scaling(full, PER_LAYER[0], values, None)
    kind = _kind(sliding, PER_LAYER[1])
    if has_sliding and kind != "default":
        raise InputError(f"the rotary scaling {kind[:60]!r} of sliding layers is not known; known is default.")
    return base, scaling, local_base


def _base(parameters: Mapping[str, Any], inside: str, default: float) -> float:
    return float(read_fields(parameters, {"rope_theta": default}, inside)["rope_theta"])


def _kind(parameters: Mapping[str, Any], inside: str) -> str:
    older = read_fields(parameters, {"type": "default"}, inside)["type"]
    return str(read_fields(parameters, {"rope_type": older}, inside)["rope_type"])


def _scaling(
    parameters: Mapping[str, Any], inside: str, values: Mapping[str, Any], outside: int | None
) -> tuple[RopeScaling, int]:
    """The scaling, and tokens of the texts before it. ``outside`` is the config's own number of these."""
    context = values["max_position_embeddings"]
    kind = _kind(parameters, inside)
    if kind not in KINDS:
        raise InputError(f"the rotary scaling {kind[:60]!r} of the config is not known; known are {', '.join(KINDS)}.")
    if kind == "default":
        return RopeScaling(), context
    if kind == "dynamic":
        read_fields(parameters, KINDS[kind], inside)
        return RopeScaling(), context
    share = {"partial_rotary_factor": values["partial_rotary_factor"]}
    if (part := read_fields(parameters, share, inside)["partial_rotary_factor"]) < 1:
        raise InputError(
            f"the config's field 'partial_rotary_factor' is {part} beside the rotary scaling {kind!r}; no known "
            "architecture has both, take the config.json that was saved with the weights."
        )
    usual = {"original_max_position_embeddings": context}
    inner = read_fields(parameters, usual, inside)["original_max_position_embeddings"]
    if inner is None:
        raise InputError(f"the config's field {inside}.original_max_position_embeddings is null; give a number.")
    original = inner if outside is None or kind == "linear" else outside
    if kind == "yarn" and parameters.get("factor", REQUIRED) is None:
        parameters = {**parameters, "factor": max(context / original, 1.0)}
    fields = read_fields(parameters, KINDS[kind], inside)
    return _make(kind, fields, original, inside), original


def _make(kind: str, fields: Mapping[str, Any], original: int, inside: str) -> RopeScaling:
    factor, usual = float(fields["factor"]), RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    slow, fast = (float(fields[name] or getattr(usual, name)) for name in (low, high))
    if slow >= fast:
        raise InputError(f"the config's field {inside}.{low} is {slow:g}; it must be smaller than {high}, {fast:g}.")
    if kind == "llama3":
        return RopeScaling("llama3", factor, original, low_freq_factor=slow, high_freq_factor=fast)
    attention = float(fields["attention_factor"] or _yarn_factor(factor, fields))
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_slow=slow,
        beta_fast=fast,
        attention_factor=attention,
        truncate=fields["truncate"],
    )


def _yarn_factor(factor: float, fields: Mapping[str, Any]) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0

    if fields["mscale"] and fields["mscale_all_dim"]:
        return scale(fields["mscale"]) / scale(fields["mscale_all_dim"])
    return scale(1.0)
