"""Neural block linearization: the maps and their errors from moments, and moments of a model's branches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax.config import LinearizeConfig, MeshConfig, ModelConfig, NormConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.linearize.covariance import Moments
from snlp_jax.linearize.maps import (
    MAX_CONDITION,
    RIDGES,
    cca_bound,
    check_samples,
    fit_map,
    nmse,
    squared_error,
    variance,
)
from snlp_jax.linearize.nbl import Candidate, check_linearize, choose, linearize
from snlp_jax.linearize.replace import replace
from snlp_jax.linearize.statistics import branch_moments
from snlp_jax.model import LanguageModel
from snlp_jax.model.attention import attend
from snlp_jax.model.layers import rms_norm
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.solver import Schedule

WIDTH = 6


def samples(num=400, width=WIDTH, seed=0, noise=0.5, bend=0.5):
    """y is an affine function of x, with noise and something that no map explains."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(3, width, width))
    x = rng.normal(size=(num, width)) @ mix[0] + mix[1, 0]
    y = x @ mix[1] + bend * np.sin(x @ mix[2]) + noise * rng.normal(size=(num, width)) + 3.0
    return x, y


def moments(x, y):
    return Moments.of(x, y, with_yy=True)


def apply(fit, x):
    return x @ fit.weight_YX.T + fit.bias_Y


# ---------------------------------------------------------------- maps


def test_an_affine_branch_is_recovered_exactly():
    x, _ = samples()
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=WIDTH)
    of_branch = moments(x, x @ weight.T + bias)
    fit = fit_map(of_branch)
    # float64, times the condition of C_xx, about 1e3
    np.testing.assert_allclose(fit.weight_YX, weight, atol=1e-10)
    np.testing.assert_allclose(fit.bias_Y, bias, atol=1e-10)
    assert fit.ridge == 0 and nmse(fit, of_branch) < 1e-12 and nmse(fit, of_branch, residual=True) < 1e-12
    assert nmse(fit_map(of_branch, ridge=0.1), of_branch) > 1e-4


def test_nmse_in_sample_is_the_closed_form():
    """tr(C_yy - C_yx C_xx^-1 C_xy) / tr(C_yy); the residual Y = y + x changes the denominator alone."""
    x, y = samples()
    both = moments(x, y)
    c_xx, c_yx = both.covariance()
    c_yy = both.yy / both.count
    explained = c_yx @ np.linalg.solve(c_xx, c_yx.T)
    error = np.trace(c_yy - explained)
    fit = fit_map(both)
    assert nmse(fit, both) == pytest.approx(error / np.trace(c_yy), rel=1e-10)
    assert variance(both.with_residual()) == pytest.approx(np.trace(np.cov((y + x).T, bias=True)), rel=1e-12)
    assert nmse(fit, both, residual=True) == pytest.approx(error / np.trace(np.cov((y + x).T, bias=True)), rel=1e-10)
    # The LMMSE map of Y = y + x is W + I: what it leaves is the same.
    with_residual = moments(x, y + x)
    again = fit_map(with_residual)
    np.testing.assert_allclose(again.weight_YX, fit.weight_YX + np.eye(WIDTH), atol=1e-10)
    assert nmse(again, with_residual) == pytest.approx(nmse(fit, both, residual=True), rel=1e-10)


@pytest.mark.parametrize("settings", ({}, {"ridge": 0.3}, {"shrinkage": 0.2}, {"rank": 2}, {"ridge": 0.1, "rank": 3}))
def test_error_on_other_samples_is_that_of_the_map_applied(settings):
    """By the quadratic form of their moments, without a look at them."""
    fit = fit_map(moments(*samples()), **settings)
    x, y = samples(num=90, seed=1)
    error = np.mean(np.sum((y - apply(fit, x)) ** 2, axis=1))
    held_out = moments(x, y)
    assert squared_error(fit, held_out) == pytest.approx(error, rel=1e-10)
    assert nmse(fit, held_out) == pytest.approx(error / np.sum(y.var(0)), rel=1e-10)


