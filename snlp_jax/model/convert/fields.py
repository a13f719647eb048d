"""Fields of other people's configs: what each may hold, and the sentence that refuses everything else."""

import typing
from collections.abc import Mapping
from typing import Annotated, Any

from snlp_jax.config.check import Rule, check_value
from snlp_jax.errors import InputError

REQUIRED = object()
"""In place of a default: a field that must be there."""
LARGEST = 2**31 - 1
SHOWN = 60
"""Characters of a value that a message repeats."""


def _whole(low: int, high: int = LARGEST) -> Any:
    return Annotated[int, Rule(lambda value: low <= value <= high, f"it must lie between {low} and {high}")]


def _real(above: float, high: float = 1e30) -> Any:
    return Annotated[float, Rule(lambda value: above < value <= high, f"it must be above {above:g}, at most {high:g}")]


_at_least_one = Annotated[float, Rule(lambda value: 1 <= value <= 1e9, "it must lie between 1 and 1e9")]
_beta = Annotated[float, Rule(lambda value: 0 <= value <= 1e9, "it must lie between 0 and 1e9")]

FIELDS: Mapping[str, Any] = {
    "architectures": tuple[str, ...] | None,
    "model_type": str | None,
    "vocab_size": _whole(2),
    "hidden_size": _whole(2),
    "intermediate_size": _whole(1),
    "num_hidden_layers": _whole(1, 10_000),
    "num_attention_heads": _whole(1),
    "num_key_value_heads": _whole(1) | None,
    "head_dim": _whole(2) | None,
    "hidden_act": str,
    "hidden_activation": str,
    "rms_norm_eps": Annotated[float, Rule(lambda value: 0 < value < 1, "it must lie between 0 and 1")],
    "tie_word_embeddings": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "max_position_embeddings": _whole(1),
    "sliding_window": _whole(-LARGEST) | None,
    "use_sliding_window": bool,
    "max_window_layers": _whole(0),
    "sliding_window_pattern": _whole(1),
    "layer_types": tuple[str, ...] | None,
    "query_pre_attn_scalar": _real(0),
    "attn_logit_softcapping": _real(0) | None,
    "final_logit_softcapping": _real(0) | None,
    "use_bidirectional_attention": bool | None,
    "quantization_config": dict | None,
    "rope_theta": _real(1),
    "rope_local_base_freq": _real(1),
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
    "full_attention": dict | None,
    "sliding_attention": dict | None,
    "partial_rotary_factor": Annotated[float, Rule(lambda value: 0 < value <= 1, "it must be above 0, at most 1")],
    "original_max_position_embeddings": _whole(1) | None,
    # Within the rotary dictionaries.
    "type": str,
    "rope_type": str,
    "factor": _at_least_one,
    "low_freq_factor": _real(0, 1e9),
    "high_freq_factor": _real(0, 1e9),
    "beta_fast": _beta | None,
    "beta_slow": _beta | None,
    "attention_factor": _real(0, 1e9) | None,
    "mscale": _beta | None,
    "mscale_all_dim": _beta | None,
    "truncate": bool,
}
"""Name -> what its value must be, null included where that means something."""


def read_fields(config: Mapping[str, Any], defaults: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """The values of some fields of a config; others are not looked at.

    Args:
        config: as json gives it.
        defaults: the fields, with what they are where the config leaves them out, or ``REQUIRED``.
        inside: name of the dictionary that holds the fields, for messages.

    Raises:
        InputError: a field is missing or holds something else than ``FIELDS`` says; named with its value.
    """
    return {name: _read(config, name, default, inside) for name, default in defaults.items()}


def _read(config: Mapping[str, Any], name: str, default: Any, inside: str) -> Any:
    value = config.get(name, default)
    place = f"the config's field {f'{inside}.{name}' if inside else name!r}"
    if value is REQUIRED:
        raise InputError(f"{place} is missing; take the config.json that was saved with the weights.")
    kind = FIELDS[name]
    if isinstance(value, list):
        value = tuple(value)
    elif value is not None and tuple[str, ...] in (kind, *typing.get_args(kind)) and not isinstance(value, tuple):
        raise InputError(f"{place} is {_shown(value)}; it must be a list.")
    try:
        check_value(kind, value, place)
    except InputError as error:
        raise InputError(str(error).replace(repr(value), _shown(value))) from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
