"""Heads that look further ahead: their loss, and drafts that cost no layer."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import NEW, SIMPLE, TINY, assert_is_the_whole_pass, requests_of
from problems import VARIANTS, random_params, relative_error
from test_mesh import batch_of, value_and_grad
from test_sampling import assert_law, reference
from test_speculation import LAWS, PROMPT, SEEDS, sample, table
from tiny_run import MODEL, tiny

from snlp_jax.config import Config, LossConfig, MeshConfig, ModelConfig, MTPConfig, SolverCEConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.infer import Drafting, Engine, Placement
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_drafter
from snlp_jax.parallel import make_mesh
from snlp_jax.parallel.mesh import put_batch
from snlp_jax.parallel.sharding import TRAINING, shardings_of
from snlp_jax.solver import Schedule
from snlp_jax.train.loss import Plan, loss_fn
from snlp_jax.train.optim import param_labels
from snlp_jax.train.passes import Passes
from snlp_jax.train.step import init_state, make_step, optimizer_of
from snlp_jax.types import Batch

NUM_HEADS = 3
AHEAD = dataclasses.replace(SIMPLE, vocab_size=8, num_mtp_heads=NUM_HEADS, use_mid_subtract=True, logit_softcap=15.0)
"""Few words, so that drafts of random heads are right now and then."""
WEIGHT = 0.3


@functools.cache
def states_of(config):
    """Random weights, and ``run(tokens_BT, document_BT) -> (h_last, h_mid)`` of the whole pass with them."""
    model, params = LanguageModel(config), random_params(LanguageModel(config))
    weights = split(model, params, Schedule.of(config.num_layers))
    run = jax.jit(lambda weights, tokens_BT, document: forward(model, weights, tokens_BT, document_BT=document)[1:3])
    return params, lambda tokens_BT, document_BT=None: run(weights, tokens_BT, document_BT)


def heads_of(config, params, h_last, h_mid):
    """Logits [M, B, T, V] of all heads, from the formula."""
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["head"])
    y_BTD = np.asarray(h_last, np.float64) - head["mid_scale"] * np.asarray(h_mid, np.float64)
    y_BTD = y_BTD.sum(2) if config.num_streams else y_BTD
    y_MBTD = np.einsum("btd,mde->mbte", y_BTD, head["mtp"])
    rms_MBT1 = np.sqrt(np.mean(y_MBTD**2, -1, keepdims=True) + 1.1920929e-07)
    return 15 * np.tanh(y_MBTD / rms_MBT1 @ head["kernel"][:, : config.vocab_size] / 15)


# ---------------------------------------------------------------- loss


@functools.cache
def drawn():
    """Tokens [2, 9], weights of mean 1 and two documents in the first row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, AHEAD.vocab_size, (2, 9))
    weight = rng.uniform(size=(2, 8)).astype(np.float32)
    weight[0, 5] = 0
    return Batch(tokens, weight / weight.mean(), np.asarray([[0] * 4 + [1] * 5, [0] * 9]))


def loss_of(weight):
    """``params -> (value, parts)``."""
    config = LossConfig(mtp=MTPConfig(weight))
    return lambda params: loss_fn(Passes(LanguageModel(AHEAD), params, drawn()), config, Plan(), {})