def test_a_ridge_shrinks_as_its_formula_says():
    x, y = samples()
    both = moments(x, y)
    c_xx, c_yx = both.covariance()
    mean = np.trace(c_xx) / WIDTH
    expected = c_yx @ np.linalg.inv(c_xx + 0.3 * mean * np.eye(WIDTH))
    np.testing.assert_allclose(fit_map(both, ridge=0.3).weight_YX, expected, atol=1e-12)
    expected = c_yx @ np.linalg.inv(0.8 * c_xx + 0.2 * mean * np.eye(WIDTH))
    np.testing.assert_allclose(fit_map(both, shrinkage=0.2).weight_YX, expected, atol=1e-12)


@pytest.mark.parametrize("rank", (1, 3, 5))
def test_low_rank_is_optimal_in_the_metric_of_the_inputs(rank):
    """Eckart and Young: what rank r adds to the error is the sum of the squared singular values of W C_xx^{1/2} beyond
    the r-th; no other map of that rank, that of the plain SVD of W among them, does better."""
    x, y = samples()
    both = moments(x, y)
    c_xx = both.covariance()[0]
    full, low = fit_map(both), fit_map(both, rank=rank)
    root = np.linalg.cholesky(c_xx)
    singular = np.linalg.svd(full.weight_YX @ root, compute_uv=False)
    added = squared_error(low, both) - squared_error(full, both)
    assert added == pytest.approx(np.sum(singular[rank:] ** 2), rel=1e-8)
    assert np.linalg.matrix_rank(low.weight_YX) == rank
    u, s, vt = np.linalg.svd(low.weight_YX)
    down, up = vt[:rank].T * s[:rank], u[:, :rank].T
    u, s, vt = np.linalg.svd(full.weight_YX)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    nudge = 0.01 * np.random.default_rng(2).normal(size=up.shape)
    for weight in (plain, (down @ (up + nudge)).T, ((down + nudge.T) @ up).T):
        other = type(low)(weight, both.mean_y - weight @ both.mean_x, 0.0, 1.0)
        assert squared_error(other, both) > squared_error(low, both)
    np.testing.assert_allclose(fit_map(both, rank=WIDTH).weight_YX, full.weight_YX, atol=1e-12)


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("width, noise", ((1, 0.5), (3, 0.1), (3, 5.0), (6, 0.01)))
def test_cca_bound_holds_on_gaussians(residual, width, noise):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(300, width)) @ rng.normal(size=(width, width))
    both = moments(x, x @ rng.normal(size=(width, width)) + noise * rng.normal(size=(300, width)))
    both = both.with_residual() if residual else both
    bound, exact = cca_bound(both), nmse(fit_map(both), both)
    assert exact <= bound * (1 + 1e-9) and bound <= width + 1e-9
    if width == 1:  # one correlation: the bound is the error
        assert bound == pytest.approx(exact, rel=1e-9)


def test_cca_bound_is_the_sum_over_canonical_correlations():
    x, y = samples()
    both = np.cov(np.concatenate([x, y], axis=1).T)
    xx, yx, yy = both[:WIDTH, :WIDTH], both[WIDTH:, :WIDTH], both[WIDTH:, WIDTH:]
    rho_squared = np.linalg.eigvals(np.linalg.solve(yy, yx) @ np.linalg.solve(xx, yx.T)).real
    assert cca_bound(moments(x, y)) == pytest.approx(np.sum(1 - rho_squared), rel=1e-8)


def test_a_singular_covariance_gets_a_ridge():
    """A channel twice and one that never changes: the best ridge of the grid on other text, and finite maps."""
    x, y = samples(num=60)
    x_held, y_held = samples(num=500, seed=1)
    widen = lambda x: np.concatenate([x, x[:, :2], np.ones((len(x), 1))], axis=1)  # noqa: E731
    both, held_out = moments(widen(x), y), moments(widen(x_held), y_held)
    assert fit_map(both).condition > MAX_CONDITION
    fit = fit_map(both, held_out)
    assert fit.ridge in RIDGES and np.isfinite(fit.weight_YX).all()
    best = min(squared_error(fit_map(both, ridge=ridge), held_out) for ridge in RIDGES)
    assert squared_error(fit, held_out) == best < variance(held_out)
    assert fit_map(both).ridge == RIDGES[0]  # without other text
    assert np.isfinite(fit_map(both, ridge=0.0).weight_YX).all()  # asked for: the least norm solution
    well = moments(x, y)
    assert fit_map(well).condition < MAX_CONDITION and fit_map(well, moments(x_held, y_held)).ridge == 0


