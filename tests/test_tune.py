"""Calibrations tuned by the model's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax import memory
from snlp_jax.config import ModelConfig
from snlp_jax.data.pipeline import TokenData
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import fit_spec, parse_calibration
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.linearize.tune import tune_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule

CONFIG = ModelConfig(num_layers=3, embed_dim=24, num_heads=1, num_kv_heads=1, seq_len=16, vocab_size=257)
SPEC = "c:n=3,k=1,rank=1,init_rank=2,tokens=512"


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


@pytest.mark.slow
def test_tuning_brings_the_output_nearer_on_other_text(setup: tuple[LanguageModel, dict, TokenData]) -> None:
    """Not the states: least squares is the best of their error already, on the text that it was fitted to."""
    model, params, data = setup
    kept = jax.tree.map(np.array, params)
    spec = parse_calibration(SPEC, 3)
    fitted, num_tokens = fit_spec(model, params, data, spec)
    windows = data.train[:850].astype(np.int32).reshape(50, 17)
    tuned = tune_calibration(model, params, spec.region, fitted, windows, num_steps=40)
    assert num_tokens == 512 and jax.tree.map(jnp.shape, tuned) == jax.tree.map(jnp.shape, fitted)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, params)), "the model stays as it is"

    held_out = data.val[:512].astype(np.int32).reshape(32, 16)
    schedule = parse_schedule("cal:n=3,k=1,init=cal,fit=c", 3)
    weights = [prepare(model, params, schedule, num_tokens=512, fits={"c": each}) for each in (fitted, tuned)]
    exact = prepare(model, params, parse_schedule("seq", 3), num_tokens=512)
    log_probs = jax.jit(lambda weights: jax.nn.log_softmax(forward(model, weights, held_out).logits_BTV))
    truth, before, after = (np.asarray(log_probs(each)) for each in (exact, *weights))
    divergences = [np.mean(np.sum(np.exp(truth) * (truth - found), axis=-1)) for found in (before, after)]
    assert 0 < divergences[1] < 0.95 * divergences[0]  # of rank one there is little to tune: 0.93


@pytest.mark.slow
def test_fits_do_not_depend_on_the_rows_at_once(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window at a time, with each layer computed again for the gradient, as all together."""
    model, params, data = setup
    spec = parse_calibration("c:n=3,k=1,kind=channel,init=h0,tokens=512", 3)
    windows = data.train[:850].astype(np.int32).reshape(50, 17)

    def fitted_and_tuned(start=None):
        fitted, _ = fit_spec(model, params, data, spec)
        return fitted, tune_calibration(model, params, spec.region, start or fitted, windows, num_steps=6)

    fitted, tuned = fitted_and_tuned()
    monkeypatch.setitem(memory.TRACE_BYTES, "cpu", 1)
    fitted_alone, tuned_alone = fitted_and_tuned(fitted)
    one = lambda calibration: np.asarray(calibration.layers["channel"])  # noqa: E731
    np.testing.assert_allclose(one(fitted_alone), one(fitted), rtol=1e-4, atol=1e-5)
    # Adam divides a gradient by its size, so that rounding counts where there is hardly any.
    moved = np.abs(one(tuned) - one(fitted)).mean()
    assert moved > 1e-4 and np.abs(one(tuned_alone) - one(tuned)).mean() < 0.01 * moved


def test_a_fit_that_cannot_be_held_is_refused(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"statistics of calibration 'c' would take .*give fewer layers"):
        fit_spec(*setup, parse_calibration(SPEC, 3))
