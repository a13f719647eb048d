"""Hugging Face's Llama, Mistral, Qwen and Gemma: what their configs mean, and where their tensors go.

A family is one entry of ``FAMILIES``: the defaults of its config class, which saved configs leave out, and what it has
that others lack. Rotary embedding turns forward there and backward in nanochat; channels keep their order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from snlp_jax.config import ModelConfig, NormConfig, RopeConfig, RopeScaling
from snlp_jax.errors import InputError
from snlp_jax.model.convert.table import Row, Table, rows_of

TRAINING_LEN = 2048
"""``seq_len`` of an imported model, unless its context is shorter; fine-tuning may choose another."""
UNUSED_TENSORS = r".*rotary_emb\.inv_freq"
UNUSED_TIED = UNUSED_TENSORS + r"|lm_head\.weight"
"""A tied head is sometimes saved twice."""

LINEAR = {
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
"""Matrices of a layer, ours and theirs; those of some families have biases."""
NORMS = {
    "norms/attn": "input_layernorm",
    "norms/mlp": "post_attention_layernorm",
    "attn/query_norm": "self_attn.q_norm",
    "attn/key_norm": "self_attn.k_norm",
}
GEMMA_NORMS = NORMS | {
    "norms/attn_post": "post_attention_layernorm",
    "norms/mlp": "pre_feedforward_layernorm",
    "norms/mlp_post": "post_feedforward_layernorm",
}
ACTIVATIONS: dict[str, Literal["swiglu", "geglu"]] = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
SWITCHES = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Family:
    """What the models of one architecture have in common."""

    defaults: Mapping[str, Any]
    """Of the config class, where a saved config may leave them out."""
    is_gemma: bool = False
    """Factors 1 + w, norms behind the branches, embeddings times sqrt(D)."""
    has_qk_norm: bool = False
    biases: tuple[str, ...] | None = None
    """Projections of the attention that always have a bias, "qkv" and "out"; None: as ``attention_bias`` says."""


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
}
_MISTRAL = _COMMON | {"max_position_embeddings": 131_072, "sliding_window": 4096}
_QWEN = _COMMON | {
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_GEMMA2 = _COMMON | {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 2,
}
_GEMMA3 = _GEMMA2 | {
    "max_position_embeddings": 131_072,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(_COMMON),
    "MistralForCausalLM": Family(_MISTRAL, biases=()),
    "Qwen2ForCausalLM": Family(_QWEN, biases=("qkv",)),
    "Qwen3ForCausalLM": Family(_QWEN | {"head_dim": 128}, has_qk_norm=True),
    "Gemma2ForCausalLM": Family(_GEMMA2, is_gemma=True),
    "Gemma3ForCausalLM": Family(_GEMMA3, is_gemma=True, has_qk_norm=True),
}
"""Architecture, as ``config.json`` names it -> what it is."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, given as a mapping of its fields.

    Raises:
        InputError: the config names no architecture, or one that is not known.
    """
    names = config.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise InputError(f"the config's field 'architectures' names {names[0]}; known are {', '.join(FAMILIES)}.")
    return FAMILIES[names[0]]


def family_config(config: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The :class:`ModelConfig` of a Hugging Face config.

    Args:
        vocab_size: entries of the tokenizer, where the model has more, which are kept and whose logits are cut off.

    Raises:
        InputError: see :func:`family_of`; or a field is missing, or says what this library does not have.
    """
    family = family_of(config)
    values = _values(family, config)
    hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
    context, eps = values["max_position_embeddings"], float(values["rms_norm_eps"])
    weight: Literal["plain", "plus_one"] = "plus_one" if family.is_gemma else "plain"
    biases = family.biases
    if biases is None:
        biases = ("qkv", "out") if values.get("attention_bias", False) else ()
    activation = values.get("hidden_activation", values["hidden_act"])
    if activation not in ACTIVATIONS:
        raise InputError(f"the config's activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}.")
    letters, window = _windows(values)
    rope_base, rope = _rope(values, context, uses_local="S" in letters and "rope_local_base_freq" in family.defaults)
    entries = values["vocab_size"]
    scalar = values.get("query_pre_attn_scalar", 0)
    return ModelConfig(
        vocab_size=vocab_size or entries,
        vocab_multiple=entries,
        num_layers=values["num_hidden_layers"],
        embed_dim=hidden_size,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", num_heads),
        head_size=values.get("head_dim", hidden_size // num_heads),
        mlp=ACTIVATIONS[activation],
        mlp_dim=values["intermediate_size"],
        seq_len=min(context, TRAINING_LEN),
        context=context,
        window_pattern=_shortest_period(letters),
        short_window=window,
        ends_long=False,
        use_x0_resid=False,
        use_value_embeds=False,
        use_smear=False,
        use_mid_subtract=False,
        norm=NormConfig(weight=weight, eps=eps, use_post=family.is_gemma, use_embed=False),
        use_qkv_bias="qkv" in biases,
        use_out_bias="out" in biases,
        use_mlp_bias=bool(values.get("mlp_bias", False)),
        use_tied_head=bool(values["tie_word_embeddings"]),
        embed_scale=math.sqrt(hidden_size) if family.is_gemma else 1.0,
        use_qk_norm=family.has_qk_norm,
        attention_scale=float(scalar) ** -0.5 if scalar else 0.0,
        attention_softcap=float(values.get("attn_logit_softcapping", 0.0)),
        logit_softcap=float(values.get("final_logit_softcapping", 0.0)),
        rope_base=rope_base,
        rope=rope,
    )


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, and the class's defaults of those that it leaves out or sets to null."""
    given = {name: value for name, value in config.items() if value is not None or name in SWITCHES}
    values = {**family.defaults, **{name: 0 if value is None else value for name, value in given.items()}}
    for name in REQUIRED:
        if name not in values:
            raise InputError(f"the config lacks the field {name!r}.")
    if values.get("quantization_config"):
        raise InputError("the config has a 'quantization_config'; give the weights before quantization.")
    if values.get("use_bidirectional_attention"):
        raise InputError("the config's 'use_bidirectional_attention' is on; only causal models can be imported.")
    return values


def family_rows(config: ModelConfig) -> list[Row]:
    """Where every tensor of a model goes; see :func:`rows_of`."""
    vectors = {leaf: f"{name}.weight" for leaf, name in (GEMMA_NORMS if config.norm.use_post else NORMS).items()}
    vectors |= {f"{leaf}_bias": f"{name}.bias" for leaf, name in LINEAR.items()}
    same = {f"blocks/{leaf}": f"model.layers.{{}}.{name}" for leaf, name in vectors.items()}
    transposed = {f"blocks/{leaf}": f"model.layers.{{}}.{name}.weight" for leaf, name in LINEAR.items()}
    table: Table = {
        "same": same | {"embed/token": "model.embed_tokens.weight", "head/norm": "model.norm.weight"},
        "transposed": transposed | {"head/kernel": "lm_head.weight"},
    }
    return rows_of(config, table)


def _windows(values: Mapping[str, Any]) -> tuple[str, int]:
    """A letter for every layer, and the window of S: theirs counts the token itself, ours those before it."""
    num_layers = values["num_hidden_layers"]
    window = values.get("sliding_window", 0)
    is_qwen = "use_sliding_window" in values
    if not window or (is_qwen and not values["use_sliding_window"]):
        return "L" * num_layers, 0
    if "layer_types" in values:
        kinds = {"full_attention": "L", "sliding_attention": "S"}
        types = values["layer_types"]
        unknown = [kind for kind in types if kind not in kinds]
        if unknown or len(types) != num_layers:
            raise InputError(
                f"the config's layer_types name {len(types)} layers of {num_layers}, "
                f"of kinds {', '.join(sorted(set(types)))}; known are {', '.join(kinds)}."
            )
        letters = "".join(kinds[kind] for kind in types)
    elif "sliding_window_pattern" in values:
        letters = "".join("SL"[(i + 1) % values["sliding_window_pattern"] == 0] for i in range(num_layers))
    else:
        first = values.get("max_window_layers", 0)
        letters = "".join("LS"[i >= first] for i in range(num_layers))
    if "S" in letters and window < 2:
        raise InputError(f"the config's sliding_window is {window}; it must be at least 2.")
    return letters, window - 1 if "S" in letters else 0


def _rope(values: Mapping[str, Any], context: int, uses_local: bool) -> tuple[float, RopeConfig]:
    """Base and the rest, from either form: ``rope_parameters`` (one, or one a kind of layer), or ``rope_theta`` and
    ``rope_scaling``."""
    parameters = values.get("rope_parameters") or {}
    local_base = values.get("rope_local_base_freq", 0.0)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        local = parameters.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default":
            raise InputError(f"the rotary scaling {local['rope_type']!r} of sliding layers is not known.")
        local_base, parameters = local.get("rope_theta", local_base), parameters.get("full_attention", {})
    parameters = {**(values.get("rope_scaling") or {}), **parameters}
    base = float(parameters.get("rope_theta", values["rope_theta"]))
    fraction = float(parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
    return base, RopeConfig(
        "forward", fraction, float(local_base) if uses_local else 0.0, _scaling(parameters, context)
    )


def _scaling(parameters: Mapping[str, Any], context: int) -> RopeScaling:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"the rotary scaling {kind!r} is not known; known are linear, llama3 and yarn.")
    if "factor" not in parameters:
        raise InputError(f"the rotary scaling {kind!r} of the config lacks the field 'factor'.")
    factor, usual = float(parameters["factor"]), RopeScaling()
    original = int(parameters.get("original_max_position_embeddings") or context)
    number = lambda name: float(parameters.get(name) or getattr(usual, name))  # noqa: E731
    return RopeScaling(
        kind,
        factor,
        usual.original_context if kind == "linear" else original,
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        beta_fast=number("beta_fast"),
        beta_slow=number("beta_slow"),
        attention_factor=number("attention_factor") or _yarn_factor(factor, parameters) if kind == "yarn" else 0.0,
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_factor(factor: float, parameters: Mapping[str, Any]) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def _shortest_period(letters: str) -> str:
    """The shortest pattern that, tiled over the layers, gives these letters."""
    n = len(letters)
    return next(letters[:k] for k in range(1, n + 1) if (letters[:k] * n)[:n] == letters)
