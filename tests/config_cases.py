"""Variations of config.json: base configs of six families of tiny models, and what each case changes.

``data/make_config_table.py`` shows them to transformers, ``test_config_table.py`` to this library.
"""

import math
import zlib
from typing import Any

import numpy as np

SHOWN_LEN = 24
TOKENS = [(7 * i * i + 3 * i + 1) % 40 for i in range(SHOWN_LEN)]
GONE = object()
"""A field that is left out."""

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6}


def _base(name: str, **fields: Any) -> dict[str, Any]:
    kind = {"Gemma3": "gemma3_text"}.get(name, name.lower())
    return {"architectures": [f"{name}ForCausalLM"], "model_type": kind, **_SIZES, **fields}


BASES = {
    "llama": _base("Llama"),
    "mistral": _base("Mistral", sliding_window=6),
    "qwen2": _base("Qwen2"),
    "qwen3": _base("Qwen3", head_dim=8),
    "gemma2": _base("Gemma2", **_GEMMA),
    "gemma3": _base("Gemma3", **_GEMMA),
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_FULL = LLAMA3 | {"original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
FULL, SLIDE = "full_attention", "sliding_attention"
PER_KIND = {FULL: LINEAR | {"rope_theta": 900.0}, SLIDE: {"rope_type": "default", "rope_theta": 50.0}}

_ROTARY: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 700.0},
    "theta_int": {"rope_theta": 700},
    "theta_null": {"rope_theta": None},
    "theta_text": {"rope_theta": "700"},
    "theta_zero": {"rope_theta": 0.0},
    "theta_negative": {"rope_theta": -5.0},
    "theta_nan": {"rope_theta": math.nan},
    "theta_list": {"rope_theta": [700.0]},
    "new_theta": {"rope_parameters": {"rope_theta": 700.0}},
    "new_default": {"rope_parameters": DEFAULT},
    "both_thetas": {"rope_theta": 700.0, "rope_parameters": DEFAULT},
    "new_empty": {"rope_parameters": {}},
    "new_null": {"rope_parameters": None},
    "new_list": {"rope_parameters": [DEFAULT]},
    "old_null": {"rope_scaling": None, "rope_theta": 700.0},
    "old_empty": {"rope_scaling": {}, "rope_parameters": DEFAULT},
    "old_text": {"rope_scaling": "linear"},
    "old_linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 700.0},
    "old_linear_int": {"rope_scaling": {"type": "linear", "factor": 2}},
    "old_linear_no_factor": {"rope_scaling": {"type": "linear"}},
    "old_linear_null_factor": {"rope_scaling": {"type": "linear", "factor": None}},
    "old_linear_text_factor": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "old_linear_small": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "old_linear_huge": {"rope_scaling": {"type": "linear", "factor": 1e400}},
    "old_both_names": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "old_dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 700.0},
    "old_theta_inside": {"rope_scaling": LINEAR | {"rope_theta": 300.0}, "rope_theta": 700.0},
    "old_unknown": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "old_no_type": {"rope_scaling": {"factor": 2.0}},
    "old_type_null": {"rope_scaling": {"rope_type": None, "factor": 2.0}},
    "old_type_number": {"rope_scaling": {"rope_type": 3, "factor": 2.0}},
    "new_linear": {"rope_parameters": LINEAR, "rope_theta": 700.0},
    "new_linear_theta": {"rope_parameters": LINEAR | {"rope_theta": 300.0}},
    "old_beside_new_default": {"rope_scaling": YARN, "rope_parameters": DEFAULT},
    "old_beside_new_default_theta": {"rope_scaling": YARN, "rope_parameters": DEFAULT, "rope_theta": 900.0},
    "old_beside_new_linear": {"rope_scaling": LLAMA3_FULL, "rope_parameters": LINEAR},
    "old_default_beside_new_yarn": {"rope_scaling": {"type": "default"}, "rope_parameters": YARN},
    "old_longrope_beside_new": {"rope_scaling": LONGROPE, "rope_parameters": DEFAULT},
    "llama3": {"rope_parameters": LLAMA3_FULL | {"rope_theta": 500.0}},
    "llama3_no_original": {"rope_parameters": LLAMA3},
    "llama3_original_outside": {"rope_parameters": LLAMA3_FULL, "original_max_position_embeddings": 16},
    "llama3_no_low": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
    "llama3_low_above_high": {"rope_scaling": LLAMA3_FULL | {"low_freq_factor": 8.0}},
    "yarn": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "yarn_old": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn_no_original": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn_original_null": {"rope_scaling": YARN | {"original_max_position_embeddings": None}},
    "yarn_original_float": {"rope_scaling": YARN | {"original_max_position_embeddings": 16.0}},
    "yarn_original_outside": {"rope_scaling": YARN | {"beta_fast": 8}, "original_max_position_embeddings": 32},
    "yarn_same_context": {"rope_scaling": YARN | {"original_max_position_embeddings": 64}},
    "yarn_factor_null": {"rope_scaling": YARN | {"factor": None}},
    "yarn_factor_one": {"rope_scaling": YARN | {"factor": 1.0}},
    "yarn_no_factor": {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}},
    "yarn_attention": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn_attention_zero": {"rope_scaling": YARN | {"attention_factor": 0.0}},
    "yarn_attention_null": {"rope_scaling": YARN | {"attention_factor": None}},
    "yarn_mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn_mscale_alone": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn_mscale_equal": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn_mscale_zero": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}},
    "yarn_mscale_attention": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "attention_factor": 1.1}},
    "yarn_betas": {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 0.5}},
    "yarn_betas_zero": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}},
    "yarn_betas_swapped": {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}},
    "yarn_not_truncated": {"rope_scaling": YARN | {"truncate": False, "beta_fast": 4}},
    "yarn_truncate_null": {"rope_scaling": YARN | {"truncate": None, "beta_fast": 4}},
    "yarn_extra": {"rope_scaling": YARN | {"finetuned": True}},
    "longrope": {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 32}},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 500.0}},
    "partial": {"partial_rotary_factor": 0.5},
    "partial_inside": {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
    "partial_linear": {"rope_scaling": LINEAR, "partial_rotary_factor": 0.5},
    "partial_yarn": {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
    "partial_text": {"rope_scaling": LINEAR, "partial_rotary_factor": "0.5"},
    "linear_original": {"rope_scaling": LINEAR | {"original_max_position_embeddings": 16}},
    "yarn_long_waves": {"rope_scaling": YARN | {"original_max_position_embeddings": 4096}, "rope_theta": 1e6},
    "dynamic_new": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 300.0}},
    "dynamic_no_factor": {"rope_scaling": {"type": "dynamic"}},
    "partial_one_linear": {"rope_scaling": LINEAR, "partial_rotary_factor": 1.0},
    "per_kind": {"rope_parameters": PER_KIND},
}
_LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "extra": {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "something": {"new": [1]}},
    "dtype": {"torch_dtype": "bfloat16"},
    "dtype_new": {"dtype": "float16"},
    "no_model_type": {"model_type": GONE},
    "model_type_alone": {"architectures": GONE},
    "architectures_empty": {"architectures": []},
    "architectures_null": {"architectures": None},
    "architectures_text": {"architectures": "LlamaForCausalLM"},
    "architectures_and_model_type_differ": {"model_type": "qwen2"},
    "base_model": {"architectures": ["LlamaModel"]},
    "model_type_unknown": {"model_type": "llama9"},
    "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantized_null": {"quantization_config": None},
    "quantized_empty": {"quantization_config": {}},
    "tied": {"tie_word_embeddings": True},
    "tied_null": {"tie_word_embeddings": None},
    "tied_text": {"tie_word_embeddings": "true"},
    "tied_number": {"tie_word_embeddings": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "bias_null": {"attention_bias": None},
    "head_dim": {"head_dim": 6},
    "head_dim_null": {"head_dim": None},
    "head_dim_zero": {"head_dim": 0},
    "head_dim_odd": {"head_dim": 7},
    "head_dim_negative": {"head_dim": -8},
    "head_dim_float": {"head_dim": 8.0},
    "heads_do_not_divide": {"num_attention_heads": 6},
    "heads_do_not_divide_head_dim": {"num_attention_heads": 6, "head_dim": 8},
    "kv_absent": {"num_key_value_heads": GONE},
    "kv_null": {"num_key_value_heads": None},
    "kv_one": {"num_key_value_heads": 1},
    "kv_zero": {"num_key_value_heads": 0},
    "kv_does_not_divide": {"num_key_value_heads": 3},
    "kv_list": {"num_key_value_heads": [2, 2, 1]},
    "layers_zero": {"num_hidden_layers": 0},
    "layers_float": {"num_hidden_layers": 3.0},
    "layers_text": {"num_hidden_layers": "3"},
    "layers_bool": {"num_hidden_layers": True},
    "width_null": {"hidden_size": None},
    "width_list": {"hidden_size": [32]},
    "mlp_list": {"intermediate_size": [24, 24, 24]},
    "vocab_one": {"vocab_size": 1},
    "vocab_null": {"vocab_size": None},
    "eps_absent": {"rms_norm_eps": GONE},
    "eps_null": {"rms_norm_eps": None},
    "eps_int": {"rms_norm_eps": 1},
    "eps_nan": {"rms_norm_eps": math.nan},
    "eps_text": {"rms_norm_eps": "1e-5"},
    "act_swish": {"hidden_act": "swish"},
    "act_gelu": {"hidden_act": "gelu"},
    "act_gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "act_gelu_new": {"hidden_act": "gelu_new"},
    "act_gelu_fast": {"hidden_act": "gelu_fast"},
    "act_relu": {"hidden_act": "relu"},
    "act_null": {"hidden_act": None},
    "act_list": {"hidden_act": ["silu"]},
    "act_of_gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "context_absent": {"max_position_embeddings": GONE},
    "context_null": {"max_position_embeddings": None},
    "context_float": {"max_position_embeddings": 64.0},
    "context_negative": {"max_position_embeddings": -1},
    "windows_of_mistral": {"sliding_window": 6},
    "windows_of_gemma": {"sliding_window": 6, "layer_types": [SLIDE, FULL, SLIDE]},
    "caps_of_gemma": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 12},
    "per_kind_with_types": {"rope_parameters": PER_KIND, "layer_types": [SLIDE, FULL, SLIDE]},
    "bidirectional": {"use_bidirectional_attention": True},
}
_MISTRAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "window_absent": {"sliding_window": GONE},
    "window_null": {"sliding_window": None},
    "window_zero": {"sliding_window": 0},
    "window_one": {"sliding_window": 1},
    "window_two": {"sliding_window": 2},
    "window_huge": {"sliding_window": 10**9},
    "window_negative": {"sliding_window": -4},
    "window_float": {"sliding_window": 6.0},
    "window_bool": {"sliding_window": True},
    "layer_types": {"layer_types": [SLIDE, FULL, SLIDE]},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "kv_absent": {"num_key_value_heads": GONE, "num_attention_heads": 8},
    "kv_null": {"num_key_value_heads": None},
    "head_dim": {"head_dim": 16},
    "head_dim_null": {"head_dim": None},
    "use_sliding_window": {"use_sliding_window": False},
}
_QWEN2: dict[str, dict[str, Any]] = {
    "plain": {"sliding_window": 6},
    "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "window_absent": {"use_sliding_window": True, "max_window_layers": 0},
    "window_null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "window_late": {"use_sliding_window": True, "sliding_window": 6},
    "window_zero": {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
    "window_off_zero": {"use_sliding_window": False, "sliding_window": 0},
    "max_window_null": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": None},
    "max_window_negative": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": -1},
    "types": {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, SLIDE, FULL]},
    "types_off": {"use_sliding_window": False, "sliding_window": 6, "layer_types": [FULL, SLIDE, FULL]},
    "types_null": {"use_sliding_window": True, "sliding_window": 6, "layer_types": None, "max_window_layers": 2},
    "types_short": {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, SLIDE]},
    "types_long": {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, SLIDE, FULL, SLIDE]},
    "types_unknown": {"layer_types": [FULL, "linear_attention", FULL]},
    "types_numbers": {"layer_types": [0, 1, 0]},
    "types_text": {"layer_types": FULL},
    "types_older_name": {"layer_types": ["attention"] * 3},
    "biases": {"attention_bias": False, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "head_dim_null": {"head_dim": None},
    "kv_absent": {"num_key_value_heads": GONE},
    "kv_null": {"num_key_value_heads": None},
    "switch_text": {"use_sliding_window": "false"},
    "per_kind": {"rope_parameters": PER_KIND},
}
_QWEN3: dict[str, dict[str, Any]] = {
    "plain": {},
    "head_dim_absent": {"head_dim": GONE},
    "head_dim_null": {"head_dim": None},
    "biases": {"attention_bias": True},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1000.0},
    "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "tied": {"tie_word_embeddings": True},
}
_GEMMA2: dict[str, dict[str, Any]] = {
    "plain": {},
    "act_old": {"hidden_act": "gelu"},
    "act": {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "silu"},
    "act_silu": {"hidden_activation": "silu"},
    "act_null": {"hidden_activation": None},
    "caps_null": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "cap_zero": {"attn_logit_softcapping": 0.0},
    "cap_text": {"final_logit_softcapping": "30"},
    "cap_int": {"final_logit_softcapping": 5},
    "pattern": {"sliding_window_pattern": 3},
    "types": {"layer_types": [FULL, FULL, SLIDE]},
    "window_null": {"sliding_window": None},
    "window_null_full": {"sliding_window": None, "layer_types": [FULL] * 3},
    "window_absent": {"sliding_window": GONE},
    "scalar_absent": {"query_pre_attn_scalar": GONE},
    "scalar_null": {"query_pre_attn_scalar": None},
    "scalar_zero": {"query_pre_attn_scalar": 0},
    "scalar_float": {"query_pre_attn_scalar": 12.5},
    "head_dim_absent": {"head_dim": GONE},
    "kv_null": {"num_key_value_heads": None},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 700.0},
    "per_kind": {"rope_parameters": PER_KIND},
}
_GEMMA3: dict[str, dict[str, Any]] = {
    "plain": {},
    "pattern": {"sliding_window_pattern": 2},
    "pattern_zero": {"sliding_window_pattern": 0},
    "pattern_text": {"sliding_window_pattern": "2"},
    "pattern_null": {"sliding_window_pattern": None},
    "pattern_hidden": {"_sliding_window_pattern": 2},
    "pattern_and_types": {"sliding_window_pattern": 2, "layer_types": [FULL, FULL, SLIDE]},
    "local": {"rope_local_base_freq": 70.0, "sliding_window_pattern": 2},
    "local_and_theta": {"rope_local_base_freq": 70.0, "rope_theta": 700.0, "sliding_window_pattern": 2},
    "old_linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
    "old_type": {"rope_scaling": {"type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
    "per_kind": {"rope_parameters": PER_KIND, "sliding_window_pattern": 2},
    "per_kind_and_old": {"rope_parameters": PER_KIND, "rope_scaling": YARN, "sliding_window_pattern": 2},
    "per_kind_and_theta": {"rope_parameters": PER_KIND, "rope_theta": 7.0, "sliding_window_pattern": 2},
    "per_kind_no_local": {"rope_parameters": {FULL: LINEAR}, "rope_local_base_freq": 70.0, "sliding_window_pattern": 2},
    "per_kind_null": {"rope_parameters": {FULL: None, SLIDE: None}, "sliding_window_pattern": 2},
    "per_kind_local_linear": {"rope_parameters": {FULL: DEFAULT, SLIDE: LINEAR}, "sliding_window_pattern": 2},
    "per_kind_text": {"rope_parameters": {FULL: "default", SLIDE: DEFAULT}, "sliding_window_pattern": 2},
    "flat": {"rope_parameters": DEFAULT, "sliding_window_pattern": 2},
    "flat_linear": {"rope_parameters": LINEAR, "rope_theta": 700.0, "sliding_window_pattern": 2},
    "all_full": {"layer_types": [FULL] * 3},
    "all_sliding": {"layer_types": [SLIDE] * 3},
    "caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "untied": {"tie_word_embeddings": False},
    "bidirectional": {"use_bidirectional_attention": True},
    "window_null": {"sliding_window": None},
}
_TEXT = {key: value for key, value in BASES["gemma3"].items() if key not in ("architectures",)}
_WHOLE: dict[str, dict[str, Any]] = {
    "conditional": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": _TEXT,
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    },
    "mamba": {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 32},
}


def _changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**base, **change}.items() if value is not GONE}


_CHANGES = {
    "llama": _LLAMA | {f"rope_{name}": {"head_dim": 16} | change for name, change in _ROTARY.items()},
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
}
CASES = {
    f"{family}/{name}": _changed(BASES[family], change)
    for family, changes in _CHANGES.items()
    for name, change in changes.items()
} | {f"whole/{name}": config for name, config in _WHOLE.items()}
"""Name -> config."""


def weights_of(name: str, shape: tuple[int, ...], is_gemma: bool) -> np.ndarray:
    """Weights of a tensor: multiples of 1/64 within +-1/4, by integer arithmetic from its name; factors of norms lie
    around 1."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    drawn = ((mixed >> np.uint64(40)) % np.uint64(33)).astype(np.float32).reshape(shape) / 64 - 0.25
    return drawn + np.float32("norm" in name and not is_gemma)