def test_loss_is_the_formula_and_each_matrix_learns_from_its_own_term():
    """Position t of head k against token t + 1 + k with that token's weight, in the same document; the sum of heads."""
    params, run = states_of(AHEAD)
    tokens, weight_BT, document = drawn()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    h_last, h_mid = run(inputs, document[:, :-1])
    logits_MBTV = heads_of(AHEAD, params, h_last, h_mid)
    expected = []
    for k, logits_BTV in enumerate(logits_MBTV, start=1):
        total = 0.0
        for row in range(2):
            for t in range(8 - k):
                is_same = document[row, t] == document[row, t + 1 + k]
                weight = weight_BT[row, t + k] * is_same
                nll = np.log(np.exp(logits_BTV[row, t]).sum()) - logits_BTV[row, t, targets[row, t + k]]
                total += weight * nll
        expected.append(total / (2 * (8 - k)))
    (value, parts), grads = jax.device_get(jax.jit(jax.value_and_grad(loss_of(WEIGHT), has_aux=True))(params))
    # Logits of float32 states, which are 1e-5 from exact.
    assert parts["mtp"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert value == pytest.approx(parts["sequential_ce"] + WEIGHT * sum(expected), rel=1e-5)

    def own_term(matrix, k, y_BTD, kernel):
        """Of head k alone, its states given."""
        y_BTD = y_BTD[:, :-k] @ matrix
        y_BTD *= jax.lax.rsqrt(jnp.mean(y_BTD**2, -1, keepdims=True) + 1.1920929e-07)
        log_probs_BTV = jax.nn.log_softmax(15 * jnp.tanh(y_BTD @ kernel / 15))
        nll_BT = -jnp.take_along_axis(log_probs_BTV, targets[:, k:, None], axis=-1)[..., 0]
        nll_BT *= weight_BT[:, k:] * (document[:, : -k - 1] == document[:, k + 1 :])
        return WEIGHT * nll_BT.mean()

    head = params["head"]
    given = h_last - head["mid_scale"] * h_mid, head["kernel"][:, : AHEAD.vocab_size]
    terms = lambda matrices: sum(own_term(matrices[k - 1], k, *given) for k in range(1, NUM_HEADS + 1))  # noqa: E731
    # Each matrix is in one of the terms, so the gradient of the sum is that of its own.
    assert relative_error(grads["head"]["mtp"], jax.jit(jax.grad(terms))(head["mtp"])) < 1e-5


def test_without_weight_the_heads_cost_and_learn_nothing():
    params, _ = states_of(AHEAD)
    unread = params | {"head": params["head"] | {"mtp": jnp.full_like(params["head"]["mtp"], jnp.nan)}}
    value, parts = jax.jit(loss_of(0.0))(unread)
    assert "mtp" not in parts and value == parts["sequential_ce"] and np.isfinite(value)


def test_fresh_heads_say_what_the_next_token_head_says():
    model = LanguageModel(AHEAD)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert params["head"]["mtp"].shape == (NUM_HEADS, AHEAD.embed_dim, AHEAD.embed_dim)
    assert param_labels(params)["head"]["mtp"] == "matrix"
    params = {"head": jax.jit(lambda key: model.init(key)["head"])(jax.random.key(0))}
    h_last, h_mid = np.random.default_rng(0).normal(size=(2, 2, 1, AHEAD.embed_dim))
    logits_BMV = model.logits_ahead(params, h_last, h_mid, 2)
    np.testing.assert_allclose(logits_BMV, np.tile(model.logits(params, h_last, h_mid), (1, 2, 1)), atol=1e-6)


def test_configs_without_a_meaning_are_refused():
    for make, named in (
        (lambda: Config(loss=LossConfig(mtp=MTPConfig(0.3))), "num_mtp_heads is 0"),
        (lambda: ModelConfig(seq_len=16, num_mtp_heads=16), "num_mtp_heads is 16"),
        (lambda: ModelConfig(num_mtp_heads=-1), "num_mtp_heads is -1"),
        (lambda: MTPConfig(-0.1), "mtp.weight is -0.1"),
    ):
        with pytest.raises(InputError, match=named):
            make()
    # Heads that nothing trains are a control, or a model that is trained on for something else.
    Config(model=ModelConfig(num_mtp_heads=2))
    LossConfig(sequential_weight=0.0, mtp=MTPConfig(1.0))


@pytest.mark.slow
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device():
    mesh_config = MeshConfig(data=2, layer=2, tensor=2, ring_microbatches=2)
    config = dataclasses.replace(TINY, num_layers=4, num_mtp_heads=2)
    loss = LossConfig(mtp=MTPConfig(WEIGHT), solver_ce=SolverCEConfig(weight=0.5, region_sizes=(2,)))
    model, mesh, params = LanguageModel(config), make_mesh(mesh_config), random_params(LanguageModel(config))
    (value, parts), grads = value_and_grad(model, loss, None, 1)(params, batch_of(config))
    placed = jax.device_put(params, shardings_of(params, config, mesh, TRAINING))
    run = value_and_grad(model, loss, mesh, mesh_config.ring_microbatches)
    (its_value, its_parts), its_grads = run(placed, put_batch(mesh, batch_of(config), is_whole=True))
    np.testing.assert_allclose((its_value, its_parts["mtp"]), (value, parts["mtp"]), rtol=1e-5)
    for (path, grad), its_grad in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(its_grads), strict=True
    ):
        assert relative_error(its_grad, grad) < 1e-4, path  # sums in another order