def test_a_branch_that_says_nothing_is_affine():
    x, _ = samples()
    both = moments(x, np.full_like(x, 2.0))
    fit = fit_map(both)
    assert nmse(fit, both) == 0
    np.testing.assert_allclose(apply(fit, x), 2.0, rtol=1e-12)
    assert np.isfinite(cca_bound(both))


def test_too_few_samples_are_refused():
    check_samples(12, 6)
    with pytest.raises(InputError, match="too few"):
        check_samples(11, 6)


# ---------------------------------------------------------------- moments of branches

CONFIG = ModelConfig(
    vocab_size=50, num_layers=3, embed_dim=24, num_heads=2, num_kv_heads=1, seq_len=8, window_pattern="SL",
    short_window=3,
)  # fmt: skip
ALL = {"attention": (0, 1, 2), "mlp": (0, 1, 2), "block": (0, 1, 2)}
"""The same of each layer, which then is one compiled program."""
CLOSE = 1e-6
"""Frobenius-relative, of float32 products within a batch of a hundred samples: a few times 6e-8."""


@functools.cache
def problem(**changes):
    """A model with random weights everywhere, and 48 windows."""
    model = LanguageModel(dataclasses.replace(CONFIG, **changes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), model.abstract_params()
    )
    tokens = rng.integers(CONFIG.vocab_size, size=(48, CONFIG.seq_len + 1), dtype=np.int32)
    return model, params, tokens


def batches_of(tokens, size):
    return lambda: ({"tokens": tokens[i : i + size]} for i in range(0, len(tokens), size))


@functools.cache
def by_hand(changes=(), skip_first=0):
    """Pairs (x, y) of every branch, float64 [samples, D], by the model's formulas written out layer by layer."""
    model, params, tokens = problem(**dict(changes))
    config = model.config

    @jax.jit  # one program, not a hundred small ones
    def branches(params, tokens):
        x0 = model.embed(params, tokens)
        shared, h = model.shared(x0), model.expand(x0)
        ctx = model.context(params, params["blocks"], tokens, 0, config.num_layers)
        found = []
        for l in range(config.num_layers):
            layer, ctx_l = jax.tree.map(lambda leaf: leaf[l], (params["blocks"], ctx))  # noqa: B023
            block = model.block(layer)
            x, carry = block.path.enter(layer, h, ctx_l, shared)
            q, kv = block.project(x, ctx_l, shared)
            out = attend(q, kv, config.windows[l])
            attn = block.attn_out(out.reshape(*out.shape[:2], -1))
            u, carry = block.path.between(layer, carry, ctx_l, attn)
            mlp = block.mlp_out(block.mlp_hidden(rms_norm(u)))
            h, _ = block.path.leave(carry, ctx_l, mlp)
            found.append((x, attn, u, mlp))
        return found

    found = {}
    for l, leaves in enumerate(branches(params, tokens[:, :-1])):
        rows = lambda leaf: np.asarray(leaf, np.float64)[:, skip_first:].reshape(-1, config.embed_dim)  # noqa: E731
        x, attn, u, mlp = map(rows, leaves)
        found |= {("attention", l): (x, attn), ("mlp", l): (u, mlp), ("block", l): (x, attn + mlp)}
    return found


def assert_moments_are(found, pairs):
    for place, actual in found.items():
        expected = moments(*pairs[place])
        assert actual.count == expected.count
        for name, one, other in zip(Moments._fields[1:], actual[1:], expected[1:], strict=True):
            off = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert off < CLOSE, (place, name, off)


@functools.cache
def all_moments(num_devices=1):
    """Of every branch, over batches of 16 windows."""
    model, params, tokens = problem()
    mesh, batches = make_mesh(MeshConfig(data=num_devices)) if num_devices > 1 else None, []
    found = branch_moments(model, params, batches_of(tokens, 16), ALL, mesh=mesh, on_batch=lambda: batches.append(1))
    assert len(batches) == 48 // 16
    return found


