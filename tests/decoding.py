"""What decoding is held against: the whole forward pass over the text that came out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from problems import PLAIN, SMALL, random_params

from snlp_jax.config import MachineConfig
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.forward import forward
from snlp_jax.infer import Engine, Placement, Request
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule

TINY = dataclasses.replace(SMALL, num_layers=3, seq_len=8)
"""Every feature on; windows of 4, 4 and 8, so that a text of some dozens of tokens goes round every ring several times.
Rings that differ make the layers a list, unrolled."""
ALIKE = dataclasses.replace(TINY, window_pattern="L")
"""One window and so a scan over a stack, which compiles in half the time."""
SIMPLE = dataclasses.replace(PLAIN, num_layers=2, seq_len=8)
"""For what does not depend on the layers, such as sampling: the cheapest to compile."""
PROMPTS = (3, 14, 7, 5)
"""Lengths: shorter than each window and longer than both."""
NEW = 26
LENGTH = 40
"""Of the padded texts that the reference reads."""
ROUNDING = 3e-5
"""Logits of up to 15 in float32: two programs that add up in another order differ by 1.5e-5 each."""
TIE = 1e-4
"""Greedy tokens are compared where the two best logits are further apart than this."""


def engine_of(config, setting="seq", *, params=None, machine=MachineConfig(), **how):
    """An engine of random weights, whose tokens are the first bytes."""
    model, usual, _ = model_of(config, machine)
    return Engine(model, usual if params is None else params, setting, tokenizer=ByteTokenizer(), **how)


@functools.cache
def decoded(config, setting="seq", rule="last_eval", layout="auto", machine=MachineConfig()):
    """An engine, four requests and what it makes of them, for all tests of a file that ask for the same."""
    engine = engine_of(config, setting, rule=rule, placement=Placement(layout=layout), machine=machine)
    requests = requests_of(config)
    return engine, requests, engine.generate(requests)


def requests_of(config, new=NEW, lengths=PROMPTS, seed=3, **settings):
    """One request for each length, of random tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    return [Request(prompt, new, **settings) for prompt in prompts]


def model_of(config, machine=MachineConfig()):
    """Model, parameters, and its whole pass, which compiles once for all tests of a schedule."""
    return _model_of(config, machine)


@functools.cache
def _model_of(config, machine):
    model = LanguageModel(config, machine)
    run = jax.jit(lambda weights, tokens_BT: forward(model, weights, tokens_BT).logits_BTV)
    return model, random_params(model), run


@functools.cache
def calm_params(share=0.3, config=TINY):
    """Weights whose layers add a part of what they would: drafters that leave work out are often right, as with
    trained models, and often wrong."""

    def calm(path, leaf):
        return leaf * share if path[-1].key in ("out", "down") else leaf

    params = random_params(LanguageModel(config))
    return params | {"blocks": jax.tree_util.tree_map_with_path(calm, params["blocks"])}


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


def logits_after(
    config, setting, requests, completions, *, params=None, fits=None, length=LENGTH, machine=MachineConfig()
):
    """For every request the logits [new, V] of the whole pass, from which its new tokens were to be drawn."""
    model, usual, run = model_of(config, machine)
    tokens = np.zeros((len(requests), length), np.int32)
    for row, (request, done) in enumerate(zip(requests, completions, strict=True)):
        text = [*request.tokens, *done.tokens]
        tokens[row, : len(text)] = text
    schedule = parse_schedule(setting, config.num_layers)
    logits = np.asarray(run(split(model, usual if params is None else params, schedule, fits), tokens))
    pairs = zip(logits, requests, completions, strict=True)
    return [row[len(r.tokens) - 1 : len(r.tokens) - 1 + len(done.tokens)] for row, r, done in pairs]


def assert_log_probs(all_logits, completions, atol=ROUNDING):
    """Of every token, under the model itself."""
    for logits, done in zip(all_logits, completions, strict=True):
        expected = log_softmax(logits)[np.arange(len(done.tokens)), done.tokens]
        np.testing.assert_allclose(done.log_probs, expected, rtol=0, atol=atol)


def assert_is_the_whole_pass(config, setting, requests, completions, *, tie=TIE, atol=ROUNDING, **settings):
    """Every token is the likeliest after those before it, and its log-probability the whole pass's."""
    all_logits = logits_after(config, setting, requests, completions, **settings)
    for logits, request, done in zip(all_logits, requests, completions, strict=True):
        assert len(done.tokens) == request.max_new_tokens
        best = np.sort(logits, axis=-1)[:, -2:]
        is_clear = best[:, 1] - best[:, 0] > tie
        assert is_clear.mean() > 0.9
        np.testing.assert_array_equal(logits.argmax(-1)[is_clear], np.asarray(done.tokens)[is_clear])
    assert_log_probs(all_logits, completions, atol)