@pytest.mark.slow
def test_microbatches_add_up_and_heads_without_a_loss_keep_what_they_say(tmp_path):
    """Without a gradient weight decay alone moves them, by a factor that the norm behind them takes out."""
    model_config = dataclasses.replace(MODEL, num_mtp_heads=2)
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 257, (4, 17)), rng.uniform(size=(4, 16)).astype(np.float32))
    found = {}
    for weight, parts in ((WEIGHT, 1), (WEIGHT, 2), (0.0, 1)):
        config = tiny(tmp_path / "run", num_microbatches=parts)
        config = dataclasses.replace(config, model=model_config, loss=LossConfig(mtp=MTPConfig(weight)))
        model = LanguageModel(model_config)
        optimizer = optimizer_of(model, config)
        state, metrics = make_step(model, optimizer, config)(init_state(model, optimizer, config), batch, plan=Plan())
        found[weight, parts] = metrics, state["params"]["head"]["mtp"]
    np.testing.assert_allclose(found[WEIGHT, 1][0]["mtp"], found[WEIGHT, 2][0]["mtp"], rtol=1e-5)
    np.testing.assert_allclose(found[WEIGHT, 1][0]["grad_norm"], found[WEIGHT, 2][0]["grad_norm"], rtol=1e-4)
    still, trained = found[0.0, 1][1], found[WEIGHT, 1][1]
    np.testing.assert_allclose(still, still[0, 0, 0] * np.tile(np.eye(32), (2, 1, 1)), atol=1e-7)
    assert 0.5 < float(still[0, 0, 0]) <= 1 and np.abs(trained - np.eye(32)[None]).max() > 1e-4


# ---------------------------------------------------------------- drafts


@functools.cache
def engine_of(config=AHEAD, length=None, most=None, placement=None):
    model = LanguageModel(config)
    return Engine(model, random_params(model), draft=Drafting("mtp", length, most), placement=placement)


def rounds_of(drafts_MT, text, start, new, draft_len):
    """Drafts that are tested and accepted in every round of a row, from the heads' likeliest tokens at every position.

    ``text``: greedy, longer than asked for by ``draft_len``: the last block looks past the end.
    """
    newest, rounds = start, []
    while newest < start + new - 1:
        drafts = drafts_MT[:draft_len, newest - 1]
        is_right = drafts == text[newest + 1 : newest + 1 + draft_len]
        count = int(np.cumprod(is_right).sum())
        rounds.append((min(count + 1, draft_len), count))
        newest += count + 1
    return rounds


def test_greedy_text_is_the_sequential_one_and_its_drafts_are_those_of_the_heads():
    """Drafts of every length, of rows that end at different times; counted against the formula at every position."""
    engine = engine_of(length=NUM_HEADS)
    requests = requests_of(AHEAD, NEW + NUM_HEADS)
    longer = engine.generate(requests)
    params, run = states_of(AHEAD)
    assert_is_the_whole_pass(AHEAD, "seq", requests, longer, params=params, length=64)
    texts = [np.asarray([*request.tokens, *done.tokens]) for request, done in zip(requests, longer, strict=True)]
    tokens = np.stack([np.pad(text, (0, 64 - len(text))) for text in texts])
    drafts_MBT = heads_of(AHEAD, params, *run(tokens)).argmax(-1)
    new_of = (NEW, 5, 2, 17)
    shorter = [dataclasses.replace(request, max_new_tokens=new) for request, new in zip(requests, new_of, strict=True)]
    for draft_len in (1, NUM_HEADS):
        engine.draft_len = draft_len
        for done, whole, new in zip(engine.generate(shorter), longer, new_of, strict=True):
            assert done.tokens == whole.tokens[:new]
        rows = [
            rounds_of(drafts_MBT[:, row], texts[row], len(requests[row].tokens), new, draft_len)
            for row, new in enumerate(new_of)
        ]
        tested, accepted = np.sum([one for rounds in rows for one in rounds], axis=0)
        found = engine.statistics
        assert (found.tested, found.accepted, found.steps) == (tested, accepted, max(map(len, rows)))
        assert 0 < found.accepted < found.tested
    # No second layout of the weights, and no keys and values but the verifier's.
    assert engine.weights is engine.exact


