"""What transformers 5 makes of variations of config.json (``data/make_config_table.py``), and what we make of them."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from config_cases import BASES, CASES, SHOWN_LEN, TOKENS, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import TensorFiles, family_config, family_rows, read_params
from snlp_jax.model.convert.tensor_files import Tensor, write_files

TABLE = {row["name"]: row for row in json.loads((Path(__file__).parent / "data" / "config_table.json").read_text())}

REFUSED = {
    # Transformers computes numbers that are not finite, or attention to nothing.
    "llama/eps_nan": "rms_norm_eps",
    "llama/rope_theta_zero": "rope_theta",
    "llama/rope_theta_negative": "rope_theta",
    "llama/rope_theta_nan": "rope_theta",
    "llama/rope_old_linear_huge": "factor",
    "mistral/window_zero": "sliding_window is 0",
    "mistral/window_negative": "sliding_window is -4",
    "qwen2/window_zero": "sliding_window is 0",
    "gemma2/cap_zero": "attn_logit_softcapping",
    "llama/rope_yarn_attention_zero": "attention_factor",
    # It goes on with a warning, or without one, about what cannot have been meant.
    "llama/architectures_text": "it must be a list",
    "llama/architectures_and_model_type_differ": "model_type",
    "llama/quantized": "quantization_config",
    "llama/context_negative": "max_position_embeddings",
    "llama/rope_old_linear_small": "factor",
    "llama/rope_llama3_low_above_high": "low_freq_factor",
    "llama/rope_yarn_betas_swapped": "beta_slow",
    "llama/rope_yarn_original_float": "original_max_position_embeddings",
    "llama/rope_yarn_truncate_null": "truncate",
    "llama/rope_per_kind": "full_attention",
    "llama/per_kind_with_types": "full_attention",
    "qwen2/max_window_negative": "max_window_layers",
    "gemma3/flat": "full_attention",
    "gemma3/flat_linear": "full_attention",
    "gemma3/bidirectional": "use_bidirectional_attention",
    # This library lacks it.
    "llama/base_model": "LlamaModel",
    "llama/act_gelu": "'gelu'",
    "llama/act_relu": "'relu'",
    "llama/rope_longrope": "longrope",
    "llama/rope_old_longrope_beside_new": "longrope",
    "llama/rope_proportional": "proportional",
    "mistral/window_one": "sliding_window is 1",
    "gemma3/per_kind_local_linear": "linear",
}
"""Configs that transformers reads and we do not, and a word of the sentence."""
LENIENT = {
    "llama/heads_do_not_divide_head_dim",
    "mistral/kv_null",
    "qwen2/head_dim_null",
    "qwen3/head_dim_null",
    "gemma2/kv_null",
    "gemma2/cap_int",
    "gemma2/scalar_float",
    "gemma2/window_null_full",
}
"""Configs that transformers refuses and we read: a null for what follows from other fields, numbers of another type."""
BIASES = {"use_qkv_bias": ("q_proj", "k_proj", "v_proj"), "use_out_bias": ("o_proj",)}
BIASES |= {"use_mlp_bias": ("gate_proj", "up_proj", "down_proj")}
LOGITS = (
    "llama/biases",
    "llama/head_dim",
    "llama/act_gelu_fast",
    "llama/rope_old_beside_new_default_theta",
    "llama/rope_llama3_original_outside",
    "llama/rope_yarn_mscale",
    "mistral/window_two",
    "qwen2/types_null",
    "qwen3/yarn",
    "gemma2/caps",
    "gemma2/untied",
    "gemma3/caps",
    "gemma3/per_kind_and_old",
    "gemma3/all_sliding",
)


def outcome(config):
    try:
        return family_config(config)
    except InputError as error:
        return str(error)


def test_the_table_is_of_these_cases():
    """NaN equals nothing, hence the text."""
    assert {name: json.dumps(row["config"]) for name, row in TABLE.items()} == {
        name: json.dumps(config) for name, config in CASES.items()
    }
    assert len(TABLE) > 200


def test_what_is_read_and_what_is_refused():
    for name, row in TABLE.items():
        ours, is_read = outcome(row["config"]), "error" not in row["theirs"]
        if is_read and name not in REFUSED or name in LENIENT:
            assert isinstance(ours, ModelConfig), (name, ours)
            continue
        assert isinstance(ours, str), name
        assert ours.endswith(".") and "\n" not in ours and ("config" in ours or "rotary" in ours), (name, ours)
        assert name not in REFUSED or REFUSED[name] in ours, (name, ours)


def both():
    for name, row in TABLE.items():
        ours = outcome(row["config"])
        if isinstance(ours, ModelConfig) and "error" not in row["theirs"]:
            yield name, ours, row["theirs"]


def test_models_are_those_of_transformers():
    for name, ours, theirs in both():
        shown = [min(window, SHOWN_LEN - 1) for window in ours.windows]
        assert shown == theirs["windows"], name
        assert [ours.num_layers, ours.mlp_width, ours.embed_dim, ours.vocab_size] == theirs["sizes"], name
        assert [ours.num_heads, ours.num_kv_heads] == theirs["heads"] and ours.head_dim == theirs["head_dim"], name
        scale = ours.attention_scale or ours.head_dim**-0.5
        np.testing.assert_allclose([scale, ours.norm.eps], [theirs["scale"], theirs["eps"]], rtol=1e-6, err_msg=name)
        assert ours.use_tied_head == theirs["is_tied"], name
        biased = {leaf for switch, leaves in BIASES.items() if getattr(ours, switch) for leaf in leaves}
        assert sorted(biased) == theirs["biases"], name
        inputs = np.array([-1.0, 0.5, 2.0])
        values = {"swiglu": inputs / (1 + np.exp(-inputs)), "geglu": np.asarray(jax.nn.gelu(inputs))}
        np.testing.assert_allclose(values[ours.mlp], theirs["activation"], atol=1e-6, err_msg=name)
        assert ours.context >= theirs["context"] and ours.seq_len == min(theirs["context"], 2048), name


def test_rotary_tables_are_those_of_transformers():
    """At all positions of a text, with the factor."""
    for name, ours, theirs in both():
        shared = LanguageModel(ours).shared(np.zeros((1, SHOWN_LEN, 1), np.float32))
        tables = {"full_attention": (shared.cos_TH, shared.sin_TH)}
        tables[""] = tables["sliding_attention"] = tables["full_attention"]
        if shared.local_cos_TH is not None:
            tables["sliding_attention"] = (shared.local_cos_TH, shared.local_sin_TH)
        for kind, (frequencies, factor) in theirs["rotary"].items():
            angle_TH = np.arange(SHOWN_LEN)[:, None] * np.asarray(frequencies)
            cos_TH, sin_TH = tables[kind]
            np.testing.assert_allclose(cos_TH, factor * np.cos(angle_TH), atol=1e-5, err_msg=name)
            np.testing.assert_allclose(-sin_TH, factor * np.sin(angle_TH), atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "scaling, fields, context",
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, {}, 131_072),
        ({"type": "yarn", "factor": 4.0}, {}, 131_072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, {}, 32_768),
        ({"type": "yarn", "factor": 1.5, "original_max_position_embeddings": 32767}, {}, 49_150),
        ({"type": "linear", "factor": 2}, {}, 65_536),
        ({"type": "dynamic", "factor": 4.0}, {}, 32_768),
        ({"type": "yarn", "factor": 1e9}, {}, 2**31 - 1),
        (None, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 65_536),
    ],
)
def test_scaling_lengthens_the_context(scaling, fields, context):
    config = family_config(BASES["qwen3"] | {"max_position_embeddings": 32_768, "rope_scaling": scaling} | fields)
    assert (config.context, config.seq_len) == (context, 2048) and config.windows == (context,) * 3


def test_files_without_sizes_and_whole_models_are_told_what_to_do():
    for config, word in (
        ({"architectures": ["LlamaForCausalLM"]}, "'vocab_size' is missing"),
        ({"model_type": "mamba"}, "mamba"),
        ({}, "'architectures' names none"),
        (CASES["whole/conditional"], "save the text model in it alone"),
        (BASES["llama"] | {"hidden_size": 10**400}, "between 2 and"),
        (BASES["llama"] | {"hidden_act": "x" * 10_000}, "known are silu"),
        (BASES["llama"] | {"rope_scaling": {"rope_type": "x" * 10_000}}, "known are default"),
        (BASES["qwen2"] | {"layer_types": ["x" * 10_000] * 3}, "known for this architecture"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            family_config(config)
        assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- any change at all

ROTARY = sorted({name for config in CASES.values() for name in (config.get("rope_scaling") or {})} - {*"linear"})
NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([10**400, 2**31, 1e30, -0.0]))
WORDS = st.sampled_from(
    ["linear", "yarn", "llama3", "dynamic", "default", "silu", "full_attention", "", "\n", "é\ud800"]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*ROTARY, "full_attention", "sliding_attention"]), inner, max_size=6),
    ),
    max_leaves=8,
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(CASES)),
    st.dictionaries(
        st.sampled_from(sorted({name for config in CASES.values() for name in config})), VALUES, max_size=3
    ),
    st.sets(st.sampled_from(sorted(BASES["gemma3"])), max_size=1),
    st.dictionaries(st.sampled_from(ROTARY), SCALARS, max_size=3),
)
def test_any_config_is_read_or_refused_in_a_sentence(name, change, gone, rotary):
    """And what is read has a finite rotary table."""
    config = {**CASES[name], **change}
    if rotary and isinstance(config.get("rope_scaling"), dict):
        config["rope_scaling"] = config["rope_scaling"] | rotary
    ours = outcome({key: value for key, value in config.items() if key not in gone})
    if isinstance(ours, str):
        assert "\n" not in ours and len(ours) < 600
    else:
        assert 0 < ours.rope.scaling.table_factor < math.inf
        assert json.dumps(ours.letters) and len(ours.windows) == ours.num_layers


# ---------------------------------------------------------------- logits


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Weights are functions of their names on both sides."""
    row = TABLE[name]
    config = family_config(row["config"])
    rows = family_rows(config)
    is_gemma = name.startswith("gemma")
    tensors = [
        Tensor(tensor, each.shape_in_torch, lambda t=tensor, s=each.shape_in_torch: weights_of(t, s, is_gemma))
        for each in rows
        for tensor in each.names
    ]
    write_files(tmp_path, tensors, "float32", 2**30)
    params = read_params(TensorFiles(tmp_path), rows)
    logits_BTV = jax.jit(LanguageModel(config))(params, np.asarray([TOKENS]))
    np.testing.assert_allclose(logits_BTV[0, -1, :8], row["theirs"]["logits"], atol=2e-5, rtol=1e-5)
