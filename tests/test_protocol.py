"""A model of one's own, which inherits from nothing: decoding, the loss and evaluation read the protocol alone."""

from typing import Any

import jax
import numpy as np
from decoding import ROUNDING, SIMPLE, TIE, requests_of
from problems import random_params, random_tokens

from snlp_jax.config import LossConfig, SolverCEConfig
from snlp_jax.eval.fidelity import make_compare_fn
from snlp_jax.forward import forward
from snlp_jax.infer import Engine
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.model.protocol import READ_OF_A_MODEL
from snlp_jax.notation import parse_schedule
from snlp_jax.train.loss import Plan, loss_fn
from snlp_jax.train.passes import Passes
from snlp_jax.types import Batch


class Half:
    """The layers of the library's model with a head of its own: half the logits of the last layer's state alone.

    Of what it does not say itself it hands out the other model's; nothing else is read than what
    :mod:`snlp_jax.model.protocol` lists.
    """

    def __init__(self, inner: LanguageModel) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        assert name in READ_OF_A_MODEL, f"{name} is not in the protocol"
        return getattr(self._inner, name)

    def adapted(self, **how: Any) -> "Half":
        return Half(self._inner.adapted(**how))

    def padded_logits(self, params: Any, h_last: jax.Array, h_mid: jax.Array) -> jax.Array:
        return 0.5 * self._inner.unembed(params, h_last)


def test_a_model_of_ones_own_decodes_and_has_a_loss():
    """The text is greedy in the model's own logits, with a cache and by the solver as without."""
    model = Half(LanguageModel(SIMPLE))
    params, requests = random_params(LanguageModel(SIMPLE)), requests_of(SIMPLE, new=8)
    completions = Engine(model, params, "idn:n=2,k=1", rule="per_iteration").generate(requests)
    weights = split(model, params, parse_schedule("idn:n=2,k=1", 2))
    texts = [[*request.tokens, *done.tokens] for request, done in zip(requests, completions, strict=True)]
    tokens = np.stack([np.pad(text, (0, 24 - len(text))) for text in texts])
    logits = np.asarray(jax.jit(lambda w, t: forward(model, w, t).logits_BTV)(weights, tokens))
    for row, request, done in zip(logits, requests, completions, strict=True):
        row = row[len(request.tokens) - 1 :][: len(done.tokens)]
        assert (row.max(-1) - row[np.arange(8), done.tokens] < TIE).all()
        log_probs = np.asarray(jax.nn.log_softmax(row))[np.arange(8), done.tokens]
        np.testing.assert_allclose(done.log_probs, log_probs, rtol=0, atol=ROUNDING)

    batch = Batch(np.asarray(random_tokens(SIMPLE, length=9)))
    terms = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,)))
    plan, term_weights = Plan((("solver_ce", (2,)),)), {"solver_ce": 1.0}
    loss = lambda params: loss_fn(Passes(model, params, batch), terms, plan, term_weights)  # noqa: E731
    value, parts = jax.eval_shape(loss, params)
    assert value.shape == () and {"sequential_ce", "solver_ce"} <= set(parts)
    _, comparison = jax.eval_shape(make_compare_fn(model), weights, batch.tokens)
    assert comparison.kl_BT.shape == (2, 8)