@pytest.mark.slow
def test_a_model_with_streams_drafts_with_its_heads():
    config = dataclasses.replace(VARIANTS["hyper_static"], num_layers=3, seq_len=8, vocab_size=8, num_mtp_heads=2)
    engine, requests = engine_of(config, 2), requests_of(config)
    completions = engine.generate(requests)
    assert_is_the_whole_pass(config, "seq", requests, completions, params=random_params(LanguageModel(config)))
    assert 0 < engine.statistics.accepted < engine.statistics.tested


@pytest.mark.slow
def test_devices_together_give_the_text_and_the_counts_of_one():
    requests, mesh = requests_of(AHEAD), make_mesh(MeshConfig(data=2, layer=2))
    one, many = engine_of(length=2), engine_of(length=2, placement=Placement(mesh, "ring"))
    texts = [[done.tokens for done in engine.generate(requests)] for engine in (one, many)]
    assert texts[0] == texts[1]
    for name in ("steps", "tested", "accepted"):
        assert getattr(one.statistics, name) == getattr(many.statistics, name)


@pytest.mark.slow
@pytest.mark.parametrize("law, draft_len", (("filtered", 3),))
def test_samples_have_the_law_of_the_model(law, draft_len):
    """As for drafts of layers, tests/test_speculation.py: the second and third new token jointly."""
    engine, sampling, V = engine_of(length=1, most=3), LAWS[law], AHEAD.vocab_size
    engine.draft_len = draft_len
    tokens = sample(engine, sampling, 3)
    first_V, second_VV, third_VVV = table("seq", sampling, AHEAD)
    law_VV = (first_V[:, None, None] * second_VV[:, :, None] * third_VVV).sum(0)
    assert_law(np.bincount(tokens[:, 1] * V + tokens[:, 2], minlength=V * V), law_VV)
    # The chi-square would see it if drafts were taken untested.
    with pytest.raises(AssertionError):
        assert_law(np.bincount(tokens[:, 1], minlength=V), first_V @ drafted(sampling))


@pytest.mark.slow
def test_drafts_are_accepted_as_often_as_two_laws_agree():
    """``sum_v min(p_v, q_v)``: one draft a row, after a first token from the prefill that the head does not know."""
    engine, sampling = engine_of(length=1, most=3), LAWS["plain"]
    engine.draft_len = 1
    sample(engine, sampling, 2)
    first_V, p_VV, _ = table("seq", sampling, AHEAD)
    rate = float(first_V @ np.minimum(p_VV, drafted(sampling)).sum(-1))
    found = engine.statistics
    assert found.tested == SEEDS and found.steps == 1
    assert abs(found.acceptance - rate) < 4 * math.sqrt(rate * (1 - rate) / SEEDS)


def drafted(sampling):
    """Law [V, V] of the first head's draft after each first token, which only a penalty makes differ."""
    params, run = states_of(AHEAD)
    logits_V = heads_of(AHEAD, params, *run(np.asarray([PROMPT])))[0, 0, -1]
    words = np.arange(AHEAD.vocab_size)
    return np.stack([reference(logits_V, np.isin(words, [*PROMPT, first]), sampling) for first in words])


def test_drafts_without_heads_are_refused():
    assert parse_drafter(" mtp ", 4) == "mtp" and isinstance(parse_drafter("exit:3", 4), Schedule)
    for config, draft, rule, named in (
        (TINY, Drafting("mtp"), "last_eval", "no multi-token-prediction heads"),
        (AHEAD, Drafting("mtp", 4), "last_eval", "4 exceeds the model's 3"),
        (AHEAD, Drafting("mtp", most=8), "last_eval", "8 exceeds the model's 3"),
        (AHEAD, Drafting("mtp"), "refreshed", "'refreshed'"),
    ):
        with pytest.raises(InputError, match=named):
            Engine(LanguageModel(config), {}, draft=draft, rule=rule)
