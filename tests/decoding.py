"""What decoding is held against: the whole forward pass over the text that came out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from problems import SMALL

from snlp_jax.forward import forward
from snlp_jax.infer.engine import Request
from snlp_jax.layout import split

TINY = dataclasses.replace(SMALL, num_layers=4, seq_len=8)
"""Every feature on; windows of 4 and 8, so that a text of some dozens of tokens turns every ring round several times."""
LOG_PROBS = {"rtol": 0, "atol": 3e-5}
"""Logits of up to 15 in float32: two programs that add up in another order differ by 1.5e-5 each."""
TIE = 1e-4
"""Greedy tokens are compared where the two best logits are further apart than this."""
LENGTH = 64
"""Of the padded texts that the reference reads."""


def requests_of(config, new, lengths, seed=3, **settings):
    """One request a length, of random tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    return [Request(prompt, new, **settings) for prompt in prompts]


def full_logits(model, params, schedule, texts, length=LENGTH):
    """Logits [B, length, V] of the whole pass over texts that are filled up behind their ends."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    run = jax.jit(lambda weights, tokens: forward(model, weights, tokens).logits_BTV)
    return np.asarray(run(split(model, params, schedule), jnp.asarray(tokens)))


def assert_is_what_the_full_pass_says(model, params, schedule, requests, completions, length=LENGTH, atol=None):
    """Every token is the likeliest after those before it, and its log-probability the full pass's."""
    texts = [[*request.tokens, *done.tokens] for request, done in zip(requests, completions, strict=True)]
    logits = full_logits(model, params, schedule, texts, length)
    for row, (request, done) in enumerate(zip(requests, completions, strict=True)):
        assert len(done.tokens) == request.max_new_tokens
        start = len(request.tokens)
        after = logits[row, start - 1 : start - 1 + len(done.tokens)]
        best = np.sort(after, axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > TIE
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(after.argmax(-1)[clear], np.asarray(done.tokens)[clear])
        log_probs = after - np.asarray(jax.nn.logsumexp(jnp.asarray(after), axis=-1))[:, None]
        expected = log_probs[np.arange(len(done.tokens)), done.tokens]
        np.testing.assert_allclose(done.log_probs, expected, **LOG_PROBS)
