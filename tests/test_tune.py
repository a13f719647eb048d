"""Calibrations tuned by the model's output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax.config import ModelConfig
from snlp_jax.data.pipeline import TokenData
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.eval.calibrations import fit_spec, parse_calibration
from snlp_jax.forward import forward
from snlp_jax.layout import in_order, prepare
from snlp_jax.linearize.tune import tune_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Calibration, PrefixState

CONFIG = ModelConfig(num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=2, seq_len=16, vocab_size=257)
SPEC = "c:n=3,k=1,rank=2,init_rank=4,tokens=1024"


@pytest.fixture(scope="module")
def setup() -> tuple[LanguageModel, dict, TokenData]:
    """A model whose layers do something, and text of words."""
    model = LanguageModel(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    for index, (part, name) in enumerate((("attn", "out"), ("mlp", "down"))):
        kernel = params["blocks"][part][name]
        params["blocks"][part][name] = 0.3 * jax.random.normal(jax.random.key(index), kernel.shape)
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = 0.4 * jax.random.normal(jax.random.key(2), kernel.shape)
    words = np.random.default_rng(0).choice([b"one ", b"two ", b"three "], 4000)
    tokens = np.frombuffer(b"".join(words), np.uint8).astype(np.uint16)
    return model, params, TokenData(ByteTokenizer(), tokens[2000:], tokens[:2000], "hash")


def divergence(model: LanguageModel, params: dict, calibration: Calibration, tokens_BT: np.ndarray) -> float:
    """Mean KL of the solver's distribution from the sequential one."""
    schedule = parse_schedule("cal:n=3,k=1,init=cal,fit=c", 4)
    weights = prepare(model, params, schedule, num_tokens=tokens_BT.size, fits={"c": calibration})
    log_probs = jax.jit(lambda weights: jax.nn.log_softmax(forward(model, weights, tokens_BT).logits_BTV))
    truth, found = log_probs(in_order(weights)), log_probs(weights)
    return float(jnp.mean(jnp.sum(jnp.exp(truth) * (truth - found), axis=-1)))


def test_tuning_brings_the_output_nearer_on_other_text(setup: tuple[LanguageModel, dict, TokenData]) -> None:
    """Not the states: least squares is the best of their error already, on the text that it was fitted to."""
    model, params, data = setup
    fitted, num_tokens = fit_spec(model, params, data, parse_calibration(SPEC, 4))
    tuned, same_tokens = fit_spec(model, params, data, parse_calibration(f"{SPEC},tune=40", 4))
    assert num_tokens == same_tokens == 1024
    assert jax.tree.map(jnp.shape, tuned) == jax.tree.map(jnp.shape, fitted)
    held_out = data.val[:512].astype(np.int32).reshape(32, 16)
    before, after = (divergence(model, params, each, held_out) for each in (fitted, tuned))
    assert 0 < after < 0.8 * before


def test_tuning_keeps_the_model_and_repeats_itself(setup: tuple[LanguageModel, dict, TokenData]) -> None:
    model, params, data = setup
    region = parse_calibration(SPEC, 4).region
    windows, kept = data.train[:170].astype(np.int32).reshape(10, 17), jax.tree.map(np.array, params)
    start = Calibration({"scale": jnp.ones((3, 1))}, {})
    region = dataclasses.replace(region, init=PrefixState())
    first, again = (tune_calibration(model, params, region, start, windows, num_steps=3) for _ in range(2))
    equal = lambda one, other: jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))  # noqa: E731
    assert equal(first, again) and not equal(first, start)
    assert equal(kept, params)
