"""Weights to and from the authors' nanochat models."""

import dataclasses
import json
import os
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import from_nanochat, nanochat_config, to_nanochat
from snlp_jax.solver import Schedule

BASE = ModelConfig(vocab_size=100, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=4, seq_len=16)
VARIANTS = {
    "all": BASE,
    "no_x0_resid": dataclasses.replace(BASE, use_x0_resid=False),
    "no_value_embeds": dataclasses.replace(BASE, use_value_embeds=False),
    "hyper_connections": dataclasses.replace(BASE, use_x0_resid=False, num_streams=3),
    "grouped_heads": dataclasses.replace(BASE, num_kv_heads=2),
    "heads_ahead": dataclasses.replace(BASE, num_mtp_heads=2),
    "bare": dataclasses.replace(
        BASE, use_x0_resid=False, use_value_embeds=False, use_smear=False, use_mid_subtract=False
    ),
}
NANOCHAT = {"sequence_len": 16, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}


def random_params(config: ModelConfig) -> dict:
    """Parameters without a zero or a repeated value, unlike those of a fresh model."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), LanguageModel(config).abstract_params()
    )


def test_every_number_is_in_the_state_dict_once_and_comes_back() -> None:
    """A round trip alone would not notice a tensor that is written under two names."""
    for config in VARIANTS.values():
        params = random_params(config)
        state_dict = to_nanochat(params, config)
        chex.assert_trees_all_equal(from_nanochat(state_dict, config), params)
        written = np.concatenate([tensor.ravel() for tensor in state_dict.values()])
        given = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        np.testing.assert_array_equal(np.sort(written), np.sort(given))


def test_a_kernel_is_the_transpose_of_a_torch_weight() -> None:
    """Shapes of the authors' code, for a model in which no two axes of a tensor are alike."""
    config = VARIANTS["grouped_heads"]
    params = random_params(config)
    state_dict = to_nanochat(params, config)
    V, D, kv_dim = config.padded_vocab_size, config.embed_dim, 16
    shapes = {
        "transformer.wte.weight": (V, D),
        "lm_head.weight": (V, D),
        "transformer.h.1.attn.c_k.weight": (kv_dim, D),
        "transformer.h.1.mlp.c_fc.weight": (4 * D, D),
        "transformer.h.1.mlp.c_proj.weight": (D, 4 * D),
        "transformer.h.0.attn.ve_gate.weight": (2, 12),
        "value_embeds.2.weight": (V, kv_dim),
        "resid_lambdas": (3,),
        "smear_gate.weight": (1, 24),
        "smear_lambda": (1,),
    }
    assert {name: state_dict[name].shape for name in shapes} == shapes
    np.testing.assert_array_equal(state_dict["transformer.h.2.attn.c_q.weight"], params["blocks"]["attn"]["query"][2].T)
    assert "value_embeds.1.weight" not in state_dict  # every second layer, counted from the last


def test_logits_of_hyper_connections_keep_their_layout() -> None:
    """H_res acts on the left of the streams here and there, so it is not transposed."""
    config = VARIANTS["hyper_connections"]
    params = random_params(config)
    state_dict = to_nanochat(params, config)
    for branch, name in (("attn", "res"), ("mlp", "pre"), ("mlp", "post")):
        tensor = state_dict[f"transformer.h.1.hc_{branch}.H_{name}_logits"]
        np.testing.assert_array_equal(tensor, params["blocks"]["hyper"][branch][f"{name}_logits"][1])
    dynamic = dataclasses.replace(config, hyper_maps="dynamic")
    with pytest.raises(InputError, match="no tensor for 'blocks/hyper/attn/alpha'"):
        from_nanochat(state_dict, dynamic)


def test_tensors_that_the_model_does_not_read_are_ignored() -> None:
    """nanochat saves value embeddings and residual scalars even where they are switched off."""
    full, bare = VARIANTS["all"], dataclasses.replace(BASE, use_x0_resid=False, use_value_embeds=False)
    state_dict = {name: t for name, t in to_nanochat(random_params(full), full).items() if "ve_gate" not in name}
    assert {"resid_lambdas", "x0_lambdas", "value_embeds.0.weight"} <= set(state_dict)
    converted = from_nanochat(state_dict, bare)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, LanguageModel(bare).abstract_params())