@pytest.mark.parametrize("num_devices", (1, 2))
def test_moments_are_those_of_all_samples_on_any_split(num_devices):
    found = all_moments(num_devices)
    assert set(found) == {(name, l) for name, layers in ALL.items() for l in layers}
    assert_moments_are(found, by_hand())


@pytest.mark.slow
def test_of_another_family_without_the_first_tokens():
    """Norms with weights before and behind the branches: y is what reaches the stream."""
    family = {"norm": NormConfig(weight="plus_one", use_post=True), "mlp": "geglu", "use_x0_resid": False}
    family |= {"use_value_embeds": False, "use_smear": False}
    model, params, tokens = problem(**family)
    found = branch_moments(model, params, batches_of(tokens, 16), ALL, skip_first=3)
    assert found["mlp", 1].count == 48 * (CONFIG.seq_len - 3)
    assert_moments_are(found, by_hand(tuple(family.items()), skip_first=3))


def test_means_far_above_the_spread_cost_no_digits():
    """Embeddings of 1000 +- 0.3, which the first layer reads as they are: their squares leave float32 no digit."""
    model, params, tokens = problem(norm=NormConfig(use_embed=False), use_x0_resid=False, use_smear=False)
    token = 1000 + params["embed"]["token"]
    params = params | {"embed": params["embed"] | {"token": token}}
    found = branch_moments(model, params, batches_of(tokens, 12), {"attention": (0,)})["attention", 0]
    x = np.asarray(token, np.float64)[tokens[:, :-1].reshape(-1)]
    centred = x - x.mean(0)
    assert np.linalg.norm(found.xx - centred.T @ centred) / np.linalg.norm(centred.T @ centred) < CLOSE
    np.testing.assert_allclose(found.mean_x, x.mean(0), rtol=1e-9)
    in_float32 = jax.jit(Moments.of)(jnp.asarray(x, jnp.float32), jnp.asarray(x, jnp.float32))
    assert np.linalg.norm(in_float32.mean_x[0] - x.mean(0)) / 1000 > 1e-7  # what the mean is off by is what saves them


@pytest.mark.slow
def test_streams_have_branches_but_no_block():
    changes = dict(num_streams=2, use_x0_resid=False, use_value_embeds=False)
    model, params, tokens = problem(**changes)
    found = branch_moments(model, params, batches_of(tokens, 48), {"attention": (1,), "mlp": (2,)})
    assert_moments_are(found, by_hand(tuple(changes.items())))
    with pytest.raises(InputError, match="residual streams"):
        check_linearize(model, LinearizeConfig(blocks=1))
    with pytest.raises(InputError, match="no whole block"):
        branch_moments(model, params, batches_of(tokens, 48), {"block": (1,)})


def test_bad_questions_are_one_sentence():
    model, params, tokens = problem()
    for wanted, skip_first, windows, keyword in (
        ({"mlp": (3,)}, 0, tokens, r"layers \[3\] have no whole mlp"),
        (ALL, 8, tokens, "first 8 tokens"),
        (ALL, 0, tokens[:0], "no text"),
    ):
        with pytest.raises(InputError, match=keyword):
            branch_moments(model, params, batches_of(windows, 48), wanted, skip_first=skip_first)


# ---------------------------------------------------------------- replacing them


def last_states(model, params, tokens):
    weights = prepare(model, params, Schedule.of(model.config.num_layers), num_tokens=tokens[:, :-1].size)
    run = jax.jit(lambda weights, tokens: forward(model, weights, tokens).h_last)
    return np.asarray(run(weights, tokens[:, :-1]), np.float64)


def test_a_replaced_branch_errs_as_its_moments_say(branch="block", rank=0):
    """The squared error of the last layer's outputs, measured by running the model that the maps are put into."""
    model, params, tokens = problem()
    found = all_moments()[branch, 2]
    fit = fit_map(found, rank=rank)
    dropped = {2: None} if branch == "block" else {}
    config, new = replace(model.config, params, mlp={2: fit.affine}, attention=dropped, rank=rank)
    error = last_states(LanguageModel(config), new, tokens) - last_states(model, params, tokens)
    measured = np.mean(np.sum(error**2, axis=-1))
    # float32 states, whose rounding the error is far above
    assert squared_error(fit, found) == pytest.approx(measured, rel=1e-4) and measured > 1e-2


