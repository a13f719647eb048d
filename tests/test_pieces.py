"""Logits in pieces: the same numbers as at once, and nothing that holds those of a whole batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from problems import random_params, random_tokens

from snlp_jax import pieces
from snlp_jax.config import (
    HiddenNormConfig,
    LossConfig,
    MachineConfig,
    MeshConfig,
    ModelConfig,
    MTPConfig,
    SolverCEConfig,
)
from snlp_jax.eval.fidelity import make_compare_fn, pass_over
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.layout import prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
from snlp_jax.train.loss import Plan, balanced, cross_entropy, loss_fn
from snlp_jax.train.passes import Passes
from snlp_jax.types import Batch

MODEL = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=12, num_mtp_heads=1)
SOLVED = "idn:n=2,k=1"
TERMS = LossConfig(
    solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,)),
    hidden_norm=HiddenNormConfig(weight=0.1, region_sizes=(2,)),
    mtp=MTPConfig(weight=0.3),
)
PLAN = Plan((("hidden_norm", (2,)), ("solver_ce", (2,))))
NUM_ROWS = 4


def in_pieces(monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int = NUM_ROWS) -> None:
    """From here on a device holds the logits of so many tokens of a row."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * rows * MODEL.padded_vocab_size * tokens)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = np.asarray(random_tokens(MODEL, batch=NUM_ROWS, length=13))
    document = np.cumsum(rng.random(tokens.shape) < 0.2, axis=1, dtype=np.int32)
    return balanced(Batch(tokens, rng.random((NUM_ROWS, 12), np.float32), document))


def loss_of(model: LanguageModel, mesh: Any = None) -> Any:
    """Loss and gradient, of parameters and a batch."""

    def loss(params: Any, batch: Batch) -> jax.Array:
        passes = Passes(model, params, batch, mesh=mesh)
        return loss_fn(passes, TERMS, PLAN, {"solver_ce": 1.0, "hidden_norm": 0.1})[0]

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("tokens", [1, 5, 11])
def test_pieces_of_any_length_cover_every_token_once(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 2 * 8 * tokens)
    x_BTD, kernel_DV = np.random.default_rng(0).normal(size=(2, 11, 3)), np.ones((3, 8))

    def read(params: Any, x: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        assert x.shape[1] <= tokens
        return {"sum": (x @ params).sum(-1), "target": target}

    target_BT = np.arange(22).reshape(2, 11)
    found = pieces.over_time(read, jnp.asarray(kernel_DV), jnp.asarray(x_BTD), jnp.asarray(target_BT), vocab_size=8)
    np.testing.assert_allclose(found["sum"], 8 * x_BTD.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found["target"], target_BT)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Relative to the largest entry of all."""
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0)


def test_a_cross_entropy_in_pieces_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = LanguageModel(MODEL), batch()
    params = random_params(model)
    h_BTD = np.random.default_rng(1).normal(size=(NUM_ROWS, 12, 32)).astype(np.float32)

    def value(head: Any, h_BTD: jax.Array) -> Any:
        return cross_entropy(model, head, h_BTD, h_BTD / 2, rows.tokens[:, 1:], rows.weight)

    run = lambda: jax.jit(jax.value_and_grad(value, (0, 1)))(params, h_BTD)  # noqa: E731
    whole = run()
    in_pieces(monkeypatch, 5)
    assert_close(run(), whole, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """With weights, documents, heads that look ahead and a region; values and gradients."""
    model = LanguageModel(MODEL, MachineConfig(compute_dtype=dtype))
    params, rows = random_params(model), batch()
    whole = jax.jit(loss_of(model))(params, rows)
    in_pieces(monkeypatch, 5)
    # Of bfloat16 kernels each piece's gradient is rounded before the sum, and the whole one once.
    assert_close(jax.jit(loss_of(model))(params, rows), whole, 1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 2, "tensor": 2}, {"layer": 2}], ids=str)
def test_a_loss_in_pieces_on_a_mesh(monkeypatch: pytest.MonkeyPatch, axes: dict[str, int]) -> None:
    model, mesh, rows = LanguageModel(MODEL), make_mesh(MeshConfig(**axes)), batch()
    params = random_params(model)
    whole = jax.jit(loss_of(model))(params, rows)
    in_pieces(monkeypatch, 5, NUM_ROWS // axes.get("data", 1))
    assert_close(jax.jit(loss_of(model, mesh))(params, rows), whole, 1e-5)


def test_a_comparison_in_pieces_is_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(MODEL)
    params, window_BT = random_params(model), batch().tokens
    weights = [prepare(model, params, parse_schedule(text, 2), layout="stack") for text in ("seq", SOLVED)]

    def compared() -> Any:
        compare = make_compare_fn(model)
        ends, exact = compare(weights[0], window_BT)
        return exact, compare(weights[1], window_BT, None, ends)[1]

    whole = compared()
    in_pieces(monkeypatch, 5)
    cut = compared()
    assert float(whole[1].kl_BT.max()) > 1e-3
    np.testing.assert_array_equal(cut[0].kl_BT, 0.0)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5)


def largest_logits(fn: Any, *args: Any) -> int:
    """Tokens of the largest array with a vocabulary that a traced function holds."""
    largest = 0

    def walk(jaxpr: Any) -> None:
        nonlocal largest
        for equation in jaxpr.eqns:
            for out in equation.outvars:
                shape = getattr(out.aval, "shape", ())
                if len(shape) > 2 and shape[-1] >= MODEL.vocab_size:
                    largest = max(largest, int(np.prod(shape[:-1])))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return largest


def test_nothing_holds_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, comparison, likelihoods, greedy text: traced, not compiled."""
    in_pieces(monkeypatch, 3)
    model = LanguageModel(MODEL)
    params, rows = random_params(model), batch()
    weights = split(model, params, parse_schedule(SOLVED, 2))
    limit = 3 * NUM_ROWS
    assert largest_logits(loss_of(model), params, rows) == limit
    compare = make_compare_fn(model)
    ends, _ = jax.eval_shape(compare, weights, rows.tokens)
    assert largest_logits(compare, weights, rows.tokens, None, ends) == limit
    assert largest_logits(lambda w, t: pass_over(model, w, t), weights, rows.tokens) == limit
    places = np.zeros((len(rows.tokens), 1), np.int32)
    assert largest_logits(lambda w, t: pass_over(model, w, t, places_BS=places), weights, rows.tokens) == NUM_ROWS
    assert largest_logits(make_greedy_fn(model, prompt_len=2, num_tokens=10), weights, rows.tokens[:, :12]) <= limit


def test_small_logits_stay_in_one_piece() -> None:
    """As they always were, so that their numbers have the same bits: no loop, no recomputation."""
    model = LanguageModel(dataclasses.replace(MODEL, num_mtp_heads=0, remat=False))
    weights = split(model, random_params(model), parse_schedule("seq", 2))
    text = str(jax.make_jaxpr(lambda w, t: pass_over(model, w, t)[1])(weights, batch().tokens))
    assert "checkpoint" not in text and "remat" not in text