def test_half_precision_becomes_float32() -> None:
    state_dict = {name: t.astype(np.float16) for name, t in to_nanochat(random_params(BASE), BASE).items()}
    chex.assert_trees_all_equal_dtypes(from_nanochat(state_dict, BASE), LanguageModel(BASE).abstract_params())


def test_bad_tensors_are_refused_by_name() -> None:
    state_dict = to_nanochat(random_params(BASE), BASE)
    name = "transformer.h.1.mlp.c_fc.weight"
    without = {key: tensor for key, tensor in state_dict.items() if key != name}
    with pytest.raises(InputError, match=rf"lacks the tensor '{name}'\.$"):
        from_nanochat(without, BASE)
    with pytest.raises(InputError, match=rf"tensor '{name}' has the shape \(32, 128\); the model needs \(128, 32\)\.$"):
        from_nanochat({**state_dict, name: state_dict[name].T}, BASE)
    with pytest.raises(InputError, match=r"holds the tensor 'mtp_projs\.0\.weight'"):
        from_nanochat({**state_dict, "mtp_projs.0.weight": np.zeros((32, 32))}, BASE)


def test_config_fields_carry_over() -> None:
    off = {"use_mhc": False, "mhc_num_streams": 4, "num_mtp_steps": 0, "mtp_loss_weight": 0.3}
    config = nanochat_config({**NANOCHAT, **off, "window_pattern": "SL", "no_x0_resid": True})
    assert config == ModelConfig(
        vocab_size=100, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, seq_len=16, window_pattern="SL",
        use_x0_resid=False,
    )  # fmt: skip


def test_hyper_connections_carry_over_and_imply_no_residual_scalars() -> None:
    plain = nanochat_config(NANOCHAT)
    assert nanochat_config({**NANOCHAT, "use_mhc": True}) == dataclasses.replace(
        plain, use_x0_resid=False, num_streams=4, sinkhorn_iters=10, sinkhorn_tau=0.05
    )
    details = {"mhc_num_streams": 2, "mhc_sinkhorn_iters": 7, "mhc_sinkhorn_tau": 0.1}
    assert nanochat_config({**NANOCHAT, "use_mhc": True, **details}) == dataclasses.replace(
        plain, use_x0_resid=False, num_streams=2, sinkhorn_iters=7, sinkhorn_tau=0.1
    )


def test_config_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="dropout"):
        nanochat_config({**NANOCHAT, "dropout": 0.1})
    with pytest.raises(InputError, match="n_head"):
        nanochat_config({name: value for name, value in NANOCHAT.items() if name != "n_head"})


def test_heads_that_look_ahead_carry_over() -> None:
    config = nanochat_config({**NANOCHAT, "num_mtp_steps": 2, "mtp_loss_weight": 0.3})
    assert config == dataclasses.replace(nanochat_config(NANOCHAT), num_mtp_heads=2)
    params = random_params(config)
    tensor = to_nanochat(params, config)["mtp_projs.1.weight"]
    np.testing.assert_array_equal(tensor, params["head"]["mtp"][1].T)


@pytest.mark.skipif("SNLP_GOLDEN" not in os.environ, reason="SNLP_GOLDEN does not name a folder of golden files")
@pytest.mark.parametrize("name", ["a_standard", "b_nox0ve", "d_mhc", "e_window_gqa"])
def test_converted_weights_give_the_authors_logits(name: str) -> None:
    """Arrays of the authors' PyTorch code; benchmarks/parity.py compares all the others."""
    golden = np.load(Path(os.environ["SNLP_GOLDEN"]) / f"{name}.npz")
    config = nanochat_config(json.loads(str(golden["config"])))
    params = from_nanochat({key[2:]: golden[key] for key in golden.files if key.startswith("w/")}, config)
    model = LanguageModel(config)
    output = jax.jit(lambda weights: forward(model, weights, golden["idx"]))(
        split(model, params, Schedule.of(config.num_layers))
    )
    expected = golden["seq/logits"] if "seq/logits" in golden else golden["seq/logits_sub"]
    logits = np.asarray(output.logits_BTV)
    got = logits if "seq/logits" in golden else logits[:, golden["pos"]]
    # Two float32 programs, each up to 1.5e-5 from float64.
    np.testing.assert_allclose(got, expected, atol=3e-5, rtol=0)