def found_by(config, **changes):
    model, params, tokens = problem(**changes)
    return linearize(model, params, batches_of(tokens[:32], 16), batches_of(tokens[32:], 16), config)


def test_the_lowest_are_chosen():
    made = found_by(LinearizeConfig(attention=1, mlp=2))
    (only,) = made.rounds
    assert [each.place for each in only.candidates] == [(name, l) for l in range(3) for name in ("attention", "mlp")]
    for rank_by in ("heldout", "nmse_residual", "nmse", "cca"):
        chosen = choose(only.candidates, {"attention": 1, "mlp": 2}, LinearizeConfig(mlp=1, rank_by=rank_by))
        for branch, count in (("attention", 1), ("mlp", 2)):
            scores = sorted((each.score(rank_by), each.place) for each in only.candidates if each.branch == branch)
            assert [place for _, place in scores[:count]] == [place for place in chosen if place[0] == branch]
        assert rank_by != "heldout" or chosen == only.chosen
    config = made.model.config
    assert {("attention", l) for l in config.linear_attention} | {("mlp", l) for l in config.linear_mlp} == set(
        only.chosen
    )


@pytest.mark.slow
def test_a_greedy_choice_looks_at_the_model_so_far():
    """The second round's candidates are measured on the model whose first map is in place."""
    model, params, tokens = problem()
    options = LinearizeConfig(attention=2, greedy=True, rank_by="random", seed=2)
    made = found_by(options)
    first, second = made.rounds
    ((_, layer),) = first.chosen
    assert [each.layer for each in second.candidates] == [l for l in range(3) if l != layer]
    new_map = next(each.fit.affine for each in first.candidates if each.layer == layer)
    config, new = replace(model.config, params, attention={layer: new_map})
    others = [l for l in range(3) if l != layer]
    again = branch_moments(LanguageModel(config), new, batches_of(tokens[:32], 16), {"attention": others})
    for each in second.candidates:
        np.testing.assert_allclose(each.nmse, nmse(fit_map(again[each.place]), again[each.place]), rtol=1e-6)
    untouched = {each.layer: each.nmse for each in first.candidates}
    assert layer < 2 and any(each.nmse != untouched[each.layer] for each in second.candidates)


def test_blocks_are_chosen_first_and_drops_are_the_same_layers():
    options = LinearizeConfig(attention=2, blocks=1, drop=True)
    dropped, kept = found_by(options), found_by(dataclasses.replace(options, drop=False))
    assert dropped.rounds[0].chosen == kept.rounds[0].chosen
    (block,) = [layer for branch, layer in kept.rounds[0].chosen if branch == "block"]
    rest = tuple(layer for layer in range(3) if layer != block)
    assert (kept.model.config.linear_mlp, kept.model.config.dropped_attention) == ((block,), (block,))
    assert kept.model.config.linear_attention == rest and not kept.model.config.dropped_mlp
    assert (dropped.model.config.dropped_mlp, dropped.model.config.dropped_attention) == ((block,), (0, 1, 2))
    with pytest.raises(InputError, match="no whole attention"):
        model, params = kept.model, kept.params
        branch_moments(model, params, batches_of(problem()[2], 16), {"attention": (0,)})


def test_chance_is_a_choice_of_the_seed():
    model, params, _ = problem()
    candidates = [Candidate(l, "attention", None, 0.1 * l, 0.1 * l, 0.1 * l, 1.0) for l in range(8)]
    pick = lambda seed, **more: choose(  # noqa: E731
        candidates, {"attention": 3}, LinearizeConfig(attention=3, rank_by="random"), seed=seed, **more
    )
    assert pick(0) == pick(0) and len({frozenset(pick(seed)) for seed in range(9)}) > 4
    check_linearize(model, LinearizeConfig(attention=3))
    for options, message in (
        ({"attention": 4}, "--attention is 4"),
        ({"mlp": 3, "blocks": 1}, "besides the 1 of --blocks"),
        ({"mlp": 1, "rank": 25}, "--rank is 25"),
    ):
        with pytest.raises(InputError, match=message):
            check_linearize(model, LinearizeConfig(**options))
    with pytest.raises(InputError, match="nothing is to be replaced"):
        LinearizeConfig()
